"""From real numbers to whole ones, with the sum exact: shares of a budget, kept weights, and n of n:m."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = Sequence[float] | npt.NDArray[np.float64]

_HALVINGS = 200  # of an interval: more than a float has bits
_SUMS = 1 << 16  # running sums that are all looked at; of more, those near the ideal
_TABLE = 1 << 30  # bytes: one for each layer and running sum
_DECIMALS = 6  # of a count of weights: what is left of it is the solver's rounding, which must not decide ties


def spread(
    slope: Numbers, low: Numbers, high: Numbers, total: float, *, base: Numbers | None = None
) -> npt.NDArray[np.float64]:
    """x_i = base_i + c · slope_i, held within [low_i, high_i], for the one c with which they sum up to ``total``.

    What a bound takes from one x_i, the others share, as ERK does where a density would exceed 1.

    Args:
        slope: positive numbers.
        low, high: bounds, low_i <= high_i.
        total: the sum.
        base: 0 by default.

    Raises:
        ValueError: ``total`` is not between the sums of the bounds.
    """
    slopes, lows, highs = (np.asarray(values, dtype=np.float64) for values in (slope, low, high))
    bases = np.zeros_like(slopes) if base is None else np.asarray(base, dtype=np.float64)
    slack = 1e-9 * max(1.0, abs(total))
    if not lows.sum() - slack <= total <= highs.sum() + slack:
        raise ValueError(f"total must be between {lows.sum():g} and {highs.sum():g}, got {total:g}")
    below, above = float(((lows - bases) / slopes).min()), float(((highs - bases) / slopes).max())
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if np.clip(bases + middle * slopes, lows, highs).sum() < total:
            below = middle
        else:
            above = middle
    return np.asarray(np.clip(bases + above * slopes, lows, highs))


def largest_remainder(ideal: Numbers, total: int) -> list[int]:
    """Each number rounded down, or up for those with the largest fractions, so that the sum is ``total``.

    Equal fractions: the lower index is rounded up.

    Raises:
        ValueError: ``ideal`` does not sum up to ``total``, but for the rounding of floats.
    """
    exact = np.asarray(ideal, dtype=np.float64).round(_DECIMALS)
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    fractions = exact - counts
    if not 0 <= missing <= np.count_nonzero(fractions):
        raise ValueError(f"ideal must sum up to {total}, got {math.fsum(exact):g}")
    counts[np.argsort(-fractions, kind="stable")[:missing]] += 1
    return [int(count) for count in counts]


def whole_n(ideal: Numbers, groups: Sequence[int], m: int, least: Sequence[int], total: int) -> list[int]:
    """n_i in least_i..m with Σ n_i groups_i = ``total``, nearest to ``ideal``: least Σ groups_i (n_i − ideal_i)².

    By dynamic programming over the running sum, which is kept near that of ``ideal`` and given more room only where
    nothing else meets the total. Layers of equal size get what the largest remainder would give them.

    Args:
        ideal: real-valued n of each layer; Σ ideal_i groups_i = ``total``.
        groups: groups of m weights in each layer.
        m: size of a group; n = m is a dense layer.
        least: smallest n of each layer.
        total: kept weights in all.

    Raises:
        ValueError: no choice meets the total.
    """
    unit = math.gcd(*groups)
    sizes = [count // unit for count in groups]
    if total % unit:
        raise ValueError(f"no n of n:{m} for each layer gives {total} kept weights in all")
    whole = m * sum(sizes)
    room = min(whole, max(_SUMS, 4 * max(sizes)))
    while True:
        if len(sizes) * 2 * room > _TABLE:
            raise ValueError(
                f"{len(sizes)} layers of up to {max(groups)} groups, whose common divisor is {unit}: too many ways to "
                f"share {total} weights exactly by n of n:{m}; choose n yourself (PerLayer)"
            )
        found = _whole_n_within(np.asarray(ideal, dtype=np.float64), sizes, m, least, total // unit, room)
        if found is not None:
            return found
        if room == whole:
            raise ValueError(f"no n of n:{m} for each layer gives {total} kept weights in all")
        room = min(whole, 4 * room)


def _whole_n_within(
    ideal: npt.NDArray[np.float64], sizes: Sequence[int], m: int, least: Sequence[int], total: int, room: int
) -> list[int] | None:
    """:func:`whole_n` with running sums at most ``room`` away from those of ``ideal``; None if that reaches nothing."""
    centers = [0, *(round(value) for value in np.cumsum(ideal * sizes))]
    width = 2 * room + 1
    cost = np.full(width, np.inf)
    cost[room] = 0.0  # the empty sum
    choices = np.zeros((len(sizes), width), dtype=np.int8)
    for i, size in enumerate(sizes):
        reached = np.full(width, np.inf)
        for n in range(least[i], m + 1):  # ascending, and only what is better wins: earlier layers get the larger n
            step = centers[i] + n * size - centers[i + 1]
            start, stop = max(0, step), min(width, width + step)
            if start >= stop:
                continue
            candidate = cost[start - step : stop - step] + size * (n - ideal[i]) ** 2
            better = candidate < reached[start:stop]
            reached[start:stop][better] = candidate[better]
            choices[i, start:stop][better] = n
        cost = reached
    place = total - centers[-1] + room
    if not 0 <= place < width or not np.isfinite(cost[place]):
        return None
    chosen = []
    for i in range(len(sizes) - 1, -1, -1):
        n = int(choices[i, place])
        chosen.append(n)
        place += centers[i + 1] - n * sizes[i] - centers[i]
    return chosen[::-1]
