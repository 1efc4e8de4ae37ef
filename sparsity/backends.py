"""What can run a compressed linear layer, and up to how many tokens which of them does.

| backend             | what runs                                                        | weight that it reads       |
|---------------------|------------------------------------------------------------------|----------------------------|
| ``compressed``      | kernels/linear.py: decompresses on chip; CPU: dense for a moment | compressed                 |
| ``mma.sp``          | kernels/linear24.py: sparse tensor cores (2:4, sm_80 and later)  | compressed, in their order |
| ``semi-structured`` | torch's own 2:4 product (cuSPARSELt or CUTLASS)                  | torch's, besides           |
| ``decompress``      | decompresses the whole weight, then torch's dense product        | compressed                 |
| ``dense``           | torch's dense product                                            | dense, besides             |

A plan names a backend for each range of token counts. Without measurements it is `default_plan`; sparsity/tuning.py
makes one from times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from trisparse.kernels.linear import MAX_RANK, linear
from trisparse.kernels.linear24 import linear24

if TYPE_CHECKING:
    from trisparse.sparsity.linear import SparseLinear

Lora = tuple[Tensor, Tensor, float]
Prefer = Literal["speed", "memory"]

STREAMING_TOKENS = 32  # up to here the weight's bytes bind, so that the compressed weight wins


@dataclass(frozen=True)
class Plan:
    """Which backend runs: the first of ``steps`` (most tokens or None for any, name) that has room for the tokens."""

    layout: Literal["rows", "fragments"]
    steps: tuple[tuple[int | None, str], ...]

    def backend(self, tokens: int, *, grad: bool = False) -> str:
        """The backend for so many tokens; with ``grad`` one that has a backward."""
        name = next(name for most, name in self.steps if most is None or tokens <= most)
        return name if not grad or BACKENDS[name].backward else "compressed"

    def __str__(self) -> str:
        if len(self.steps) == 1:
            return self.steps[0][1]
        return ", ".join(name if most is None else f"{name} to {most} tokens" for most, name in self.steps)


@dataclass(frozen=True)
class Backend:
    """One way to run a layer.

    Attributes:
        run: (layer, x, lora) -> y.
        refuses: layer -> why it cannot run it, or None.
        layout: that of the values that it needs; None takes both.
        copy: what it needs besides the compressed weight, ``"dense"`` or ``"semi-structured"``.
        backward: whether gradients reach x and the adapter, without keeping a dense weight until then.
    """

    run: Callable[[SparseLinear, Tensor, Lora | None], Tensor]
    refuses: Callable[[SparseLinear], str | None]
    layout: Literal["rows", "fragments"] | None = None
    copy: str | None = None
    backward: bool = True


def _cast(layer: SparseLinear, x: Tensor, lora: Lora | None) -> tuple[torch.dtype, Tensor, Tensor | None, Lora | None]:
    """The compute dtype, and x, the bias and the adapter in it: autocast's, else as they are."""
    kind, bias = x.device.type, layer.bias
    dtype = layer.values.dtype
    if kind == "meta" or not torch.is_autocast_enabled(kind) or dtype == torch.float64:
        return dtype, x, bias, lora
    dtype = torch.get_autocast_dtype(kind)
    if lora is not None:
        lora = lora[0].to(dtype), lora[1].to(dtype), lora[2]
    return dtype, x.to(dtype), None if bias is None else bias.to(dtype), lora


def _compressed(layer: SparseLinear, x: Tensor, lora: Lora | None) -> Tensor:
    dtype, x, bias, lora = _cast(layer, x, lora)
    weight = layer.compressed()
    if weight.values.dtype != dtype:
        weight = replace(weight, values=weight.values.to(dtype))
    return linear(x, weight, bias, lora, conv1d=layer.kind == "Conv1D")


def _mma_sp(layer: SparseLinear, x: Tensor, lora: Lora | None) -> Tensor:
    dtype, x, bias, lora = _cast(layer, x, lora)
    return linear24(x, layer.values.to(dtype), layer.positions, bias, lora)


