"""What the selection kernels ask of an A100, counted from their PTX: bounds, not measurements.

Each operation runs under emulation of its PTX (trisparse.kernels.launch.Emulator; needs ptxsim) on a few
rows of a bf16 weight, and is scaled to the whole. Reported for an A100-SXM-80GB with published peaks:

- dram_us: compulsory bytes (W and X read once, each output written once) at 2039 GB/s;
- issue_us: warp instructions of the PTX, without mov and ld.param, at 4 a clock and SM, 108 SMs, 1.41 GHz. The
  assembler changes instruction counts, so that this is an indicator;
- dram_over_compulsory: the distinct 32-byte sectors that each launch reads and writes, over the compulsory bytes. A
  sector that a launch reads twice counts once: a row that is read again comes from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trisparse.bench.bounds.record import Study, bounded, figures
from trisparse.bench.registry import Measured
from trisparse.kernels.launch import Emulator, using
from trisparse.kernels.metric import compile_metric
from trisparse.kernels.nm import select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global
from trisparse.sparsity.metric.parser import parse

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
SLOTS_PER_US = 4 * 108 * 1410.0
DRAM_BYTES_PER_US = 2039e3
_FREE = {"mov", "ld.param"}  # no machine instruction of their own, as a rule

Operation = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Case:
    """An operation on (weight, x), the bytes that it writes and reads per weight, and whether it reads x.

    ``emulated`` rows run, and are scaled to the whole: every row does the same work but for its data.
    """

    run: Operation
    written: float
    reads_x: bool = True
    emulated: int = 16
    read: float = 2.0


def cases() -> dict[str, Case]:
    """What is counted, by name."""
    table: dict[str, Case] = {
        "rows 50%, |W|*X, in place + packed": Case(
            lambda w, x: select_rows(w, w.shape[1] // 2, x=x, out="packed", apply=True), 2.125
        ),
        "rows 50%, |W|*X, packed": Case(lambda w, x: select_rows(w, w.shape[1] // 2, x=x, out="packed"), 0.125),
        "rows 50%, |W|*X, mask": Case(lambda w, x: select_rows(w, w.shape[1] // 2, x=x), 1.0),
        "rows 50%, |W| (ties), in place + packed": Case(
            lambda w, _: select_rows(w, w.shape[1] // 2, out="packed", apply=True), 2.125, False
        ),
        "layer 50%, |W|, mask": Case(lambda w, _: select_global([w], w.numel() // 2)[0], 1.0, False, 96),
        "layer 50%, |W|, in place + packed": Case(
            lambda w, _: select_global([w], w.numel() // 2, out="packed", apply=True), 2.125, False, 96
        ),
        "layer 50%, |W|*X, in place + packed": Case(
            lambda w, x: select_global([w], w.numel() // 2, xs=[x], out="packed", apply=True), 2.125, True, 96
        ),
        "2:4, |W|*X, compressed": Case(lambda w, x: select_nm(w, 2, 4, x=x, out="compressed"), 1.125),
    }
    for n, m in ((2, 4), (4, 8), (8, 16), (16, 32)):
        for apply in (True, False):
            name = f"{n}:{m}, |W|*X, {'in place + ' if apply else ''}packed"
            run = partial(_select_nm, n=n, m=m, apply=apply)
            table[name] = Case(run, 2.125 if apply else 0.125)
    # Metrics that are compiled to a score, with G in bf16; mms(G) is known after one more read of G.
    for text, written_as, read, reads_x in (
        ("abs(W) * X", "|W|*X", 2.0, True),
        ("abs(W * G)", "|W*G|", 4.0, False),
        ("abs(W * W) * mms(G)", "|W*W|*mms(G)", 6.0, False),
    ):
        for pattern, select in (("rows 50%", _select_half), ("2:4", partial(_select_nm, n=2, m=4))):
            run = partial(_select_by_metric, text=text, select=select)
            table[f"{pattern}, metric {written_as}, in place + packed"] = Case(run, 2.125, reads_x, read=read)
    return table


def _select_half(weight: Tensor, x: Tensor, *, apply: bool, **by: Any) -> Any:
    return select_rows(weight, weight.shape[1] // 2, x=x, out="packed", apply=apply, **by)


def _select_by_metric(weight: Tensor, x: Tensor, *, text: str, select: Callable[..., Any]) -> Any:
    g = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    return select(weight, x, apply=True, score=compile_metric(parse(text)), g=g)


def _select_nm(weight: Tensor, x: Tensor, *, n: int, m: int, apply: bool, **by: Any) -> Any:
    return select_nm(weight, n, m, x=x, out="packed", apply=apply, **by)


def compulsory_bytes(case: Case, rows: int, cols: int) -> float:
    """What a selection on a bf16 weight [rows, cols] has to read and write."""
    return rows * cols * (case.read + case.written) + (4 * cols if case.reads_x else 0)


def bound(case: Case, rows: int, cols: int) -> dict[str, Any]:
    """The counts of a case on a bf16 weight [rows, cols], scaled from a few rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.emulated, cols, generator=generator).bfloat16()
    x = torch.rand(cols, generator=generator)
    emulator = Emulator()
    with using(emulator):
        case.run(weight, x)
    profiles = [profile for _, profile in emulator.profiles]
    scale = rows / case.emulated
    x_bytes = 4 * cols if case.reads_x else 0  # once, whatever the rows
    moved = sum(p.unique_read_sector_bytes + p.unique_write_sector_bytes - x_bytes for p in profiles)
    compulsory = compulsory_bytes(case, rows, cols)
    issued = scale * sum(sum(n for kind, n in p.insts.items() if kind not in _FREE) for p in profiles)
    ideal = sum(p.ideal_wavefronts for p in profiles)
    dram_us, issue_us = compulsory / DRAM_BYTES_PER_US, issued / SLOTS_PER_US
    return {
        "launches": [kernel for kernel, _ in emulator.profiles],
        "dram_us": round(dram_us, 2),
        "issue_us": round(issue_us, 2),
        "issue_over_dram": round(issue_us / dram_us, 3),
        "dram_over_compulsory": round((scale * moved + x_bytes) / compulsory, 4),
        "warp_instructions_per_row": round(issued / rows),
        "conflicts": round(sum(p.total_wavefronts for p in profiles) / ideal - 1, 4) if ideal else 0.0,
        "local_bytes": sum(p.local_bytes for p in profiles),
        "spill_bytes": sum((p.static.spill_stores or 0) + (p.static.spill_loads or 0) for p in profiles),
        "registers": max(p.static.registers or 0 for p in profiles),
        "occupancy": min(p.static.occupancy or 0.0 for p in profiles),
    }


def _cases() -> Iterator[dict[str, Any]]:
    for rows, cols in SHAPES:
        for name, case in cases().items():
            yield {"case": name, "rows": rows, "cols": cols, "rows_emulated": case.emulated}


def _names(case: Mapping[str, Any]) -> tuple[str, ...]:
    return (f"select {case['case']}, {case['rows']}x{case['cols']}",)


def _rows(row: Mapping[str, Any]) -> Iterator[Measured]:
    moved = compulsory_bytes(cases()[row["case"]], row["rows"], row["cols"])
    own = figures({**row, "bytes": moved}, bound_us="dram_us", bytes_over_compulsory="dram_over_compulsory")
    about = {"rows": row["rows"], "cols": row["cols"], "selection": row["case"], "binding": "DRAM"}
    yield bounded(_names(row)[0], about, {" + ".join(row["launches"]): own})


STUDY = Study(
    "selection",
    "selection-bounds-a100.json",
    _cases,
    lambda case: bound(cases()[case["case"]], case["rows"], case["cols"]),
    _names,
    _rows,
    {
        "dtype": "bfloat16",
        "peaks": {"dram_bytes_per_us": DRAM_BYTES_PER_US, "issue_slots_per_us": SLOTS_PER_US},
    },
)
