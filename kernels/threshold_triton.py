"""Global selection by Triton kernels: the search; the operation and its reference are in kernels/threshold.py.

The weights are read twice (kernels/threshold_reads_triton.py), ties or not, and neither copied nor sorted:

1. A fixed random sample brackets the k-th score. `bracket_kernel` counts, for each program, the scores above
   the bracket, at its two ends and inside it, and collects those inside: about 2% of all. The counts tell
   whether the k-th score lies at an end or inside; in the latter case it is looked for among the collected
   ones in the same way, until so few are left that the sample's own sort takes them.
2. Where only some of the scores equal to the k-th are kept, the equal ones of each program are known from
   its counts, or from its part of the collected scores. So all programs before a certain one keep theirs, all
   after it drop them, and that one alone ranks them. `write_kernel` writes the mask or its bits, and zeroes the weight.

The counts check the bracket: a sample that missed costs one more read, never a wrong mask. A radix histogram
would read once more (its first read finds only the bin of the k-th score), and would place every element by a
shared-memory atomic or some 20 instructions of ballots, where here 98% take four comparisons. The ends are
counted apart because scores that occur often (16-bit or quantised weights, zeros) end up there: what is left
inside is small whatever the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from trisparse.kernels.metric_triton import MetricInputs
from trisparse.kernels.score import nan_error, score_ref
from trisparse.kernels.threshold_reads_triton import Part, bracket_kernel, write_kernel

_SAMPLES = 1 << 16
_MARGIN = 5 * (1 << 7)  # five standard deviations of the k-th score's place in the sample
_DRAWS = 3  # samples that may miss before the bracket is opened wide


def select_global_triton(
    weights: Sequence[Tensor],
    k: int,
    vectors: Sequence[Tensor | None],
    absolute: bool,
    out: str,
    zero: bool,
    metrics: Sequence[MetricInputs] | None = None,
) -> list[Tensor]:
    """The masks (``out`` "mask") or their packed bits ("packed") of checked, not all empty weights."""
    packed = out == "packed"
    scored = [None] * len(weights) if metrics is None else metrics
    parts = [Part(weight, x, packed, m) for weight, x, m in zip(weights, vectors, scored, strict=True)]
    threshold, cut = _threshold(parts, k, absolute)
    outputs, first = [], 0
    for weight, part in zip(weights, parts, strict=True):
        shape = (weight.shape[0], triton.cdiv(weight.shape[1], 8) if packed else weight.shape[1])
        output = torch.empty(shape, dtype=torch.uint8 if packed else torch.bool, device=weight.device)
        written = output.view(torch.uint8)
        part.launch(
            write_kernel, threshold, cut, written, first, no_x=threshold, absolute=absolute, ZERO=zero, PACKED=packed
        )
        outputs.append(output)
        first += part.programs
    return outputs


def _threshold(parts: list[Part], k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """(the k-th score and the next greater fp32, [2] fp32; the cut, [2] int64) as `write_kernel` takes them."""
    read = _read(parts, k, absolute)
    device = read.bracket.device
    if k == 0 or device.type == "meta":  # above NaN is nothing; a meta tensor only stands for its shape
        return torch.full((2,), torch.nan, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    rank = k - read.above - read.at_high  # among the scores inside
    if rank <= 0:
        value, equal, kept = read.bracket[1:], read.counts[1], torch.tensor([k - read.above], device=device)
    elif rank > read.inside.numel():
        value, equal = read.bracket[:1], read.counts[0]
        kept = torch.tensor([rank - read.inside.numel()], device=device)
    else:
        value = _kth(read.inside, rank)
        kept = rank - (read.inside > value).sum(0, keepdim=True)
        # A program's scores lie together in `inside`.
        ends = torch.zeros(read.inside.numel() + 1, dtype=torch.int32, device=device)
        torch.cumsum(read.inside == value, 0, dtype=torch.int32, out=ends[1:])
        equal = ends[read.starts + read.counts[3]] - ends[read.starts]
    upto = equal.cumsum(0)
    program = torch.searchsorted(upto, kept)
    beyond = torch.nextafter(value, torch.full_like(value, torch.inf)).masked_fill_(value == torch.inf, torch.nan)
    return torch.cat([value, beyond]), torch.cat([program, kept - (upto - equal)[program]])


def _kth(scores: Tensor, k: int) -> Tensor:
    """The k-th greatest of fp32 scores [n], as [1]. Few are sorted: no more than four samples."""
    while scores.numel() > 4 * _SAMPLES:
        read = _read([Part(scores[None], None, False)], k, False)
        rank = k - read.above - read.at_high
        if rank <= 0:
            return read.bracket[1:]
        if rank > read.inside.numel():
            return read.bracket[:1]
        if 2 * read.inside.numel() > scores.numel():  # all samples missed: without end, should that go on
            break
        scores, k = read.inside, rank
    return scores.sort(descending=True).values[k - 1 : k]


@dataclass
class _Read:
    """What a read counted against a bracket that holds the k-th score.

    Attributes:
        bracket: [2] fp32, low and high.
        counts: [5, programs] int32, starts: [programs] int64; as `bracket_kernel` writes them.
        inside: fp32, all scores strictly between low and high, each program's together.
        above, at_high: how many scores are above high, and equal to it.
    """

    bracket: Tensor
    counts: Tensor
    starts: Tensor
    inside: Tensor
    above: int = 0
    at_high: int = 0


def _read(parts: list[Part], k: int, absolute: bool) -> _Read:
    """Read the parts until the bracket holds the k-th score: once, unless a sample misses.

    Raises:
        ValueError: a score is a NaN.
    """
    device = parts[0].weight.device
    total = sum(part.weight.numel() for part in parts)
    least, greatest = torch.tensor([[-torch.inf], [torch.inf]], device=device)  # what the counts have shown so far
    capacity = total if total <= 4 * _SAMPLES else total // 32
    draws, bracket = 0, None
    while True:
        if bracket is None:
            bracket = torch.cat([least, greatest])
            if total > 4 * _SAMPLES and draws < _DRAWS and device.type != "meta":
                low, high = _bracket(parts, k, total, absolute, seed=draws)
                low = torch.maximum(low, least)
                bracket = torch.cat([low, torch.maximum(torch.minimum(high, greatest), low)])
            draws += 1
        read = _count(parts, bracket, capacity, absolute)
        if device.type == "meta":  # compiling only: nothing was counted
            return read
        at_low, at_high, above, inside, nans = read.counts.sum(1).tolist()
        if nans:
            _raise_nan(parts, int(read.counts[4].nonzero()[0, 0]))
        read.above, read.at_high = above, at_high
        from_low = above + at_high + inside + at_low
        if 0 < k <= above:
            least, bracket = bracket[1:], None
        elif k > from_low:
            greatest, bracket = bracket[:1], None
        elif 0 < k - above - at_high <= inside and inside > capacity:
            capacity = inside
        else:
            read.inside = read.inside[:inside]
            return read


def _count(parts: list[Part], bracket: Tensor, capacity: int, absolute: bool) -> _Read:
    """One read of all parts."""
    device, programs = bracket.device, sum(part.programs for part in parts)
    counts = torch.empty(5, programs, dtype=torch.int32, device=device)
    starts = torch.zeros(programs, dtype=torch.int64, device=device)
    inside = torch.empty(capacity, dtype=torch.float32, device=device)
    cursor = torch.zeros(1, dtype=torch.int64, device=device)
    first = 0
    for part in parts:
        buffers = (bracket, counts, starts, inside, cursor, capacity, first, programs)
        vector = 16 // part.weight.element_size()
        part.launch(bracket_kernel, *buffers, no_x=bracket, absolute=absolute, VECTOR=vector)
        first += part.programs
    return _Read(bracket, counts, starts, inside)


def _raise_nan(parts: list[Part], program: int) -> None:
    for number, part in enumerate(parts):
        if program < part.programs:
            if part.metric is not None:
                raise nan_error(f"{part.metric.text} of weights[{number}]", "", None)
            raise nan_error(f"weights[{number}]", f"xs[{number}]", part.x)
        program -= part.programs


def _bracket(parts: list[Part], k: int, total: int, absolute: bool, seed: int) -> tuple[Tensor, Tensor]:
    """(low, high), [1] fp32 each: scores that very probably hold the k-th greatest between them."""
    device = parts[0].weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    samples = []
    for part in parts:
        rows, cols = part.weight.shape
        size = (-(-_SAMPLES * part.weight.numel() // total),)
        if not size[0]:
            continue
        row = torch.randint(0, rows, size, generator=generator, device=device)
        col = torch.randint(0, cols, size, generator=generator, device=device)
        if part.metric is None:
            samples.append(score_ref(part.weight[row, col], None if part.x is None else part.x[col], absolute))
        else:
            samples.append(part.metric.scores_at(row, col))
    sample = torch.cat(samples).sort().values
    place = sample.shape[0] - round(sample.shape[0] * (k / total))
    low, high = place - _MARGIN, place + _MARGIN
    infinity = torch.full_like(sample[:1], torch.inf)
    return (
        -infinity if low < 0 else sample[low : low + 1],
        infinity if high >= sample.shape[0] else sample[high : high + 1],
    )
