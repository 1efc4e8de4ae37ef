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

Stored by columns, a column is contiguous, and both routes run over columns: the CPU's over all rows at once, in steps
of whole arrays, and the kernel's (kernels/obs_triton.py) over a tile of rows.

On the CPU a column's errors go to the rest of a sub-block of 8 columns at once, those of the sub-block to the rest of
32 columns, and those of the 32 to the rest of the block, both by a matrix product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trisparse.kernels.launch import by_kernel
from trisparse.kernels.nm import check_nm
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import check_inner, check_writable

MAX_BLOCK = 128  # columns
_SUB_BLOCK, _SUPER_BLOCK = 8, 32  # columns, on the CPU; the least of its time at 576 to 4096 rows
_KERNEL_M = 16  # the kernel unrolls all comparisons of a group, 496 for 32: it compiled for minutes without an end

Array = npt.NDArray[Any]


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
        weight: [rows, block] fp32 of at most 128 columns, stored by rows (the inner dimension contiguous) or by columns
            (the outer one, as of ``other.t()``), which is faster; it may be a slice of a larger one. It and ``factor``
            must be finite; neither is looked through for a NaN here, once for each block of a weight.
        factor: [block, block] fp32, upper triangular with a positive diagonal, the inner dimension contiguous: the
            diagonal block of U for these columns, UᵀU = H⁻¹. What lies below the diagonal is not read.
        mask: [rows, block] bool, True = kept, stored by rows or by columns; None to choose n:m.
        n: how many to keep of each group, 1 <= n < m, where ``mask`` is None.
        m: the size of a group, at most 32; the block is a multiple of it. On a device, more than 16 take the reference.
        in_place: write the new weights to ``weight``.

    Returns:
        (the new weights [rows, block] fp32, 0 where pruned, stored as ``weight`` is; errors [rows, block] fp32, e of
        the module's docstring, stored by columns; the mask [rows, block] bool, which is ``mask`` itself where that was
        given, and else stored by columns).

    Raises:
        ValueError: a wrong shape, dtype, stride or device, more than 128 columns, both a mask and n:m or neither.
    """
    _check(weight, factor, mask, n, m, in_place)
    arguments = weight.detach(), factor.detach(), mask, n or 0, m or 0
    if in_place:
        updated, (errors, chosen) = weight, _IN_PLACE(*arguments)
    else:
        updated, errors, chosen = _FUNCTIONAL(*arguments)
    return updated, errors, chosen if mask is None else mask


def _run(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    updated, errors, chosen = _result(weight, factor, mask, n, m)
    _update(weight, factor, mask, n, m, updated, errors, chosen)
    return updated, errors, chosen


def _run_in_place(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    errors, chosen = _result_in_place(weight, factor, mask, n, m)
    _update(weight, factor, mask, n, m, weight, errors, chosen)
    return errors, chosen


def _result(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, block = weight.shape
    by_rows = weight.stride(1) == 1
    updated = weight.new_empty(rows, block) if by_rows else weight.new_empty(block, rows).t()
    return updated, *_result_in_place(weight, factor, mask, n, m)


def _result_in_place(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Errors, and the mask: with no columns where it is given, since an operation must not return its argument."""
    rows, block = weight.shape
    chosen = weight.new_empty(block if mask is None else 0, rows, dtype=torch.bool)
    return weight.new_empty(block, rows).t(), chosen.t()


_FUNCTIONAL = Operation("obs_block", _run, _result)
_IN_PLACE = Operation("obs_block_", _run_in_place, _result_in_place, mutates=("weight",))


def _update(
    weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int, updated: Tensor, errors: Tensor, chosen: Tensor
) -> None:
    """Fill ``updated`` (which may be ``weight``), ``errors`` and, without a mask, ``chosen``."""
    if by_kernel(weight) and m <= _KERNEL_M:
        from trisparse.kernels.obs_triton import obs_block_triton  # Triton is there on Linux only

        obs_block_triton(weight, factor, mask, n, m, updated, errors, chosen)
    elif weight.device.type == "cpu":
        _update_cpu(weight, factor, mask, n, m, updated, errors, chosen)
    else:
        new, lost, kept = obs_block_ref(weight, factor, mask, n or None, m or None)
        updated.copy_(new)
        errors.copy_(lost)
        if mask is None:
            chosen.copy_(kept)


