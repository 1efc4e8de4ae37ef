"""What `linear` with few tokens asks of an A100, counted from its PTX: bounds, not measurements.

Every program of each launch runs under emulation of its PTX (trisparse.kernels.launch.Emulator; needs ptxsim).
Reported for an A100-SXM-80GB with published peaks, on a bf16 weight that keeps half of itself:

- moved_bytes: the distinct 32-byte sectors that each launch reads and writes, the partial sums among them, which an
  L2 cache would keep; bytes_over_compulsory: over compressed W + x + y, without the adapter's A and B;
- bound_us: for each launch the longest of its DRAM, tensor and shared memory times, summed, and the resource that
  binds the product;
- of_dense: bound_us over the DRAM time of a dense bf16 W, x and y, and of A and B where there is an adapter;
- issue_us: warp instructions of the PTX at 4 a clock and SM, an indicator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trisparse.bench.bounds.record import GPU, Study, bounded, figures
from trisparse.bench.registry import Measured
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.compressed import CompressedWeight, compress
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.linear import linear

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = (1, 8, 16)
FORMATS = (("2:4", 2, 4), ("n:m", 4, 8), ("bitmask", 0, 0))
DRAM_BYTES_PER_US = 2039e3


@lru_cache(maxsize=1)
def half(format: str, n: int, m: int, rows: int, cols: int) -> CompressedWeight:
    """A random bf16 weight that keeps half of itself: an even half of each row with "bitmask"."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).bfloat16()
    group = m or cols
    order = torch.rand(rows, cols // group, group, generator=generator).argsort(2)
    mask = (order < group // 2).reshape(rows, cols)
    return compress(weight, pack_bits(mask), format, n, m)


def dense_bytes(rows: int, cols: int, tokens: int, rank: int) -> int:
    """Of a dense W, x and y, and of A and B, in bf16."""
    return 2 * (rows * cols + tokens * (rows + cols) + rank * (rows + cols))


def bound(weight: CompressedWeight, tokens: int, rank: int = 0, ctas: int | None = None) -> dict[str, Any]:
    """The counts of one forward product, with an adapter of this rank, 0 for none.

    With ``ctas``, so many programs of a launch are emulated and their counts scaled. The few programs of x A^T may be
    missed then.
    """
    rows, cols = weight.shape
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x = normal(tokens, cols)
    emulator = Emulator(options={"ctas": ctas})
    with using(emulator):
        linear(x, weight, None, (normal(rank, cols), normal(rows, rank), 1.0) if rank else None)
    moved, bound_us, issue_us, binding = 0.0, 0.0, 0.0, ""
    for name, profile in emulator.profiles:
        estimate = ptxsim().estimate(profile, GPU)
        moved += profile.unique_read_sector_bytes + profile.unique_write_sector_bytes
        bound_us += estimate.binding.microseconds
        issue_us += estimate["issue"]
        if name == "product_kernel":
            binding = estimate.binding.resource
    io = 2 * tokens * (rows + cols)
    dense_us = dense_bytes(rows, cols, tokens, rank) / DRAM_BYTES_PER_US
    statics = [profile.static for _, profile in emulator.profiles]
    return {
        "launches": [name for name, _ in emulator.profiles],
        "compressed_bytes": weight.bytes,
        "moved_bytes": round(moved),
        "bytes_over_compulsory": round(moved / (weight.bytes + io), 4),
        "bound_us": round(bound_us, 2),
        "binding": binding,
        "of_dense": round(bound_us / dense_us, 4),
        "issue_us": round(issue_us, 2),
        "spill_bytes": sum((s.spill_stores or 0) + (s.spill_loads or 0) for s in statics),
        "registers": max(s.registers or 0 for s in statics),
    }


def _cases() -> Iterator[dict[str, Any]]:
    for rows, cols in SHAPES:
        for format, n, m in FORMATS:
            for tokens in TOKENS:
                for rank in (0, 16):
                    yield {"format": format, "n": n, "m": m, "rows": rows, "cols": cols, "tokens": tokens, "rank": rank}


def _count(case: dict[str, Any]) -> dict[str, Any]:
    weight = half(case["format"], case["n"], case["m"], case["rows"], case["cols"])
    return bound(weight, case["tokens"], case["rank"])


def _names(case: Mapping[str, Any]) -> tuple[str, ...]:
    pattern = f"{case['n']}:{case['m']}" if case["m"] else "50%"
    adapter = f", rank {case['rank']}" if case["rank"] else ""
    return (f"linear {case['rows']}x{case['cols']} {pattern}, {case['tokens']} tokens{adapter}",)


def _rows(row: Mapping[str, Any]) -> Iterator[Measured]:
    rows, cols, tokens, rank = (row[name] for name in ("rows", "cols", "tokens", "rank"))
    flops = 2 * rows * cols * tokens
    dense = {
        "bound_us": row["bound_us"] / row["of_dense"],
        "flops": flops,
        "bytes": dense_bytes(rows, cols, tokens, rank),
    }
    metrics = {"dense": dense, "compressed": figures({**row, "flops": flops}, bytes="moved_bytes")}
    about = {name: row[name] for name in ("format", "rows", "cols", "tokens", "rank", "binding")}
    yield bounded(_names(row)[0], about, metrics, "dense")


STUDY = Study(
    "linear",
    "linear-bounds-a100.json",
    _cases,
    _count,
    _names,
    _rows,
    {"dtype": "bfloat16", "peaks": {"dram_bytes_per_us": DRAM_BYTES_PER_US}},
)
