"""The OBS update of one block of columns: a pruned weight is made up for by the columns that follow it in its row.

    for each column j of the block, from left to right, in every row i:
        q[i, j]     = w[i, j] if mask[i, j] else 0
        e[i, j]     = (w[i, j] - q[i, j]) * (1 / U[j, j])
        w[i, j+1:] -= e[i, j] * U[j, j+1:]

W [rows, block] fp32; U [block, block] fp32 is a diagonal block of the upper Cholesky factor of the inverse Hessian,
UᵀU = H⁻¹. The columns after the block need what it lost, too: that is one matrix product, ``W[:, after] -= e @
U[block, after]``, which is left to the caller. Source: SparseGPT (Frantar and Alistarh 2023,
https://arxiv.org/abs/2301.00774, sections 3.2 to 3.4 and algorithm 1); Optimal Brain Surgeon (Hassibi and Stork 1993).

The mask is given, or n of every m consecutive columns are chosen: at a column j that begins a group, the n with the
greatest ``|w[i, k]| * (1 / U[k, k])``, k = j .. j + m - 1, of the weights as updated so far. That orders as the loss
w² / U² does, and its square can neither overflow nor make ties. Equal scores: the lower column is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trisparse.kernels.nm import check_nm
from trisparse.kernels.score import check_inner, check_writable

MAX_BLOCK = 128  # columns


def obs_block_ref(
    weight: Tensor, factor: Tensor, mask: Tensor | None = None, n: int | None = None, m: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `obs_block`: the loop over columns of the module's docstring, in any float dtype."""
    w = weight.clone()
    errors = torch.empty_like(w)
    chosen = torch.zeros(w.shape, dtype=torch.bool, device=w.device) if mask is None else mask
    scale = 1 / factor.diagonal()
    for j in range(w.shape[1]):
        if n is not None and m is not None and j % m == 0:
            scores = w[:, j : j + m].abs() * scale[j : j + m]
            order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :n]
            chosen[:, j : j + m].scatter_(1, order, True)
        kept = torch.where(chosen[:, j], w[:, j], 0)
        errors[:, j] = (w[:, j] - kept) * scale[j]
        w[:, j + 1 :] -= errors[:, j, None] * factor[None, j, j + 1 :]
        w[:, j] = kept
    return w, errors, chosen


def obs_block(
    weight: Tensor,
    factor: Tensor,
    mask: Tensor | None = None,
    n: int | None = None,
    m: int | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune one block of columns and update what it keeps; what the columns after it lose is in ``errors``.

    Args:
        weight: [rows, block] fp32, the inner dimension contiguous, of at most 128 columns. It and ``factor`` must be
            finite; neither is looked through for a NaN here, once for each block of a weight.
        factor: [block, block] fp32, upper triangular with a positive diagonal, the inner dimension contiguous: the
            diagonal block of U for these columns, UᵀU = H⁻¹. What lies below the diagonal is not read.
        mask: [rows, block] bool, True = kept; None to choose n:m.
        n: how many to keep of each group, 1 <= n < m, where ``mask`` is None.
        m: the size of a group, at most 32; the block is a multiple of it.
        in_place: write the new weights to ``weight``, which may be a slice of columns of a larger one.

    Returns:
        (the new weights [rows, block] fp32, 0 where pruned; errors [rows, block] fp32, e of the module's docstring;
        the mask [rows, block] bool, which is ``mask`` itself where that was given).

    Raises:
        ValueError: a wrong shape, dtype, stride or device, more than 128 columns, both a mask and n:m or neither.
    """
    _check(weight, factor, mask, n, m, in_place)
    updated, errors, chosen = obs_block_ref(weight, factor, mask, n, m)
    return (weight.copy_(updated) if in_place else updated), errors, chosen


def _check(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int | None, m: int | None, in_place: bool) -> None:
    if weight.dtype != torch.float32 or weight.dim() != 2:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be torch.float32 [rows, block]")
    block = weight.shape[1]
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"weight has {block} columns; a block has 1..{MAX_BLOCK}")
    check_inner(weight, "weight")
    if in_place:
        check_writable(weight, "weight")
    if factor.dtype != torch.float32 or tuple(factor.shape) != (block, block):
        raise ValueError(f"factor is {factor.dtype} {tuple(factor.shape)}; it must be torch.float32 {(block, block)}")
    check_inner(factor, "factor")
    if mask is None:
        if n is None or m is None:
            raise ValueError(f"mask is None and n:m is {n}:{m}; one of them must be given")
        check_nm(n, m, block)
    else:
        if n is not None or m is not None:
            raise ValueError(f"mask is given and n:m is {n}:{m}; only one of them may be")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool {tuple(weight.shape)}")
        check_inner(mask, "mask")
    for name, tensor in (("factor", factor), ("mask", mask)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the weight's device, {weight.device}")
