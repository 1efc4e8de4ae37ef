"""The two charts of the report, bars and plots, as data: what the page and the PNGs both draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MUTED = -1  # colour of a baseline
SHOWN_CASES = 8  # of a chart of bars: the page unfolds the others, a PNG leaves them to it
_FAR = 5  # times as high as another group's highest bar: no common axis then

# Of Okabe and Ito's palette, which colour-blind readers can tell apart: blue, vermilion, green, purple, orange, sky.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8578c", "#c98a00", "#3f97cf")
MARKERS = ("circle", "square", "triangle", "diamond", "plus", "cross", "down")  # 7 to 6 colours: 42 pairs


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value and the colour, an index into COLORS or MUTED."""

    name: str
    value: float
    color: int


@dataclass(frozen=True)
class Bars:
    """Horizontal bars in groups, on one axis.

    Attributes:
        name: of the PNG, without its ending.
        title, axis: what is shown, and the axis with its unit.
        groups: label of the case, and its bars.
        text: a value as it is written beside its bar.
        reference: bars start here, on a log axis; None is a linear axis from 0.
        bound: the values were counted or computed; the bars are drawn hollow.
    """

    name: str
    title: str
    axis: str
    groups: Sequence[tuple[str, Sequence[Bar]]]
    text: Callable[[float], str]
    reference: float | None = None
    bound: bool = False

    @property
    def scales(self) -> list[Scale]:
        """The axis of each group: one for all, unless the bars of some would be too short beside others'."""
        groups = [[bar.value for bar in bars] for _, bars in self.groups]
        values = [value for group in groups for value in group]
        if self.reference is not None:
            return [Scale.around([*values, self.reference], log=True)] * len(groups)
        if self.own_scales:
            return [Scale(0.0, max(group), log=False) for group in groups]
        return [Scale(0.0, 1.02 * max(values), log=False)] * len(groups)

    @property
    def own_scales(self) -> bool:
        highest = [max(bar.value for bar in bars) for _, bars in self.groups]
        return self.reference is None and max(highest) > _FAR * min(highest)

    @property
    def label(self) -> str:
        """Of the axis."""
        return f"{self.axis}; each case has a scale of its own" if self.own_scales else self.axis


@dataclass(frozen=True)
class Point:
    """A point and what is said of it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker; ``line`` joins them, ``hollow`` marks bounds."""

    name: str
    points: Sequence[Point]
    line: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Guide:
    """A line without markers: a frontier or a device's roof."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit."""

    label: str
    log: bool
    text: Callable[[float], str]


@dataclass(frozen=True)
class Plot:
    """Points over two axes; ``name`` is that of the PNG."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    guides: Sequence[Guide] = ()

    def scales(self) -> tuple[Scale, Scale]:
        points = [(point.x, point.y) for series in self.series for point in series.points]
        points += [point for guide in self.guides for point in guide.points]
        return (
            Scale.around([x for x, _ in points], log=self.x.log),
            Scale.around([y for _, y in points], log=self.y.log),
        )


Chart = Bars | Plot


@dataclass(frozen=True)
class Scale:
    """From values to the share of an axis, 0 to 1."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool) -> Scale:
        """A scale with room on both sides of ``values``."""
        values = list(values)
        low, high = min(values), max(values)
        if log:
            room = max((high / low) ** 0.06, 1.08)
            return cls(low / room, high * room, log=True)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, log=False)

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the scale: at least two where there are as many, and about ``most`` at the most."""
        return self._log_ticks(most) if self.log else self._steps(most)

    def _steps(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) <= most:
                break
        if len(ticks) < 3:  # a scale too short for such numbers
            return self._steps(most)
        return ticks[:: math.ceil(len(ticks) / most)]


def pareto_frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (speed, perplexity) that no other beats: none is at least as fast with a perplexity at most as large
    and better in one of both. By rising speed, each once.
    """
    frontier: list[tuple[float, float]] = []
    for speed, perplexity in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not frontier or perplexity < frontier[-1][1]:
            frontier.append((speed, perplexity))
    return frontier[::-1]
