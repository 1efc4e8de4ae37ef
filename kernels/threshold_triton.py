# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Triton kernels of global selection; the operation and its reference are in kernels/threshold.py.

The weights are read twice, ties or not, and neither copied nor sorted:

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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.bitmask_triton import merge_bits
from trisparse.kernels.launch import launch
from trisparse.kernels.score import nan_error, score_ref
from trisparse.kernels.score_triton import max_or_nan, widen

_SAMPLES = 1 << 16
_MARGIN = 5 * (1 << 7)  # five standard deviations of the k-th score's place in the sample
_DRAWS = 3  # samples that may miss before the bracket is opened wide
_CHUNK = 1024  # columns handled at a time, 8 a thread: 16 bytes of a 16-bit weight, a byte of the packed mask
_CHUNKS = 8  # the most chunks of a program: 64 scores a thread are held

_LOW = tl.constexpr(1)  # a program's counts in one int32, 8 bits each: scores at the lower end of the bracket,
_HIGH = tl.constexpr(1 << 8)  # at its upper end,
_ABOVE = tl.constexpr(1 << 16)  # above it,
_INSIDE = tl.constexpr(1 << 24)  # strictly inside


@triton.jit
def _place(cols, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """(row, first column) of this program: CHUNKS * CHUNK columns of a row, in flat order."""
    blocks = tl.cdiv(cols, CHUNK * CHUNKS)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * (CHUNK * CHUNKS)


@triton.jit
def _score(w_ptr, x_ptr, i, left, HAS_X: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr):
    """(weights, scores) of the columns i, of which those below `left` exist, all of them if EXACT."""
    w = tl.load(w_ptr + i) if EXACT else tl.load(w_ptr + i, mask=i < left, other=0.0)
    s = widen(w)
    if ABSOLUTE:
        s = tl.abs(s)
    if HAS_X:
        s = s * (tl.load(x_ptr + i) if EXACT else tl.load(x_ptr + i, mask=i < left, other=0.0))
    return w, s


@triton.jit
def _pieces(t, N: tl.constexpr, PIECES: tl.constexpr):
    """[N] as PIECES tensors [N / PIECES], every PIECES-th element in each: a thread's vector, taken apart."""
    pieces = (t,)
    for level in tl.static_range(PIECES.bit_length() - 1):
        halves = ()
        for p in tl.static_range(len(pieces)):
            halves = halves + tl.split(tl.reshape(pieces[p], [N >> level + 1, 2]))
        pieces = halves
    return pieces


@triton.jit
def bracket_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart
    x_ptr,  # [cols] fp32 if HAS_X
    bracket_ptr,  # [2] fp32: low, high
    count_ptr,  # [5, programs] int32: scores == low, == high, > high, strictly between; whether any is a NaN
    start_ptr,  # [programs] int64: where the program's scores begin in `inside`
    inside_ptr,  # [capacity] fp32: the scores strictly between, each program's together
    cursor_ptr,  # [1] int64: how many of `inside` are taken
    capacity,
    first,  # of all tensors' programs, the first of this tensor
    programs,
    cols,
    stride_w,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Count against the bracket, and collect what is inside."""
    row, start = _place(cols, CHUNK, CHUNKS)
    w_ptr += row * stride_w + start
    x_ptr += start
    left = tl.minimum(cols - start, CHUNK * CHUNKS).to(tl.int32)
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    top = tl.zeros([CHUNK], tl.float32)
    n = tl.zeros([CHUNK // VECTOR], tl.int32)
    s = ()
    for c in tl.static_range(CHUNKS):
        i = c * CHUNK + tl.arange(0, CHUNK)
        _, s_c = _score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, EXACT)
        top = max_or_nan(top, s_c)
        if not EXACT:
            s_c = tl.where(i < left, s_c, float("nan"))
        s = s + _pieces(s_c, CHUNK, VECTOR)
    for c in tl.static_range(len(s)):
        from_low = tl.where(s[c] > low, _INSIDE, tl.where(s[c] >= low, _LOW, 0))
        n += tl.where(s[c] > high, _ABOVE, tl.where(s[c] >= high, _HIGH, from_low))
    at = tl.cumsum(n >> 24, 0) - (n >> 24)
    even, odd = tl.sum(n & 0x00FF00FF, 0), tl.sum((n >> 8) & 0x00FF00FF, 0)
    inside = odd >> 16
    count_ptr += first + tl.program_id(0)
    tl.store(count_ptr, even & 0xFFFF)
    tl.store(count_ptr + programs, odd & 0xFFFF)
    tl.store(count_ptr + 2 * programs, even >> 16)
    tl.store(count_ptr + 3 * programs, inside)
    tl.store(count_ptr + 4 * programs, tl.max((top != top).to(tl.int32), 0))
    if inside > 0:
        begin = tl.atomic_add(cursor_ptr, inside.to(tl.int64), sem="relaxed")
        tl.store(start_ptr + first + tl.program_id(0), begin)
        if begin + inside <= capacity:
            inside_ptr += begin
            for c in tl.static_range(len(s)):
                within = (s[c] > low) & (s[c] < high)
                tl.store(inside_ptr + at, s[c], mask=within)
                at += within.to(tl.int32)


@triton.jit
def write_kernel(
    w_ptr,  # [rows, cols], rows stride_w apart; zeroed in place if ZERO
    x_ptr,  # [cols] fp32 if HAS_X
    threshold_ptr,  # [2] fp32: the k-th score, and the next greater fp32
    cut_ptr,  # [2] int64: the program up to which equal scores are kept, and how many of its own
    out_ptr,  # PACKED: [rows, ceil(cols / 8)] bits; else [rows, cols] bytes 0 and 1
    first,  # of all tensors' programs, the first of this tensor
    cols,
    stride_w,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_X: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ZERO: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the mask or its bits: scores above the k-th, and the equal ones up to the cut."""
    row, start = _place(cols, CHUNK, CHUNKS)
    w_ptr += row * stride_w + start
    x_ptr += start
    left = tl.minimum(cols - start, CHUNK * CHUNKS).to(tl.int32)
    threshold, beyond = tl.load(threshold_ptr), tl.load(threshold_ptr + 1)
    cut_program, ties = tl.load(cut_ptr), tl.load(cut_ptr + 1)
    program = first + tl.program_id(0)
    cut = tl.where(program < cut_program, CHUNK * CHUNKS, -1)  # the last column whose equal score is kept
    if program == cut_program:
        before = tl.zeros([], tl.int32)
        for at in range(0, left, CHUNK):
            i = at + tl.arange(0, CHUNK)
            _, s = _score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, False)
            equal = ((s == threshold) & (i < left)).to(tl.int32)
            rank = before + tl.cumsum(equal, 0)
            cut = tl.maximum(cut, tl.max(tl.where((equal != 0) & (rank <= ties), i, -1), 0))
            before += tl.sum(equal, 0)
    if PACKED:
        out_ptr += row * tl.cdiv(cols, 8) + start // 8
    else:
        out_ptr += row * cols + start
    for c in tl.static_range(CHUNKS):
        i = c * CHUNK + tl.arange(0, CHUNK)
        w, s = _score(w_ptr, x_ptr, i, left, HAS_X, ABSOLUTE, EXACT)
        keep = s >= tl.where(i <= cut, threshold, beyond)
        if not EXACT:
            keep = keep & (i < left)
        if PACKED:
            byte = merge_bits(keep.to(tl.int32), CHUNK, 1, 8).to(tl.uint8)
            j = c * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
            tl.store(out_ptr + j, byte, mask=None if EXACT else j < tl.cdiv(left, 8))
        else:
            tl.store(out_ptr + i, keep.to(tl.uint8), mask=None if EXACT else i < left)
        if ZERO:
            tl.store(w_ptr + i, tl.where(keep, w, 0.0).to(w.dtype), mask=None if EXACT else i < left)


