"""What the 2:4 linear layer asks of an A100, counted from its PTX: bounds, not measurements.

Each case runs under emulation of its PTX (trisparse.kernels.launch.Emulator; needs ptxsim) on bf16 operands without a
bias: four CTAs, whose counts are scaled. For an A100-SXM-80GB with published peaks:

- bound_us: the largest of the times that DRAM (distinct bytes of each launch at 2039 GB/s), the tensor cores (312
  TFLOP/s of executed operations, the SMs filled in whole rounds of CTAs) and shared memory (a wavefront a clock) take;
  the launches of a split product are added up. ``binding`` names that resource.
- dense_us: the larger of 2 rows cols tokens at 312 TFLOP/s and the bytes of W, x and y in bf16 at 2039 GB/s: what no
  dense kernel can beat.
- dram_over_compressed: those distinct bytes over the bytes of compressed W, x and y. The operands of LoRA count as
  extra.
- l1_us: shared memory and the sectors that are loaded into registers, through the same 128 bytes a clock and SM; l2_us:
  sectors, each once a CTA, at 5120 bytes a clock. Indicators: caches may serve better or worse than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from trisparse.bench.bounds.record import Study, bounded, figures
from trisparse.bench.registry import Measured
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.linear24 import Lora, linear24

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = (1, 8, 16, 512, 2048)
DRAM_BYTES_PER_US = 2039e3
FLOPS_PER_US = 312e6
_CLOCKS_PER_US = 1410
_SMS = 108


def product(rows: int, cols: int, tokens: int, rank: int = 0, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """The layer on zeros of bf16; on "meta" for compiling only."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=device)

    meta = torch.full((rows // 16, cols // 64, 32, 2), 0x4444, dtype=torch.int16, device=device)
    lora: Lora | None = (zeros(rank, cols), zeros(rows, rank), 1.0) if rank else None
    return partial(linear24, zeros(tokens, cols), zeros(rows // 16, cols // 32, 32, 8), meta, lora=lora)


def dense_bytes(rows: int, cols: int, tokens: int) -> int:
    """Of a dense W, x and y in bf16."""
    return 2 * (rows * cols + tokens * (rows + cols))


def bound(rows: int, cols: int, tokens: int, rank: int = 0, sampled: int = 4) -> dict[str, Any]:
    """The counts of one product, of which ``sampled`` CTAs are emulated; no count depends on the values."""
    emulator = Emulator(options={"ctas": sampled})
    with using(emulator):
        product(rows, cols, tokens, rank)()
    profiles = [profile for _, profile in emulator.profiles]
    estimates = [ptxsim().estimate(profile, "A100-SXM-80GB") for profile in profiles]
    main, profile = estimates[0], profiles[0]
    compressed = rows * cols * 9 // 8 + 2 * tokens * (rows + cols)
    moved = sum(p.compulsory_dram_bytes for p in profiles)
    dense = max(2 * rows * cols * tokens / FLOPS_PER_US, dense_bytes(rows, cols, tokens) / DRAM_BYTES_PER_US)
    microseconds = sum(e.microseconds for e in estimates)
    busiest = -(-profile.num_ctas // _SMS) / profile.num_ctas
    loads = profile.global_load_sectors - profile.shared_bytes["cp.async"] / 32  # sectors that end in registers
    l1 = (profile.total_wavefronts + loads / 4) * busiest / _CLOCKS_PER_US
    return {
        "launches": [kernel for kernel, _ in emulator.profiles],
        "ctas": profile.num_ctas,
        "ctas_emulated": profile.ctas_run,
        "binding": main.binding.resource,
        "bound_us": round(microseconds, 3),
        "dense_us": round(dense, 3),
        "bound_over_dense": round(microseconds / dense, 4),
        "dram_us": round(moved / DRAM_BYTES_PER_US, 3),
        "dram_bytes": round(moved),
        "dram_over_compressed": round(moved / compressed, 4),
        "tensor_us": round(main["tensor"], 3),
        "shared_us": round(main["shared"], 3),
        "issue_us": round(main["issue"], 3),
        "l1_us": round(l1, 3),
        "l2_us": round(main["L2"], 3),
        "bank_conflicts": round(sum(p.bank_conflict_wavefronts for p in profiles)),
        "local_bytes": round(sum(p.local_bytes for p in profiles)),
        "spill_bytes": sum((p.static.spill_stores or 0) + (p.static.spill_loads or 0) for p in profiles),
        "registers": max(p.static.registers or 0 for p in profiles),
        "occupancy": profile.static.occupancy,
    }


def _cases() -> Iterator[dict[str, Any]]:
    for rows, cols in SHAPES:
        for tokens in TOKENS:
            for rank in (0, 16):
                yield {"rows": rows, "cols": cols, "tokens": tokens, "rank": rank}


def _names(case: Mapping[str, Any]) -> tuple[str, ...]:
    adapter = f", rank {case['rank']}" if case["rank"] else ""
    return (f"linear24 {case['rows']}x{case['cols']} 2:4, {case['tokens']} tokens{adapter}",)


def _rows(row: Mapping[str, Any]) -> Iterator[Measured]:
    rows, cols, tokens = row["rows"], row["cols"], row["tokens"]
    flops = 2 * rows * cols * tokens
    own = figures({**row, "flops": flops}, bytes="dram_bytes", bytes_over_compulsory="dram_over_compressed")
    dense = {"bound_us": row["dense_us"], "flops": flops, "bytes": dense_bytes(rows, cols, tokens)}
    about = {name: row[name] for name in ("rows", "cols", "tokens", "rank", "binding")}
    yield bounded(_names(row)[0], about, {"dense": dense, "mma.sp": own}, "dense")


STUDY = Study(
    "linear24",
    "linear24-bounds-a100.json",
    _cases,
    lambda case: bound(**case),
    _names,
    _rows,
    {"dtype": "bfloat16", "peaks": {"dram_bytes_per_us": DRAM_BYTES_PER_US, "flops_per_us": FLOPS_PER_US}},
)
