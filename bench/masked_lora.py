"""mask_lora on the CPU against PERP's own way: seconds and memory of a forward and a backward.

    python -m trisparse.bench.masked_lora [--json]

PERP's own layer forms B A, zeroes it where W is zero, adds it to W and leaves the rest to autograd. Both run in turn,
A B A B, in one process. Extra memory is the peak of what torch allocates during forward and backward, counted by
its profiler; the results (y and the gradients) are part of it for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.masked_lora import mask_lora

Step = Callable[[], tuple[Tensor, ...]]


def steps(tokens: int, out: int, inputs: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Step, Step]:
    """(ours, PERP's own way): each returns the gradients of x, A and B; bf16 runs under autocast."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(out, inputs, generator=g) < 0.5
    weight = torch.randn(out, inputs, generator=g).masked_fill_(~keep, 0) * 0.02
    packed = pack_bits(weight != 0)  # for this once, so that both ways have the same mask
    a, b = torch.randn(rank, inputs, generator=g) * 0.02, torch.randn(out, rank, generator=g) * 0.02
    x, dy = torch.randn(tokens, inputs, generator=g).to(dtype), torch.randn(tokens, out, generator=g).to(dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

    def ours() -> tuple[Tensor, ...]:
        with autocast():
            y = mask_lora(x, weight, packed, a, b, scale=2.0)
        return torch.autograd.grad(y, leaves, dy)

    def usual() -> tuple[Tensor, ...]:
        with autocast():
            update = (b @ a).masked_fill_(weight == 0, 0)
            y = linear(x, weight + 2.0 * update)
        return torch.autograd.grad(y, leaves, dy)

    return ours, usual


def peak_bytes(step: Step) -> int:
    """The most bytes that torch has allocated at once during ``step``, beyond what it had before."""
    # The profiler's library writes two lines to standard error each time it runs, unless this says not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    used = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def compare(tokens: int, out: int, inputs: int, rank: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds (wall and, with one thread, of the processor), their ratios and the extra memory of both ways."""
    ours, usual = steps(tokens, out, inputs, rank, dtype)
    for mine, other in zip(ours(), usual(), strict=True):
        difference = float((mine - other).norm() / other.norm())
        if not difference < (1e-5 if dtype == torch.float32 else 2e-2):
            raise RuntimeError(f"the two ways differ by {difference:.1e}")
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "usual": []}
    for _ in range(repeats):
        for name, step in (("ours", ours), ("usual", usual)):
            wall, processor = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    row: dict[str, Any] = {"tokens": tokens, "out": out, "in": inputs, "rank": rank, "dtype": str(dtype)[6:]}
    for place, clock in enumerate(("wall", "processor")):
        seconds = {name: [pair[place] for pair in times[name]] for name in times}
        least = {name: min(seconds[name]) for name in seconds}
        row[clock] = {
            "ours_min_s": least["ours"],
            "usual_min_s": least["usual"],
            "ratio_of_minima": least["usual"] / least["ours"],
            "median_of_ratios": statistics.median(
                usual / ours for ours, usual in zip(seconds["ours"], seconds["usual"], strict=True)
            ),
        }
    row["ours_bytes"], row["usual_bytes"] = peak_bytes(ours), peak_bytes(usual)
    row["memory_ratio"] = row["ours_bytes"] / row["usual_bytes"]
    return row


def main() -> None:
    """Print the comparison, or give it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.masked_lora", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048), metavar=("OUT", "IN"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    options = parser.parse_args()
    out, inputs = options.size
    rows = [
        compare(options.tokens, out, inputs, options.rank, getattr(torch, dtype), options.repeats)
        for dtype in options.dtypes
    ]
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine()}
    if options.json:
        print(json.dumps({**about, "results": rows}, indent=1))
        return
    for row in rows:
        print(f"{row['dtype']}, {row['tokens']} tokens, {row['out']}x{row['in']}, rank {row['rank']}: {about}")
        for clock in ("wall", "processor"):
            times = row[clock]
            print(
                f"  {clock:9} ours {1e3 * times['ours_min_s']:6.1f} ms, usual {1e3 * times['usual_min_s']:6.1f} ms, "
                f"ratio of minima {times['ratio_of_minima']:.2f}, median of ratios {times['median_of_ratios']:.2f}"
            )
        print(f"  memory    ours {row['ours_bytes'] / 2**20:.1f} MiB, {row['memory_ratio']:.2f} of the usual way's")


if __name__ == "__main__":
    main()