@dataclass
class _Part:
    """One tensor as the kernels take it.

    A contiguous one without x is a single row, so that no program is left with the end of a short row; its
    bits are then those of the rows if these end with a byte.
    """

    weight: Tensor
    x: Tensor | None
    packed: bool

    def __post_init__(self) -> None:
        self.weight = self.weight.detach()
        if self.x is not None:
            self.x = self.x.detach().to(torch.float32).contiguous()
        elif self.weight.is_contiguous() and not (self.packed and self.weight.shape[1] % 8):
            self.weight = self.weight.view(1, -1)
        rows, cols = self.weight.shape
        chunks = triton.cdiv(cols, _CHUNK)
        self.chunks = triton.cdiv(chunks, triton.cdiv(chunks, _CHUNKS)) if chunks else 1
        self.programs = rows * triton.cdiv(cols, _CHUNK * self.chunks)

    def launch(self, kernel: Any, *args: Any, no_x: Tensor, absolute: bool, **constexprs: Any) -> None:
        """Run a kernel over the tensor; ``no_x`` stands in for an x that is not there."""
        cols = self.weight.shape[1]
        launch(
            kernel,
            (self.programs,),
            self.weight,
            no_x if self.x is None else self.x,
            *args,
            cols,
            self.weight.stride(0),
            CHUNK=_CHUNK,
            CHUNKS=self.chunks,
            EXACT=cols % (_CHUNK * self.chunks) == 0,
            HAS_X=self.x is not None,
            ABSOLUTE=absolute,
            **constexprs,
        )


def select_global_triton(
    weights: Sequence[Tensor], k: int, vectors: Sequence[Tensor | None], absolute: bool, out: str, zero: bool
) -> list[Tensor]:
    """The masks (``out`` "mask") or their packed bits ("packed") of checked, not all empty weights."""
    packed = out == "packed"
    parts = [_Part(weight, x, packed) for weight, x in zip(weights, vectors, strict=True)]
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


def _threshold(parts: list[_Part], k: int, absolute: bool) -> tuple[Tensor, Tensor]:
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
        read = _read([_Part(scores[None], None, False)], k, False)
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


def _read(parts: list[_Part], k: int, absolute: bool) -> _Read:
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


def _count(parts: list[_Part], bracket: Tensor, capacity: int, absolute: bool) -> _Read:
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


def _raise_nan(parts: list[_Part], program: int) -> None:
    for number, part in enumerate(parts):
        if program < part.programs:
            raise nan_error(f"weights[{number}]", f"xs[{number}]", part.x)
        program -= part.programs


def _bracket(parts: list[_Part], k: int, total: int, absolute: bool, seed: int) -> tuple[Tensor, Tensor]:
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
        samples.append(score_ref(part.weight[row, col], None if part.x is None else part.x[col], absolute))
    sample = torch.cat(samples).sort().values
    place = sample.shape[0] - round(sample.shape[0] * (k / total))
    low, high = place - _MARGIN, place + _MARGIN
    infinity = torch.full_like(sample[:1], torch.inf)
    return (
        -infinity if low < 0 else sample[low : low + 1],
        infinity if high >= sample.shape[0] else sample[high : high + 1],
    )
