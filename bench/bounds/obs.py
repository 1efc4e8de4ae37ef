"""What the OBS update of a block of 128 columns asks of an A100, counted from its PTX: bounds, not measurements.

Some programs of the launch run under emulation of their PTX (trisparse.kernels.launch.Emulator; needs ptxsim), and are
scaled to all rows, each of which takes the same work. Reported for an A100-SXM-80GB with published peaks:

- bytes_over_compulsory: the distinct 32-byte sectors that are read and written, over W in, W out, errors, mask and the
  upper half of U. Errors that a program reads back, which it wrote before, are counted as reread_bytes instead;
- dram_us: the DRAM time of the compulsory bytes; issue_us: warp instructions of the PTX at 4 a clock and SM, an
  indicator;
- product_us: fp32 time of the product that takes the errors to the columns after, for the average block of a weight
  with 4096 columns: the time beside which the update stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trisparse.bench.bounds.record import GPU, Study, bounded, figures
from trisparse.bench.registry import Measured
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.obs import MAX_BLOCK, obs_block

ROWS = (4096, 11008)
PATTERNS = ((0, 0), (2, 4), (4, 8))  # 0:0: the mask is given
DRAM_BYTES_PER_US = 2039e3
FP32_FLOPS_PER_US = 19.5e6
COLS = 4096


def bound(rows: int, n: int, m: int, *, by_columns: bool = False, ctas: int | None = 2) -> dict[str, Any]:
    """The counts of one block in place; with ``ctas``, of so many programs, scaled."""
    block = MAX_BLOCK
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, block, generator=generator)
    weight = weight.t().contiguous().t() if by_columns else weight
    factor = torch.eye(block) + 0.1 * torch.randn(block, block, generator=generator).triu(1)
    mask = None if m else torch.rand(rows, block, generator=generator) < 0.5
    emulator = Emulator(options={"ctas": ctas})
    with using(emulator):
        obs_block(weight, factor, mask, *((n, m) if m else ()), in_place=True)
    ((_, profile),) = emulator.profiles
    factor_bytes = 4 * block * (block + 1) // 2
    compulsory = rows * block * (4 + 4 + 4 + 1) + factor_bytes
    # All sectors of the errors but the last sub-block's are read back.
    moved = profile.unique_read_sector_bytes + profile.unique_write_sector_bytes
    reread = 4 * rows * (block - max(8, m))
    return {
        "compulsory_bytes": compulsory,
        "reread_bytes": reread,
        "bytes_over_compulsory": round((moved - reread) / compulsory, 4),
        "dram_us": round(compulsory / DRAM_BYTES_PER_US, 2),
        "issue_us": round(ptxsim().estimate(profile, GPU)["issue"], 2),
        "product_us": round(2 * rows * block * (COLS - block) / 2 / FP32_FLOPS_PER_US, 2),
        "registers": profile.static.registers,
        "spill_bytes": (profile.static.spill_stores or 0) + (profile.static.spill_loads or 0),
    }


def _cases() -> Iterator[dict[str, Any]]:
    for rows in ROWS:
        for n, m in PATTERNS:
            for by_columns in (False, True):
                yield {"rows": rows, "n": n, "m": m, "by_columns": by_columns}


def _names(case: Mapping[str, Any]) -> tuple[str, ...]:
    pattern = f"{case['n']}:{case['m']}" if case["m"] else "mask given"
    return (f"obs_block {case['rows']}x{MAX_BLOCK} {pattern}, by {'columns' if case['by_columns'] else 'rows'}",)


def _rows(row: Mapping[str, Any]) -> Iterator[Measured]:
    # Column j is subtracted from those behind it in the block, each element with one product.
    flops = row["rows"] * MAX_BLOCK * (MAX_BLOCK - 1)
    own = figures({**row, "flops": flops}, bound_us="dram_us", bytes="compulsory_bytes")
    about = {"rows": row["rows"], "cols": MAX_BLOCK, "n": row["n"], "m": row["m"], "by_columns": row["by_columns"]}
    yield bounded(_names(row)[0], {**about, "binding": "DRAM"}, {"obs_block": own})


STUDY = Study(
    "obs",
    "obs-bounds-a100.json",
    _cases,
    lambda case: bound(**case),
    _names,
    _rows,
    {
        "block": MAX_BLOCK,
        "peaks": {"dram_bytes_per_us": DRAM_BYTES_PER_US, "fp32_flops_per_us": FP32_FLOPS_PER_US},
    },
)
