"""Sparsity schedules of iterative pruning: how sparse each cycle leaves the model.

s_0 present sparsity, s_n target, cycle i = 1 .. n

linear      s_i = s_0 + (s_n - s_0) i/n
cubic       s_i = s_n + (s_0 - s_n) (1 - i/n)³        Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, eq. 1
geometric   1 - s_i = (1 - s_0) ((1 - s_n) / (1 - s_0))^(i/n)      the same fraction of the remaining weights goes in
            each cycle: Frankle & Carbin 2019, https://arxiv.org/abs/1803.03635, section 2; Renda et al. 2020
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

from trisparse.sparsity.pattern import NM, Pattern

SparsitySchedule = Literal["linear", "cubic", "geometric"]
SCHEDULES: tuple[str, ...] = get_args(SparsitySchedule)


def sparsity_schedule(schedule: SparsitySchedule, start: float, target: float, cycles: int) -> list[float]:
    """Sparsity after each of ``cycles`` cycles, from ``start`` (not listed) to exactly ``target``.

    Raises:
        ValueError: an unknown schedule, fewer than one cycle, or not 0 <= ``start`` < ``target`` < 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise ValueError(f"cycles must be an integer of at least 1, got {cycles!r}")
    if not 0 <= start < target < 1:
        raise ValueError(f"target must be above the present sparsity {start:.4%} and below 100%, got {target:.4%}")
    done = [cycle / cycles for cycle in range(1, cycles)]
    if schedule == "linear":
        rising = [start + (target - start) * share for share in done]
    elif schedule == "cubic":
        rising = [target + (start - target) * (1 - share) ** 3 for share in done]
    else:
        rising = [1 - (1 - start) * ((1 - target) / (1 - start)) ** share for share in done]
    return [*rising, target]


def pattern_schedule(schedule: SparsitySchedule, start: float, target: Pattern, cycles: int) -> list[Pattern]:
    """The pattern of each cycle, of the kind of ``target`` and each nested in the one before it.

    An n:m target is reached by n':m with n' falling, each rounded to the nearest; a cycle must prune at least one more
    of every m, so there are at most m - n of them.

    Raises:
        ValueError: as :func:`sparsity_schedule`, or an n:m target that the schedule does not reach in distinct steps.
    """
    rising = sparsity_schedule(schedule, start, target.sparsity, cycles)
    if not isinstance(target, NM):
        return [replace(target, sparsity=sparsity) for sparsity in rising]
    pruned = [round(target.m * sparsity) for sparsity in rising]
    before = [start * target.m, *pruned]
    if any(after <= earlier for earlier, after in zip(before, pruned, strict=False)):
        steps = math.ceil(target.m - target.n - start * target.m)
        sequence = " -> ".join(f"{target.m - count}:{target.m}" for count in pruned)
        raise ValueError(
            f"target {target} has no {cycles} ascending steps by the {schedule} schedule: from {start:.4g} sparsity it "
            f"would go {sequence}; use at most {steps} cycles, with schedule='linear'"
        )
    return [NM(target.m - count, target.m) for count in pruned]