def _semi_structured(layer: SparseLinear, x: Tensor, lora: Lora | None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # its weight has one dtype
        return _compressed(layer, x, lora)
    assert layer.semi_structured is not None
    rows = x.reshape(-1, x.shape[-1])  # torch's product takes a view of x
    if not len(rows):
        return _compressed(layer, x, lora)
    y = F.linear(rows, layer.semi_structured, layer.bias).reshape(*x.shape[:-1], layer.out_features)
    return _adapt(y, x, lora)


def _decompress(layer: SparseLinear, x: Tensor, lora: Lora | None) -> Tensor:
    return _adapt(F.linear(x, layer.weight, layer.bias), x, lora)


def _dense(layer: SparseLinear, x: Tensor, lora: Lora | None) -> Tensor:
    assert layer.dense is not None
    return _adapt(F.linear(x, layer.dense, layer.bias), x, lora)


def _adapt(y: Tensor, x: Tensor, lora: Lora | None) -> Tensor:
    if lora is None:
        return y
    a, b, scale = lora
    return y + scale * F.linear(F.linear(x, a), b)


def _no_gpu(layer: SparseLinear) -> str | None:
    return None if layer.values.is_cuda else "it runs on a CUDA device"


def _refuse_compressed(layer: SparseLinear) -> str | None:
    wide = layer.values.is_cuda and layer.values.dtype == torch.float64
    return "its kernel takes bf16, fp16 and fp32, not torch.float64" if wide else None


def _refuse_sparse_tensor_cores(layer: SparseLinear) -> str | None:
    if layer.format != "2:4":
        return "sparse tensor cores take 2:4"
    if layer.values.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {layer.values.dtype}"
    if (no_gpu := _no_gpu(layer)) is not None:
        return no_gpu
    capability = torch.cuda.get_device_capability(layer.values.device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, this GPU has {capability}"


def _refuse_mma_sp(layer: SparseLinear) -> str | None:
    if layer.format == "2:4" and (layer.out_features % 16 or layer.in_features % 64):
        return "it takes outputs in multiples of 16 and inputs in multiples of 64"
    return _refuse_sparse_tensor_cores(layer)


def _refuse_semi_structured(layer: SparseLinear) -> str | None:
    if (reason := _refuse_sparse_tensor_cores(layer)) is not None:
        return reason
    cutlass = SparseSemiStructuredTensor._FORCE_CUTLASS
    if not cutlass and not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    kind = SparseSemiStructuredTensorCUTLASS if cutlass else SparseSemiStructuredTensorCUSPARSELT
    least = kind._DTYPE_SHAPE_CONSTRAINTS.get(layer.values.dtype)
    if least is None:
        return f"it does not take {layer.values.dtype}"
    if layer.out_features % least.sparse_min_rows or layer.in_features % least.sparse_min_cols:
        multiples = f"{least.sparse_min_rows} and inputs in multiples of {least.sparse_min_cols}"
        return f"it takes outputs in multiples of {multiples}"
    return None


BACKENDS: dict[str, Backend] = {
    "compressed": Backend(_compressed, _refuse_compressed),
    "mma.sp": Backend(_mma_sp, _refuse_mma_sp, layout="fragments"),
    "semi-structured": Backend(
        _semi_structured, _refuse_semi_structured, layout="rows", copy="semi-structured", backward=False
    ),
    "decompress": Backend(_decompress, _no_gpu, backward=False),
    "dense": Backend(_dense, lambda layer: None, copy="dense"),
}


def default_plan(layer: SparseLinear, prefer: Prefer = "speed") -> Plan:
    """The plan without measurements, from the bounds in docs/kernels.md.

    On the CPU the compressed weight is kept, and dense while it is multiplied: that saves memory and takes longer.
    On a GPU, 2:4 runs on sparse tensor cores where they take the shape. Every other weight is streamed compressed up
    to `STREAMING_TOKENS` tokens; beyond, its dense copy is kept for speed, or made at each use to save memory.
    """
    if not layer.values.is_cuda:
        return Plan("rows", ((None, "compressed"),))
    if BACKENDS["mma.sp"].refuses(layer) is None:
        return Plan("fragments", ((None, "mma.sp"),))
    many = (None, "dense" if prefer == "speed" else "decompress")
    streams = BACKENDS["compressed"].refuses(layer) is None
    return Plan("rows", ((STREAMING_TOKENS, "compressed"), many) if streams else (many,))


def candidates(layer: SparseLinear, rank: int = 0) -> dict[str, str | None]:
    """Every backend, with why it cannot run the layer or None."""
    too_large = f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else None
    found: dict[str, Any] = {name: backend.refuses(layer) for name, backend in BACKENDS.items()}
    for name in ("compressed", "mma.sp"):
        found[name] = found[name] or too_large
    return found