def _update_cpu(
    weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int, updated: Tensor, errors: Tensor, chosen: Tensor
) -> None:
    rows, block = weight.shape
    columns = _by_columns(weight, updated)
    lost, ahead = errors.t(), factor.t()
    scale = (1 / factor.diagonal()).numpy()[:, None]
    keep = chosen.t() if mask is None else mask.t().contiguous()
    kept = keep.numpy()
    choice = _Choice(n, m, rows, scale) if mask is None else None
    w, e, u = columns.numpy(), lost.numpy(), factor.numpy()
    step = m * max(1, _SUB_BLOCK // m) if mask is None else _SUB_BLOCK  # whole groups
    wide = step * max(1, _SUPER_BLOCK // step)
    product = np.empty((step - 1, rows), np.float32)
    with np.errstate(all="ignore"):  # the reference does not warn of Inf, either
        for begin in range(0, block, wide):
            end = min(begin + wide, block)
            for first in range(begin, end, step):
                last = min(first + step, end)
                for j in range(first, last):
                    if choice is not None and j % m == 0:
                        choice.make(w[j : j + m], j, kept[j : j + m])
                    group = m if mask is None else last - first
                    if (j - first) % group == 0:  # of these columns the mask is known: 0 where kept, else 1 / U[j, j]
                        np.multiply(~kept[j : j + group], scale[j : j + group], out=e[j : j + group])
                    e[j] *= w[j]
                    if j + 1 < last:
                        np.multiply(u[j, j + 1 : last, None], e[j], out=product[: last - j - 1])
                        w[j + 1 : last] -= product[: last - j - 1]
                if last < end:
                    columns[last:end].addmm_(ahead[last:end, first:last], lost[first:last], alpha=-1)
            if end < block:
                columns[end:].addmm_(ahead[end:, begin:end], lost[begin:end], alpha=-1)
    # All bits of a kept weight and none of a pruned one: a product with the mask would leave -0, and is slower.
    columns.view(torch.int32).bitwise_and_(keep.to(torch.int32).neg_())
    if columns.data_ptr() != updated.data_ptr():
        updated.copy_(columns.t())


def _by_columns(weight: Tensor, updated: Tensor) -> Tensor:
    """The weight as [block, rows] with contiguous rows: in the memory of ``updated`` where that is stored so."""
    if updated.stride(0) != 1:
        # Contiguous first: a walk down the columns of a wide weight misses the cache with every element.
        return weight.contiguous().t().clone(memory_format=torch.contiguous_format)
    if updated is not weight:
        updated.copy_(weight)
    return updated.t()


class _Choice:
    """Chooses n:m in one group of columns at a time, for all rows at once, with its buffers."""

    def __init__(self, n: int, m: int, rows: int, scale: Array) -> None:
        self._n, self._m, self._scale = n, m, scale
        self._scores = np.empty((m, rows), np.float32)
        self._keys = self._scores.view(np.int32)
        self._before = np.empty((m, rows), np.uint8)  # how many of the group come before each
        self._follow = np.arange(m - 1, -1, -1, dtype=np.uint8)[:, None]
        self._wins = np.empty((m - 1, rows), np.bool_)

    def make(self, w: Array, first: int, kept: Array) -> None:
        """Write to ``kept`` [m, rows] which of ``w`` [m, rows], whose first column is ``first``, are kept."""
        np.multiply(w, self._scale[first : first + self._m], out=self._scores)
        self._keys &= 0x7FFFFFFF  # the bits of a magnitude order as it does
        self._before[:] = self._follow
        for d in range(1, self._m):
            wins = self._wins[: self._m - d]
            np.greater_equal(self._keys[:-d], self._keys[d:], out=wins)  # i comes before i + d
            self._before[d:] += wins.view(np.uint8)
            self._before[:-d] -= wins.view(np.uint8)
        np.less(self._before, self._n, out=kept)


def _check(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int | None, m: int | None, in_place: bool) -> None:
    if weight.dtype != torch.float32 or weight.dim() != 2:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be torch.float32 [rows, block]")
    block = weight.shape[1]
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"weight has {block} columns; a block has 1..{MAX_BLOCK}")
    _check_storage(weight, "weight")
    if in_place:
        check_writable(weight if weight.stride(1) == 1 else weight.t(), "weight")
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
        _check_storage(mask, "mask")
    for name, tensor in (("factor", factor), ("mask", mask)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the weight's device, {weight.device}")


def _check_storage(tensor: Tensor, name: str) -> None:
    if tensor.numel() and tensor.shape[0] > 1 and tensor.stride(0) != 1:
        check_inner(tensor, name)
