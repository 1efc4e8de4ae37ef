"""The dtype that a model computes in while it trains; what trains is fp32."""

from __future__ import annotations

from collections.abc import Collection

import torch

from trisparse.sparsity.hardware import bf16_is_fast

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def computing_dtype(asked: str, device: torch.device, held: Collection[torch.dtype] = ()) -> torch.dtype | None:
    """What to autocast to, or None: not at all.

    Args:
        asked: "fp32", "bf16", "fp16", or "auto": bf16 where ``device`` is faster in it, or a weight is in it.
        device: of the model.
        held: the dtypes of its weights.
    """
    if asked != "auto":
        return _DTYPES[asked]
    return torch.bfloat16 if torch.bfloat16 in held or bf16_is_fast(device) else None
