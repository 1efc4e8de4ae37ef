"""Every kernel, compiled for GPUs that need not be there, at the shapes of Llama-2 and OPT: what it needs.

``trisparse bench aot`` prints it; the compile gate of the tests fails on a spill or on too much shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from trisparse.bench import linear_gate
from trisparse.bench.bounds import linear24 as bounds_linear24
from trisparse.kernels import bitmask, linear24
from trisparse.kernels.aot import Resources, resources
from trisparse.kernels.nm import select_nm
from trisparse.kernels.obs import obs_block
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (5120, 13824), (8192, 28672))


def operations(rows: int, cols: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], bool]]:
    """Every operation at one shape, on meta tensors; True for those whose main loads are 16 bytes a thread."""
    w = torch.empty(rows, cols, dtype=dtype, device="meta")
    x = torch.empty(cols, device="meta")
    mask = torch.empty(rows, cols, dtype=torch.bool, device="meta")
    packed = torch.empty(rows, cols // 8, dtype=torch.uint8, device="meta")
    return {
        **_layers(rows, cols, dtype),
        **(_obs_blocks(rows, cols) if dtype == torch.float32 else {}),
        "rows": (lambda: select_rows(w, cols // 2, x=x, out="packed", apply=True), True),
        "rows, no x": (lambda: select_rows(w, cols // 2), True),
        "2:4": (lambda: select_nm(w, 2, 4, x=x, out="packed", apply=True), True),
        "2:4 compressed": (lambda: select_nm(w, 2, 4, x=x, out="compressed"), True),
        "4:8": (lambda: select_nm(w, 4, 8, x=x, out="packed", apply=True), True),
        "8:16": (lambda: select_nm(w, 8, 16, x=x, out="packed", apply=True), True),
        "along out": (lambda: select_nm(w, 2, 4, x=x, along_out=True), False),
        "global": (lambda: select_global([w], 1, apply=True), True),
        "global, x": (lambda: select_global([w], 1, xs=[x]), True),
        "pack": (lambda: bitmask.pack_bits(mask), False),
        "unpack": (lambda: bitmask.unpack_bits(packed, cols), False),
        "count": (lambda: bitmask.count_bits(packed), False),
        "apply": (lambda: bitmask.apply_bits(w, packed), True),
        "compress": (lambda: bitmask.compress_bits(w, packed), False),
    }


def _layers(rows: int, cols: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], bool]]:
    """Linear layers of half precision with an adapter of rank 16; bench/linear_gate.py has all cases."""
    found: dict[str, tuple[Callable[[], Any], bool]] = {}
    if dtype not in linear24.DTYPES:
        return found
    if rows % 16 == 0 and cols % 64 == 0:
        for tokens in (1, 2048):
            found[f"linear24, {tokens} tokens"] = bounds_linear24.product(rows, cols, tokens, 16, "meta"), True
    for pattern in (("2:4", 2, 4), ("bitmask", 0, 0)):
        for tokens, backward in ((1, False), (2048, False), (2048, True)):
            case = linear_gate.Case(*pattern, rows, cols, tokens, 16, dtype, backward)
            # Loads through cp.async are not seen, so that the widest that is seen says nothing of the main loads.
            found[str(case)] = case.operation(), False
    return found


def _obs_blocks(rows: int, cols: int) -> dict[str, tuple[Callable[[], Any], bool]]:
    """A block of 128 columns of a weight in fp32, stored by rows and by columns."""
    factor = torch.empty(cols, cols, device="meta")[:128, :128]
    mask = torch.empty(rows, cols, dtype=torch.bool, device="meta")[:, :128]
    by_rows, by_columns = torch.empty(rows, cols, device="meta")[:, :128], torch.empty(128, rows, device="meta").t()
    return {
        "OBS, mask": (lambda: obs_block(by_rows, factor, mask, in_place=True), True),
        "OBS, 2:4": (lambda: obs_block(by_rows, factor, None, 2, 4, in_place=True), True),
        "OBS, 2:4 by columns": (lambda: obs_block(by_columns, factor, None, 2, 4), True),
        "OBS, 4:8": (lambda: obs_block(by_rows, factor, None, 4, 8, in_place=True), True),
    }


def compile_all(shape: tuple[int, int], ccs: Iterable[int], dtype: torch.dtype = torch.bfloat16) -> list[Resources]:
    """Resources of every kernel of every operation at ``shape``, for each compute capability in ``ccs``."""
    ccs = tuple(ccs)
    return [row for operation, _ in operations(*shape, dtype).values() for row in resources(operation, ccs)]
