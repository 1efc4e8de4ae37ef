"""Retrain every parameter with the masks held: full retraining, the costly method that PERP is measured against.

The gradient of a pruned weight is set to zero as soon as it is there, so clipping does not count it, the moments of
AdamW stay zero, and with them the weight; weight decay leaves a zero alone, too.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.kernels.bitmask import apply_bits, pack_bits
from trisparse.retrain.model_state import ModelState
from trisparse.retrain.sharding import Shards, held, rows_held
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import masks


class FullWeights:
    """A model whose parameters all train under its masks, with what it takes to restore it.

    The weights from before lie in an unnamed temporary file, in no memory. Those of a half-precision model train in
    fp32 and are rounded at the end.

    Args:
        model: a model without compressed layers.
        folder: where the temporary file is made; the system's place for such files by default.

    Attributes:
        module: the model, to train.
        trainable: parameters that train.
    """

    module: nn.Module
    trainable: dict[str, int]

    def __init__(self, model: Any, folder: str | Path | None = None) -> None:
        self.module = model
        self._state = ModelState(model)
        self._params: list[tuple[nn.Parameter, torch.dtype]] = [(param, param.dtype) for param in model.parameters()]
        self._masked: list[tuple[nn.Parameter, Tensor, int]] = []
        self._hooks: list[Any] = []
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by merge or discard)
        try:
            for param, _ in self._params:
                self._file.write(_bytes(param.detach().cpu()))
            self._file.flush()
            for param, _ in self._params:
                param.data = param.data.float()
                param.requires_grad_(True)
            for name, mask in masks(model).items():
                param = model.get_parameter(name)
                packed, cols = mask.bits, mask.cols
                if mask.transposed:
                    cols = param.shape[-1]
                    packed = pack_bits(mask.dense().reshape(-1, cols).contiguous())
                self._masked.append((param, packed, cols))
                self._hold(param, packed, cols)
        except BaseException:
            self.discard()
            raise
        self.trainable = {"full": sum(param.numel() for param, _ in self._params)}

    def _hold(self, param: Tensor, packed: Tensor, cols: int) -> None:
        hook = partial(_zero_pruned, packed.to(param.device), cols)
        self._hooks.append(param.register_post_accumulate_grad_hook(hook))

    def hold_parts(self, shards: Shards) -> None:
        """Hold the masks on what this process has of the weights."""
        for param, packed, cols in self._masked:
            shard = shards.shard(param)
            rows = packed.unflatten(0, (len(shard), -1))  # of the mask's matrix, by row of the parameter
            self._hold(shard, rows[rows_held(len(shard))].flatten(0, 1), cols)

    def switch_cache_off(self) -> None:
        """No key/value cache while training; the configs are put back at the end."""
        self._state.switch_cache_off()

    def first_not_finite(self) -> str | None:
        """Name of a parameter that holds a NaN or Inf, or None."""
        for name, param in self.module.named_parameters():
            if not bool(torch.isfinite(param).all()):
                return str(name)
        return None

    def as_merged(self) -> None:
        """The model computes what it will compute already."""

    def merge(self) -> int:
        """Round to the dtypes from before and end; no parameter is added."""
        with interrupt_after(), torch.no_grad():
            for param, dtype in self._params:
                param.data = param.data.to(dtype)
            self._release()
        return 0

    def discard(self) -> None:
        """Put every weight back as it was."""
        with interrupt_after(), torch.no_grad():
            if self._file.tell() == sum(param.numel() * dtype.itemsize for param, dtype in self._params):
                self._file.seek(0)
                for param, dtype in self._params:
                    before = torch.empty(param.shape, dtype=dtype)
                    self._file.readinto(_bytes(before))
                    param.data = before.to(param.device)  # of its shape too, where sharding had emptied it
            self._release()

    def _release(self) -> None:
        self._file.close()
        for hook in self._hooks:
            hook.remove()
        self._state.restore()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; of another one, that of a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _zero_pruned(packed: Tensor, cols: int, param: Tensor) -> None:
    assert param.grad is not None
    if not param.grad.is_contiguous():
        param.grad = param.grad.contiguous()
    with torch.no_grad():
        apply_bits(held(param.grad).view(-1, cols), packed)
