"""Which backend runs a compressed layer fastest: measured on the device once, kept in a file, turned into a plan.

The times are kept for each device (kernels/tuned.py), by dtype, shape, pattern, share of kept weights and rank of the
adapter.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trisparse.kernels.linear import MAX_RANK
from trisparse.kernels.tuned import keep, recall
from trisparse.sparsity.backends import BACKENDS, Plan, Prefer, candidates, default_plan
from trisparse.sparsity.linear import SparseLinear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MARGIN = 0.02  # a backend must be faster than dense by this much: dense wins ties

Times = dict[int, dict[str, float]]  # tokens -> backend -> seconds

_FLUSH_BYTES = 256 << 20  # more than any L2 cache holds
_WAIT_CYCLES = 2_000_000  # above a millisecond, in which Python launches a layer


def plan_from(times: Mapping[int, Mapping[str, float]], prefer: Prefer = "speed") -> Plan | None:
    """The plan for measured times; None where dense wins at every token count, so that compressing gains no time.

    A count of tokens is served by what was fastest at the next measured count, beyond the last one by that. With
    "speed" a backend must be faster than dense by more than 2%, else the dense weight is kept and runs; with "memory"
    only the compressed weight is held. Of the two layouts of 2:4 that with the least geometric mean of times is taken.

    Args:
        times: for each token count, seconds of each backend that can run; always of ``"dense"``.
        prefer: as above.
    """
    best: tuple[float, Plan] | None = None
    for layout in ("rows", "fragments"):
        steps: list[tuple[int, str]] = []
        cost = 0.0
        for tokens in sorted(times):
            dense = times[tokens]["dense"]
            others = {
                name: seconds
                for name, seconds in times[tokens].items()
                if _home(name) == layout and name != "dense" and (BACKENDS[name].copy is None or prefer == "speed")
            }
            if not others:
                break
            name = min(others, key=others.__getitem__)
            if prefer == "speed" and others[name] > (1 - MARGIN) * dense:
                name = "dense"
            cost += math.log(times[tokens][name] / dense)
            if steps and steps[-1][1] == name:
                steps.pop()
            steps.append((tokens, name))
        else:
            plan = Plan(layout, (*steps[:-1], (None, steps[-1][1])))
            if best is None or cost < best[0]:
                best = cost, plan
    assert best is not None
    return None if {name for _, name in best[1].steps} == {"dense"} else best[1]


def _home(backend: str) -> str:
    """The layout that a backend is measured in."""
    return BACKENDS[backend].layout or "rows"


def key(layer: SparseLinear, rank: int = 0) -> str:
    """What the times of layers that take the same time are filed under."""
    kept = layer.values.numel() / (layer.out_features * layer.in_features)
    pattern = f"{kept:.0%} kept" if layer.format == "bitmask" else f"{layer.n}:{layer.m}"
    dtype = str(layer.values.dtype).removeprefix("torch.")
    return f"{layer.out_features}x{layer.in_features} {dtype} {pattern} rank {rank}"


def cached_times(layer: SparseLinear, rank: int = 0) -> Times | None:
    """Times that were measured before on this device with these versions, or None.

    Raises:
        ValueError: the file is damaged.
    """
    entry = recall(layer.values.device, "backends", key(layer, rank))
    return None if entry is None else {int(tokens): dict(row) for tokens, row in entry.items()}


def tune(
    layer: SparseLinear, *, tokens: Sequence[int] = TOKENS, rank: int = 0, repeats: int = 20, again: bool = False
) -> Times:
    """Measure every backend that can run a layer like this one, and keep the times; measured before, read them.

    A scratch layer with the same mask and random inputs is timed, the backends in turn; ``layer`` is not changed.
    Each backend's result is compared with the dense one's before it is timed.

    Args:
        layer: the layer.
        tokens: counts of tokens to measure at.
        rank: of an adapter beside the weight, 0 for none.
        repeats: how often each is timed; the median counts.
        again: measure even if there are times.

    Raises:
        RuntimeError: a backend gives another result than the dense product.
        ValueError: a token count below 1, or the file of times is damaged.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens is {tuple(tokens)}; it must hold counts of at least 1")
    if not 0 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank}; it must be in 0..{MAX_RANK}")
    known = cached_times(layer, rank) or {}
    if not again and known.keys() >= set(tokens):
        return {count: known[count] for count in tokens}
    names = [name for name, reason in candidates(layer, rank).items() if reason is None]
    times: Times = {count: {} for count in tokens}
    device, dtype = layer.values.device, layer.values.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    lora = (normal(rank, layer.in_features), normal(layer.out_features, rank), 1.0) if rank else None
    # An inference tensor could not be trained with later, and autocast would be timed in another dtype.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        scratch = SparseLinear.from_dense(layer.to_dense(), plan=Plan("rows", ((None, "compressed"),)))
        for layout in ("rows", "fragments"):
            # Dense is a contestant in both, so that each is compared with it under the same conditions.
            here = [name for name in names if _home(name) == layout]
            if not here:
                continue
            scratch.adopt(Plan(layout, tuple((None, name) for name in [*here, "dense"])))
            for count in tokens:
                x = normal(count, layer.in_features)
                runs: dict[str, Callable[[], Tensor]] = {
                    name: (lambda name=name, x=x: BACKENDS[name].run(scratch, x, lora))  # type: ignore[misc]
                    for name in {**dict.fromkeys(here), "dense": None}
                }
                _compare(runs, scratch, x, lora)
                measured = time_in_turn(runs, device, repeats)
                earlier = times[count].get("dense")
                if earlier is not None:  # by layouts, dense may be a little faster once; ratios are what counts
                    scale = earlier / measured["dense"]
                    measured = {name: seconds * scale for name, seconds in measured.items()}
                times[count] |= measured
    keep(device, "backends", key(layer, rank), {str(count): row for count, row in sorted((known | times).items())})
    return times


