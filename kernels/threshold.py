"""Global selection: keep exactly the k greatest scores over all tensors together.

    mask_t[i, j] = (score_t[i, j] is among the k greatest of all tensors),  score_t = |W_t| * X_t or W_t * X_t

W_t [rows_t, cols_t], X_t [cols_t] -> mask_t [rows_t, cols_t] bool. Equal scores: the earlier tensor, then
the lower flat index, is kept. One tensor: PERP's layer-wide magnitude threshold (Zimmer et al. 2023,
https://arxiv.org/abs/2312.15230, section 4); many: the global criterion of vision (Han et al. 2015,
https://arxiv.org/abs/1506.02626).

On the CPU the weights are read twice and never sorted: a fixed random sample brackets the k-th score, the
first read counts what lies beyond the bracket and collects what lies inside (about 2%), the second writes
the masks. The bracket is checked by those counts, so that a sample, however unlucky, costs one more read but
never a wrong mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trisparse.kernels.bitmask import empty_mask, pack_bits
from trisparse.kernels.launch import by_kernel
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import (
    Chunks,
    Keys,
    check_budget,
    check_disjoint,
    check_out,
    check_weight,
    check_writable,
    check_x,
    checked_score_ref,
    run_chunks,
    score_form,
)

_SAMPLES = 1 << 16  # the k-th score's place in the sample has a standard deviation of at most half of 2^8
_MARGIN = 5 * (1 << 7)  # ... so five deviations, 1% of the sample, on each side

Span = tuple[int, int, int]  # tensor, first row, end row


def _checked(weights: Sequence[Tensor], xs: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    """The ``xs``, one per weight, after the checks that both routes share."""
    if isinstance(weights, Tensor):
        raise ValueError("weights is a Tensor; it must be a sequence of 2-D tensors: pass [weight]")
    vectors: list[Tensor | None] = [None] * len(weights) if xs is None else list(xs)
    if len(vectors) != len(weights):
        raise ValueError(f"xs has {len(vectors)} entries; it must have one per weight, {len(weights)}")
    for i, (weight, x) in enumerate(zip(weights, vectors, strict=True)):
        check_weight(weight, f"weights[{i}]")
        check_x(x, weight, f"xs[{i}]")
        if weight.device != weights[0].device:
            raise ValueError(f"weights[{i}] is on {weight.device}; all must be on {weights[0].device}")
    return vectors


def select_global_ref(
    weights: Sequence[Tensor], k: int, *, xs: Sequence[Tensor | None] | None = None, absolute: bool = True
) -> list[Tensor]:
    """The specification of `select_global`: a stable descending sort of all scores, concatenated."""
    vectors = _checked(weights, xs)
    check_budget(k, sum(weight.numel() for weight in weights), "all elements of weights")
    if not weights:
        return []
    scores = [
        checked_score_ref(weight, x, absolute, f"weights[{i}]", f"xs[{i}]").reshape(-1)
        for i, (weight, x) in enumerate(zip(weights, vectors, strict=True))
    ]
    score = torch.cat(scores)
    order = torch.sort(score, descending=True, stable=True).indices[:k]
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    mask[order] = True
    parts = torch.split(mask, [weight.numel() for weight in weights])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def select_global(
    weights: Sequence[Tensor],
    k: int,
    *,
    xs: Sequence[Tensor | None] | None = None,
    absolute: bool = True,
    out: str = "mask",
    apply: bool = False,
) -> list[Tensor]:
    """Keep exactly the ``k`` greatest scores over all ``weights``; ties go by (tensor order, flat index).

    Args:
        weights: 2-D tensors of fp32, fp16, bf16 or fp64 (mixed if so wished), on one device, each with a
            contiguous inner dimension.
        k: how many to keep in all, 0 <= k <= the sum of the sizes.
        xs: None, or for each weight None or [cols] of a float dtype; the score is multiplied by it in fp32.
        absolute: rank by ``|weight|``; False ranks by ``weight`` itself, which then is the score.
        out: "mask", or "packed" for the packed bits of kernels/bitmask.py.
        apply: also zero the others in ``weights``, in place.

    Returns:
        For each weight, its mask, bool [rows, cols] with True = kept, or its packed mask.

    Raises:
        ValueError: a wrong dtype, shape, stride, device, ``k`` or ``out``, lists of unequal length, or
            a NaN score; with ``apply`` also rows, weights or xs that share memory with a weight.
    """
    vectors = _checked(weights, xs)
    total = sum(weight.numel() for weight in weights)
    check_budget(k, total, "all elements of weights")
    check_out(out, ("mask", "packed"))
    if apply:
        for i, weight in enumerate(weights):
            check_writable(weight, f"weights[{i}]")
    if not weights:
        return []
    parts = [weight.detach() for weight in weights]
    vectors = [None if x is None else x.detach() for x in vectors]
    if not apply:
        return _FUNCTIONAL(parts, k, vectors, absolute, out)
    masks = _result(parts, k, vectors, absolute, out)
    _IN_PLACE(parts, masks, k, vectors, absolute, out)
    return masks


def _run(weights: Sequence[Tensor], k: int, xs: Sequence[Tensor | None], absolute: bool, out: str) -> list[Tensor]:
    return _select(weights, k, xs, absolute, out, apply=False)


def _run_in_place(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: int,
    xs: Sequence[Tensor | None],
    absolute: bool,
    out: str,
) -> None:
    written = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    check_disjoint(written, {f"xs[{i}]": x for i, x in enumerate(xs)})
    for mask, selected in zip(masks, _select(weights, k, xs, absolute, out, apply=True), strict=True):
        mask.copy_(selected)


def _result(weights: Sequence[Tensor], k: int, xs: Sequence[Tensor | None], absolute: bool, out: str) -> list[Tensor]:
    return [empty_mask(weight, out) for weight in weights]


_FUNCTIONAL = Operation("select_global", _run, _result, reads_back=True)
# The masks are an argument, since torch functionalises no operation that both mutates and returns a list.
_IN_PLACE = Operation(
    "select_global_",
    _run_in_place,
    lambda weights, masks, k, xs, absolute, out: None,
    mutates=("weights", "masks"),
    reads_back=True,
)


def _select(
    weights: Sequence[Tensor], k: int, xs: Sequence[Tensor | None], absolute: bool, out: str, apply: bool
) -> list[Tensor]:
    total = sum(weight.numel() for weight in weights)
    if not total:
        masks = [empty_mask(weight, "mask") for weight in weights]
    elif by_kernel(weights[0]) and all(weight.dtype != torch.float64 for weight in weights):
        from trisparse.kernels.threshold_triton import select_global_triton  # Triton is there on Linux only

        return select_global_triton(weights, k, xs, absolute, out=out, zero=apply)
    elif weights[0].device.type == "cpu":
        masks = _select_cpu(weights, k, xs, absolute, total)
    else:
        masks = select_global_ref(weights, k, xs=xs, absolute=absolute)
    if apply:
        for weight, mask in zip(weights, masks, strict=True):
            weight.masked_fill_(~mask, 0)
    return [pack_bits(mask) for mask in masks] if out == "packed" else masks


def _select_cpu(
    weights: Sequence[Tensor], k: int, vectors: Sequence[Tensor | None], absolute: bool, total: int
) -> list[Tensor]:
    # Scores of several dtypes are ranked together in the widest form that occurs, 16-bit ones of two kinds
    # in fp32.
    forms = {score_form(weight, x) for weight, x in zip(weights, vectors, strict=True)}
    wide = torch.float64 if torch.float64 in forms else torch.float32
    form = forms.pop() if len(forms) == 1 else wide
    chunks = [
        Chunks(weight, x, absolute, f"weights[{i}]", f"xs[{i}]", form)
        for i, (weight, x) in enumerate(zip(weights, vectors, strict=True))
    ]
    masks = [torch.empty(weight.shape, dtype=torch.bool) for weight in weights]
    kept = [mask.numpy() for mask in masks]
    spans = [(i, start, stop) for i, part in enumerate(chunks) for start, stop in part.spans]
    threshold, ties = _threshold(chunks, spans, k, total)

    def write(i: int, start: int, stop: int) -> npt.NDArray[np.int32] | None:
        """Mark what passes; where only some equals are kept, return where the chunk has equals."""
        keys = chunks[i].keys(start, stop)
        if ties is None:
            np.greater_equal(keys, threshold, out=kept[i][start:stop])
            return None
        np.greater(keys, threshold, out=kept[i][start:stop])
        return np.flatnonzero(keys == threshold).astype(np.int32)

    left = ties or 0
    for (i, start, stop), places in zip(spans, run_chunks(write, spans), strict=True):
        if places is None or left <= 0:
            break
        kept[i][start:stop].reshape(-1)[places[:left]] = True
        left -= places.size
    return masks


def _threshold(chunks: list[Chunks], spans: list[Span], k: int, total: int) -> tuple[int, int | None]:
    """(key, ties): kept are the keys above ``key`` and the first ``ties`` equal to it (None: all equal)."""
    if k == 0:
        return _beyond(chunks), None
    low, high = _bracket(chunks, k, total)
    while True:
        parts = [(chunks[i], start, stop, low, high) for i, start, stop in spans]
        rounds = run_chunks(_count, parts)
        above_high, from_high, above_low, from_low = (sum(r[0][j] for r in rounds) for j in range(4))
        if k <= above_high:
            low, high = high, _beyond(chunks)
        elif k > from_low:
            low, high = -_beyond(chunks), low
        else:
            break
    if k <= from_high:
        key, above, equal = high, above_high, from_high - above_high
    elif k > above_low:
        key, above, equal = low, above_low, from_low - above_low
    else:
        inside = np.concatenate([r[1] for r in rounds])
        place = inside.size - (k - from_high)
        key = int(np.partition(inside, place)[place])
        above = from_high + int(np.count_nonzero(inside > key))
        equal = int(np.count_nonzero(inside == key))
    return key, None if k - above == equal else k - above


def _count(part: Chunks, start: int, stop: int, low: int, high: int) -> tuple[list[int], Keys]:
    """How many keys are > high, >= high, > low and >= low; and the keys strictly between low and high."""
    keys = part.keys(start, stop)
    from_high, above_low = keys >= high, keys > low
    inside = keys[above_low > from_high]
    counts = (keys > high, from_high, above_low, keys >= low)
    return [int(np.count_nonzero(c)) for c in counts], inside


def _beyond(chunks: list[Chunks]) -> int:
    """A key above every number's; its negative is below every number's."""
    return chunks[0].infinity + 1


def _bracket(chunks: list[Chunks], k: int, total: int) -> tuple[int, int]:
    """(low, high), keys that very probably hold the k-th greatest between them."""
    beyond = _beyond(chunks)
    if total <= 4 * _SAMPLES:
        return -beyond, beyond
    generator = np.random.default_rng(0)  # random places: a stride could fall in step with the columns
    parts = []
    for part in chunks:
        size = part.shape[0] * part.shape[1]
        flat = generator.integers(0, max(size, 1), size=-(-_SAMPLES * size // total))
        parts.append(part.keys_at(flat // max(part.shape[1], 1), flat % max(part.shape[1], 1)))
    sample = np.sort(np.concatenate(parts))
    place = sample.size - round(sample.size * (k / total))
    low, high = place - _MARGIN, place + _MARGIN
    return (
        -beyond if low < 0 else int(sample[low]),
        beyond if high >= sample.size else int(sample[high]),
    )
