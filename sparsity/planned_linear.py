"""A compressed layer as one node of a graph: the plan's backend is chosen when it runs, not when it is traced.

torch.compile traces a layer once for any number of tokens. It guards the branch that a plan took, and compiles again
beyond; an engine that drops such guards, as vLLM does, would keep the backend of the tokens that it traced with.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.linear import linear
from trisparse.kernels.linear24 import linear24
from trisparse.kernels.operation import Operation
from trisparse.sparsity.linear import SparseLinear


def planned_linear(layer: SparseLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias by what the plan of ``layer`` names for the tokens of x; it has no gradient.

    Args:
        layer: its own bias is not added. Its plan must not name torch's "semi-structured".
        x: [..., in] of the weight's dtype.
        bias: [out], or None.

    Returns:
        y [..., out].

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a plan with "semi-structured".
    """
    steps = layer.plan.steps
    y = _PLANNED(
        x.reshape(-1, layer.in_features),
        layer.values,
        layer.positions,
        layer.row_offsets,
        layer.tile_offsets,
        layer.dense,
        bias,
        layer.format,
        layer.layout,
        layer.out_features,
        layer.n,
        layer.m,
        [most for most, _ in steps if most is not None],
        ",".join([name for _, name in steps]),
    )
    return y.reshape(*x.shape[:-1], layer.out_features)


def _run(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    row_offsets: Tensor | None,
    tile_offsets: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    format: str,
    layout: str,
    rows: int,
    n: int,
    m: int,
    limits: list[int],
    names: str,
) -> Tensor:
    step = sum(x.shape[0] > most for most in limits)  # limits ascend
    name = names.split(",")[step]
    if name == "mma.sp":
        return linear24(x, values, positions, bias)
    if name == "dense" and dense is not None:
        return F.linear(x, dense, bias)
    if layout != "rows" or name not in ("compressed", "decompress"):
        raise ValueError(f"the plan names {name!r}, which cannot run from weights in layout {layout!r}")
    weight = CompressedWeight(format, (rows, x.shape[1]), n, m, values, positions, row_offsets, tile_offsets)
    return linear(x, weight, bias) if name == "compressed" else F.linear(x, weight.decompress(), bias)


_PLANNED = Operation(
    "planned_linear",
    _run,
    lambda x, values, positions, row_offsets, tile_offsets, dense, bias, format, layout, rows, n, m, limits, names: (
        x.new_empty(x.shape[0], rows)
    ),
)