def _compare(
    runs: Mapping[str, Callable[[], Tensor]], layer: SparseLinear, x: Tensor, lora: tuple[Tensor, Tensor, float] | None
) -> None:
    """Raise a RuntimeError unless every backend's error is that of the dense product in the same dtype, or twice it."""
    wide = torch.float64 if x.device.type == "cpu" or layer.values.dtype == torch.float32 else torch.float32
    bias = None if layer.bias is None else layer.bias.to(wide)
    exact = F.linear(x.to(wide), layer.weight.to(wide), bias)
    if lora is not None:
        exact = exact + lora[2] * F.linear(F.linear(x.to(wide), lora[0].to(wide)), lora[1].to(wide))
    scale = float(exact.abs().max()) or 1.0
    errors = {name: float((run().to(wide) - exact).abs().max()) / scale for name, run in runs.items()}
    allowed = 2 * errors["dense"] + torch.finfo(layer.values.dtype).eps
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        raise RuntimeError(f"wrong results at {key(layer)}: relative errors {wrong}, dense has {errors['dense']:.1e}")


def time_in_turn(runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each of ``runs``, one after the other in every round, so that drift meets all of them.

    On a GPU by events, with the L2 cache overwritten before each run; the GPU is kept waiting meanwhile, so that the
    time in which Python launches the kernels does not count.
    """
    for run in runs.values():  # compiles, allocates
        run()
    if device.type != "cuda":
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(row) for name, row in seconds.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    with torch.cuda.device(device):
        for _ in range(repeats):
            for name, run in runs.items():
                flush.zero_()
                torch.cuda._sleep(_WAIT_CYCLES)
                start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start_event.record()
                run()
                end_event.record()
                events[name].append((start_event, end_event))
        torch.cuda.synchronize(device)
    return {name: statistics.median(a.elapsed_time(b) for a, b in row) / 1e3 for name, row in events.items()}


def choose_plan(layer: SparseLinear, prefer: Prefer, times: Times | None) -> Plan | None:
    """The plan for ``layer``: from ``times`` on a GPU, else the default; None where it should stay dense."""
    if layer.values.is_cuda and times is not None:
        return plan_from(times, prefer)
    return default_plan(layer, prefer)


def tune_on_use(layer: SparseLinear, prefer: Prefer) -> None:
    """Measure, and plan for a layer that is in use already: all dense where dense always wins. The CPU has one plan."""
    device = layer.values.device
    if device.type == "cuda":
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            layer.adopt(plan_from(tune(layer), prefer) or Plan("rows", ((None, "dense"),)))
