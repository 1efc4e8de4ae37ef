"""Masks from the zeros of a dense checkpoint that somebody else pruned.

A mask is never inferred without being asked for: a weight that is zero may be a kept one. What is inferred here is what
most published models need, whose makers saved zeros and nothing else: the pattern that each weight's zeros have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.kernels.bitmask import count_bits, pack_bits
from trisparse.sparsity.mask import Mask, attach, masks
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured, kept_of
from trisparse.sparsity.targets import find_targets

MIN_SPARSITY = 0.05  # below this share, zeros are taken for weights that happen to be zero
_TOLERANCE = 0.01  # share of the kept weights that may be zero where a pattern holds otherwise
_SAMPLE = 64  # rows that rule out most patterns before all rows are read


@dataclass(frozen=True)
class RecoveredWeight:
    """What the zeros of one weight say.

    Attributes:
        name, shape: of the parameter.
        pattern: that its zeros have; None where it is taken for dense.
        kept: weights that the mask keeps; all of them without a mask.
        zeros: weights that are zero.
        note: why there is no mask although there are zeros, or which zeros are kept; or empty.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    kept: int
    zeros: int
    note: str = ""

    @property
    def total(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python objects."""
        return asdict(self)


def recover_masks(
    model: nn.Module,
    *,
    min_sparsity: float = MIN_SPARSITY,
    include: str | Sequence[str] | None = "*",
    exclude: str | Sequence[str] | None = None,
) -> list[RecoveredWeight]:
    """Attach masks to the weights of ``model`` whose zeros have a pattern, in place.

    Every weight that can be pruned is looked at (Linear, Conv, Conv1D, fused experts, also outside of the repeated
    blocks); embeddings, and heads tied to one, are not. Of each, :func:`zero_pattern` says what its zeros are.

    Args:
        model: a dense model without masks.
        min_sparsity: in (0, 1]: below this share of zeros a weight is taken for dense.
        include, exclude: shell-style patterns of parameter or module names, as of ``sparsify``.

    Returns:
        A row for each weight that was looked at.

    Raises:
        ValueError: ``model`` has masks already, ``min_sparsity`` is out of range, or no weight has enough zeros.
    """
    check_min_sparsity(min_sparsity)
    if masks(model):
        raise ValueError("model has masks already: they say more than its zeros do")
    rows, found = [], []
    for target in find_targets(model, include=include, exclude=exclude).found:
        alive = target.matrix() != 0
        pattern, keep, note = zero_pattern(alive, min_sparsity)
        zeros = alive.numel() - int(alive.count_nonzero())
        kept = alive.numel()
        if pattern is not None:
            mask = Mask.from_matrix(keep, target.weight.shape, pattern, transposed=target.transposed)
            found.append((target, mask))
            kept = mask.kept
        named = None if pattern is None else str(pattern)
        rows.append(RecoveredWeight(target.name, tuple(target.weight.shape), named, kept, zeros, note))
    if not found:
        most = max(rows, key=lambda row: row.zeros / row.total)
        raise ValueError(
            f"no weight of the model has {min_sparsity:.0%} zeros or more: {most.name} has most, "
            f"{most.zeros / most.total:.2%}; a model that was saved without zeros cannot tell what was pruned"
        )
    for target, mask in found:
        attach(target.module, target.param, mask, zero=False)
    return rows


def check_min_sparsity(min_sparsity: float) -> None:
    """Raise a ValueError unless ``min_sparsity`` is in (0, 1]."""
    if not 0 < min_sparsity <= 1:
        raise ValueError(f"min_sparsity must be in (0, 1], got {min_sparsity!r}")


def zero_pattern(alive: Tensor, min_sparsity: float = MIN_SPARSITY) -> tuple[Pattern | None, Tensor, str]:
    """The pattern of the zeros of one matrix.

    Tried in this order: rows that are wholly zero while the others are full; n:m for the smallest m that divides the
    columns, if no group keeps more than n; single weights. The first two bear kept weights that are zero, up to 1% of
    those kept, as small weights become in fp16: an n:m mask keeps as many of the group's zeros, from its lower end,
    and a mask of rows keeps those inside of kept rows.

    Args:
        alive: bool [rows, cols], True where the weight is not zero.
        min_sparsity: below this share of zeros there is no pattern.

    Returns:
        The pattern or None, the mask bool [rows, cols] (``alive`` itself where there is none), and a note or "".
    """
    total, kept = alive.numel(), int(alive.count_nonzero())
    if (total - kept) < min_sparsity * total or total == kept:
        return None, alive, ""
    if kept == 0:
        return None, alive, "all zero: which of them were kept cannot be told"
    return _as_rows(alive, kept) or _as_groups(alive, kept) or (_unstructured(alive, kept), alive, "")


def nm_pattern(keep: Tensor) -> NM | None:
    """The n:m pattern with the smallest m that the bool matrix ``keep`` [rows, cols] has in every group, or None."""
    found = _as_groups(keep, int(keep.count_nonzero()), tolerance=0.0)
    return None if found is None else found[0]


def _as_rows(alive: Tensor, kept: int) -> tuple[Rows, Tensor, str] | None:
    filled = alive.any(1)
    rows, full = filled.numel(), int(filled.sum())
    if full == rows or kept < (1 - _TOLERANCE) * full * alive.shape[1]:
        return None
    return Rows(1 - full / rows), filled[:, None].expand_as(alive), _zeros_kept(full * alive.shape[1] - kept)


def _as_groups(alive: Tensor, kept: int, tolerance: float = _TOLERANCE) -> tuple[NM, Tensor, str] | None:
    cols = alive.shape[1]
    for m in range(2, 33):
        if cols % m or bool(_counts(alive[:_SAMPLE], m).eq(m).any()):
            continue
        counts = _counts(alive, m)
        n = int(counts.max())
        lacking = counts.numel() * n - kept
        if n < m and lacking <= tolerance * counts.numel() * n:
            return NM(n, m), _filled_groups(alive, counts, n, m) if lacking else alive, _zeros_kept(lacking)
    return None


def _counts(alive: Tensor, m: int) -> Tensor:
    """Kept weights of every group of ``m``: [rows · cols / m]."""
    return alive.reshape(-1, m).sum(1, dtype=torch.uint8)


def _filled_groups(alive: Tensor, counts: Tensor, n: int, m: int) -> Tensor:
    """``alive`` with the first zeros of every group that has fewer than ``n`` alive, so that each keeps n."""
    groups = alive.reshape(-1, m).clone()
    short = (counts < n).nonzero()[:, 0]
    zero = ~groups[short]
    wanted = (n - counts[short].to(torch.int64))[:, None]
    groups[short] |= zero & (zero.cumsum(1) <= wanted)
    return groups.view_as(alive)


def _unstructured(alive: Tensor, kept: int) -> Unstructured:
    of_row = count_bits(pack_bits(alive.contiguous()))
    rows, cols = alive.shape
    if bool((of_row == of_row[0]).all()):
        even = Unstructured(1 - kept / alive.numel())
        if kept_of(cols, even.sparsity) * rows == kept:
            return even
    return Unstructured(1 - kept / alive.numel(), scope="layer")


def _zeros_kept(count: int) -> str:
    return f"{count:,} zeros are kept weights" if count else ""
