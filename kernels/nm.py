"""N:M selection: keep exactly the n greatest scores of every m consecutive inputs.

    mask[i, m*g + j] = (score[i, m*g + j] is among the n greatest of group g),  score = |W| * X or W * X

W [rows, cols], X [cols] -> mask [rows, cols] bool; cols % m == 0. Equal scores: the lower index is kept.
Source: 2:4 sparsity of Ampere's tensor cores (Mishra et al. 2021, https://arxiv.org/abs/2104.08378); 2:4 and
4:8 pruning as in Wanda (Sun et al. 2024, https://arxiv.org/abs/2306.11695, section 4.1).

Forms of the result (``out``):

- ``"mask"``: bool [rows, cols].
- ``"packed"``: uint8 [rows, ceil(cols/8)], see kernels/bitmask.py.
- ``"compressed"``: (values, meta). Values are the kept weights in row order, [rows, cols * n / m]. For 2:4,
  meta is int16 [rows, cols / 16]: the two kept of group g of a row have the places i0 < i1 (0..3) in the group,
  and bits 4*(g % 4) + 0, 1 of meta[row, g // 4] are i0 and bits 4*(g % 4) + 2, 3 are i1, low bit first. That is
  the word of torch's sparse_semi_structured_from_dense_cutlass before it reorders the words for its kernels,
  and two neighbours make the 32-bit metadata of mma.sp. For every other pattern, meta is the packed mask: it
  takes m bits a group, which is less than n indices would.

An element is kept when fewer than n of its group come before it: those with a greater score, and those with
an equal score and a lower index. Counting them takes m - 1 comparisons of the weights with themselves,
shifted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trisparse.kernels.bitmask import apply_bits, compress_bits, empty_mask, pack_bits, unpack_bits
from trisparse.kernels.launch import by_kernel
from trisparse.kernels.metric import CompiledMetric, check_inputs
from trisparse.kernels.operation import Operation
from trisparse.kernels.score import (
    Chunks,
    check_disjoint,
    check_out,
    check_writable,
    checked_score_ref,
    is_int,
    raise_if_nan,
    run_chunks,
    score_ref,
)

if TYPE_CHECKING:
    from trisparse.kernels.metric_triton import MetricInputs

MAX_M = 32  # a group fits one 32-bit word of a packed mask


def check_nm(n: int, m: int, size: int, what: str = "columns") -> None:
    """Raise a ValueError unless 1 <= n < m <= 32 and ``size`` (of ``what``) is a multiple of ``m``."""
    for name, value in (("n", n), ("m", m)):
        if not is_int(value):
            raise ValueError(f"{name} is {value!r}; it must be an int")
    if not 2 <= m <= MAX_M:
        raise ValueError(f"m is {m}; it must be in 2..{MAX_M}")
    if not 1 <= n < m:
        raise ValueError(f"n is {n}; it must be in 1..{m - 1} for m = {m}")
    if size % m:
        raise ValueError(f"weight has {size} {what}; they must be a multiple of m = {m}")


def select_nm_ref(weight: Tensor, n: int, m: int, *, x: Tensor | None = None, absolute: bool = True) -> Tensor:
    """The specification of `select_nm`: a stable descending sort of each group."""
    score = checked_score_ref(weight, x, absolute, "weight", "x")
    check_nm(n, m, weight.shape[1])
    groups = score.reshape(weight.shape[0], weight.shape[1] // m, m)
    order = torch.sort(groups, dim=2, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device).scatter_(2, order, True)
    return mask.reshape(weight.shape)


def select_nm(
    weight: Tensor,
    n: int,
    m: int,
    *,
    x: Tensor | None = None,
    absolute: bool = True,
    score: CompiledMetric | None = None,
    g: Tensor | None = None,
    out: str = "mask",
    apply: bool = False,
    along_out: bool = False,
) -> Any:
    """Keep exactly the ``n`` greatest scores of every ``m`` consecutive columns; ties go to the lower column.

    Args:
        weight: [rows, cols] of fp32, fp16, bf16 or fp64, the inner dimension contiguous.
        n: how many to keep in each group, 1 <= n < m.
        m: the size of a group, at most 32.
        x: None, or [cols] of a float dtype on the weight's device; the score is multiplied by it in fp32.
        absolute: rank by ``|weight|``; False ranks by ``weight`` itself, which then is the score.
        score: rank by this metric instead, from `trisparse.kernels.metric.compile_metric`; ``absolute`` is then not
            read. On a device the kernel scores on the fly, else torch does beforehand.
        g: [rows, cols] of a float dtype, the inner dimension contiguous; needed if the metric reads G.
        out: "mask", "packed" or "compressed"; the module's docstring gives the formats.
        apply: also zero the others in ``weight``, in place.
        along_out: groups are m consecutive rows, for a weight that is used transposed.

    Returns:
        The mask, bool [rows, cols] with True = kept; or the packed mask; or (values, meta), where values carry
        the gradient to ``weight`` unless ``apply`` was asked.

    Raises:
        ValueError: a wrong dtype, shape, stride, device, ``n``, ``m`` or ``out``, a tail group, overlapping
            memory, or a NaN score (then ``weight`` may have been zeroed in part where ``apply`` was asked).
    """
    check_inputs(score, weight, g, x)
    check_nm(n, m, weight.shape[0 if along_out else 1], "rows" if along_out else "columns")
    check_out(out, ("mask", "packed", "compressed"))
    if out == "compressed" and along_out:
        raise ValueError("out is 'compressed' with along_out; compress the transposed weight instead")
    if out == "compressed" and (n, m) == (2, 4) and weight.shape[1] % 16:
        raise ValueError(f"weight has {weight.shape[1]} columns; compressed 2:4 needs a multiple of 16")
    if apply:
        check_writable(weight, "weight")
    vector = None if x is None else x.detach()
    if score is not None:
        return _select_scored(weight.detach(), n, m, vector, score, g, out, along_out, apply)
    if out == "compressed":
        return (
            _COMPRESS_IN_PLACE(weight.detach(), n, m, vector, absolute)
            if apply
            else _COMPRESS(weight, n, m, vector, absolute)
        )
    operation = _IN_PLACE if apply else _FUNCTIONAL
    return operation(weight.detach(), n, m, vector, absolute, out, along_out)


def _run(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, out: str, along_out: bool) -> Tensor:
    return _select(weight, n, m, x, absolute, out, along_out, apply=False)


def _run_in_place(
    weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, out: str, along_out: bool
) -> Tensor:
    check_disjoint({"weight": weight}, {"x": x})
    return _select(weight, n, m, x, absolute, out, along_out, apply=True)


def _result(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, out: str, along_out: bool) -> Tensor:
    return empty_mask(weight, out)


def _compress(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool) -> tuple[Tensor, Tensor]:
    return _select_compressed(weight.detach(), n, m, x, absolute, apply=False)


def _compress_in_place(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool) -> tuple[Tensor, Tensor]:
    check_disjoint({"weight": weight}, {"x": x})
    return _select_compressed(weight, n, m, x, absolute, apply=True)


def _compressed_result(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols * n // m)
    if (n, m) == (2, 4):
        return values, weight.new_empty(rows, cols // 16, dtype=torch.int16)
    return values, empty_mask(weight, "packed")


_FUNCTIONAL = Operation("select_nm", _run, _result, reads_back=True)
_IN_PLACE = Operation("select_nm_", _run_in_place, _result, mutates=("weight",), reads_back=True)
_COMPRESS = Operation("compress_nm", _compress, _compressed_result, reads_back=True)
_COMPRESS_IN_PLACE = Operation(
    "compress_nm_", _compress_in_place, _compressed_result, mutates=("weight",), reads_back=True
)


def _save_meta(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, n, m, _, _ = inputs
    ctx.form = n, m, weight.shape[1]
    ctx.save_for_backward(output[1])


def _to_kept(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    """The gradient of the values, put back to the places of the kept weights."""
    (meta,) = ctx.saved_tensors
    n, m, cols = ctx.form
    mask = mask_2_4(meta) if (n, m) == (2, 4) else unpack_bits(meta, cols)
    return gradient.new_zeros(mask.shape).masked_scatter(mask, gradient), None, None, None, None


_COMPRESS.registered.register_autograd(_to_kept, setup_context=_save_meta)


def _select(
    weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, out: str, along_out: bool, apply: bool
) -> Tensor:
    if by_kernel(weight) and weight.dtype != torch.float64:
        return _by_kernel(weight, n, m, x, absolute, out, along_out, apply)
    mask = _mask(weight, n, m, x, absolute, along_out)
    if apply:
        weight.masked_fill_(~mask, 0)
    return pack_bits(mask) if out == "packed" else mask


def _select_compressed(
    weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, apply: bool
) -> tuple[Tensor, Tensor]:
    if by_kernel(weight) and weight.dtype != torch.float64:
        return _compress_by_kernel(weight, n, m, x, absolute, apply)
    return _compressed_by_mask(weight, _mask(weight, n, m, x, absolute, along_out=False), n, m, apply)


def _compressed_by_mask(weight: Tensor, mask: Tensor, n: int, m: int, apply: bool) -> tuple[Tensor, Tensor]:
    values = weight[mask].reshape(weight.shape[0], weight.shape[1] * n // m)
    if apply:
        weight.masked_fill_(~mask, 0)
    return values, meta_2_4(mask) if (n, m) == (2, 4) else pack_bits(mask)


def _compress_by_kernel(
    weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, apply: bool, metric: MetricInputs | None = None
) -> tuple[Tensor, Tensor]:
    if (n, m) == (2, 4):
        values, meta = _compressed_result(weight, n, m, x, absolute)
        _launch(weight, n, m, x, absolute, False, apply, {"values": values, "meta": meta}, metric)
        return values, meta
    packed = _by_kernel(weight, n, m, x, absolute, "packed", False, False, metric)
    values, _ = compress_bits(weight, packed)
    if apply:
        apply_bits(weight, packed)
    return values.reshape(weight.shape[0], weight.shape[1] * n // m), packed


def _select_scored(
    weight: Tensor,
    n: int,
    m: int,
    x: Tensor | None,
    score: CompiledMetric,
    g: Tensor | None,
    out: str,
    along_out: bool,
    apply: bool,
) -> Any:
    if apply:
        check_disjoint({"weight": weight}, {"x": x, "g": g})
    if score.fused(weight, g):
        from trisparse.kernels.metric_triton import MetricInputs  # Triton is there on Linux only

        metric = MetricInputs(score, weight, g, x)
        if out == "compressed":
            return _compress_by_kernel(weight, n, m, x, False, apply, metric)
        return _by_kernel(weight, n, m, x, False, out, along_out, apply, metric)
    mask = _mask(score.scores(weight, g, x, "weight"), n, m, None, False, along_out)
    if out == "compressed":
        return _compressed_by_mask(weight, mask, n, m, apply)
    if apply:
        weight.masked_fill_(~mask, 0)
    return pack_bits(mask) if out == "packed" else mask


def _mask(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool, along_out: bool) -> Tensor:
    select = _select_cpu if weight.device.type == "cpu" else _select_other
    if not along_out:
        return select(weight, n, m, x, absolute)
    # Equal factors leave a column's order, but rounding them may make ties: score first, as the reference.
    score = weight.T.contiguous() if x is None else score_ref(weight, x, absolute).T.contiguous()
    return select(score, n, m, None, absolute and x is None).T.contiguous()


def _select_other(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool) -> Tensor:
    return select_nm_ref(weight, n, m, x=x, absolute=absolute)


def meta_2_4(mask: Tensor) -> Tensor:
    """The int16 metadata [rows, cols / 16] of a 2:4 mask [rows, cols]; its bits are in the module's docstring."""
    rows, cols = mask.shape
    bytes_of_words = _lookup(pack_bits(mask.contiguous()), _META_OF_BYTE).reshape(rows, cols // 16, 2)
    return bytes_of_words.view(torch.int16).reshape(rows, cols // 16)


def mask_2_4(meta: Tensor) -> Tensor:
    """The 2:4 mask [rows, cols] of the metadata int16 [rows, cols / 16]; the inverse of `meta_2_4`."""
    return unpack_bits(packed_2_4(meta), 16 * meta.shape[1])


def packed_2_4(meta: Tensor) -> Tensor:
    """The packed 2:4 mask uint8 [rows, cols / 8] of the metadata int16 [rows, cols / 16]."""
    return _lookup(meta.contiguous().view(torch.uint8), _BYTE_OF_META)


def _lookup(index: Tensor, table: tuple[int, ...]) -> Tensor:
    return torch.tensor(table, dtype=torch.uint8, device=index.device)[index.to(torch.int32)]


# For a byte of a packed mask, two groups of four, the byte of metadata.
_META_OF_BYTE = tuple(
    sum(
        (min((i for i in range(4) if byte >> shift + i & 1), default=0)
        | max((i for i in range(4) if byte >> shift + i & 1), default=0) << 2) << shift
        for shift in (0, 4)
    )
    for byte in range(256)
)  # fmt: skip
# For a byte of metadata the byte of the packed mask.
_BYTE_OF_META = tuple(
    sum((1 << (meta >> shift & 3) | 1 << (meta >> shift + 2 & 3)) << shift for shift in (0, 4)) for meta in range(256)
)


def _by_kernel(
    weight: Tensor,
    n: int,
    m: int,
    x: Tensor | None,
    absolute: bool,
    out: str,
    along_out: bool,
    apply: bool,
    metric: MetricInputs | None = None,
) -> Tensor:
    fused = m & (m - 1) == 0 or along_out  # else the packed form comes from a mask
    form = out if fused else "mask"
    result = empty_mask(weight, form)
    _launch(weight, n, m, x, absolute, along_out, apply, {form: result}, metric)
    return result if form == out else pack_bits(result)


def _launch(
    weight: Tensor,
    n: int,
    m: int,
    x: Tensor | None,
    absolute: bool,
    along_out: bool,
    apply: bool,
    outputs: dict[str, Tensor],
    metric: MetricInputs | None = None,
) -> None:
    from trisparse.kernels.nm_triton import select_nm_triton  # Triton is there on Linux only

    nan = weight.new_zeros(1, dtype=torch.int32)
    select_nm_triton(
        weight, n, m, x=x, absolute=absolute, metric=metric, along_out=along_out, zero=apply, outputs=outputs, nan=nan
    )
    if metric is None:
        raise_if_nan(nan, "weight", "x", x)
    else:
        raise_if_nan(nan, f"{metric.text} of weight", "", None)


def _select_cpu(weight: Tensor, n: int, m: int, x: Tensor | None, absolute: bool) -> Tensor:
    rows, cols = weight.shape
    chunks = Chunks(weight, x, absolute, "weight", "x")
    mask = torch.empty(rows, cols, dtype=torch.bool)
    kept = mask.numpy()
    longest = max((stop - start for start, stop in chunks.spans), default=0) * cols
    # after[i]: how many of the group follow i; inside[d][i]: does the group hold i + d, too? All in bytes.
    after = np.tile(np.arange(m - 1, -1, -1, dtype=np.uint8), longest // m)
    inside = [(after >= d).view(np.uint8) for d in range(m)]

    def select(start: int, stop: int) -> None:
        keys = chunks.keys(start, stop).reshape(-1)
        before = after[: keys.size].copy()  # will be how many of the group come before each element
        buffer = np.empty(keys.size, np.bool_)
        for d in range(1, min(m, keys.size)):
            first = buffer[:-d]
            np.greater_equal(keys[:-d], keys[d:], out=first)  # i comes before i + d
            wins = first.view(np.uint8)
            wins &= inside[d][: keys.size - d]
            before[d:] += wins
            before[:-d] -= wins
        np.less(before, n, out=kept[start:stop].reshape(-1))

    run_chunks(select, chunks.spans)
    return mask
