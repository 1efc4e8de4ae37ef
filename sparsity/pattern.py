"""Sparsity patterns: which weights of a matrix [rows = outputs, cols = inputs] may stay.

A pattern fixes the exact number of kept weights; a metric only decides which ones they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["row", "balanced", "layer", "global"]
SCOPES: tuple[str, ...] = get_args(Scope)


def _check_sparsity(sparsity: float) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise ValueError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:  # also false for NaN
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")


def _percent(sparsity: float) -> str:
    """Six digits, and all of them where six would say 100%."""
    text = f"{sparsity * 100:.6g}"
    return f"{text if float(text) < 100 else sparsity * 100}%"


def kept_of(count: int, sparsity: float) -> int:
    """Number of ``count`` weights that stay at ``sparsity``: the pruned share is rounded to the nearest."""
    return count - round(count * sparsity)


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Single weights anywhere, ``sparsity`` in [0, 1) of them pruned.

    ``scope`` is the set that weights compete in: ``"row"`` (each output by itself, all with the same number;
    Wanda, section 3), ``"balanced"`` (each output by itself, and the number is that of the matrix: where its rows
    cannot share it evenly, the first ones keep one more), ``"layer"`` (each matrix; PERP's magnitude pruning of
    language models) or ``"global"`` (all matrices together; PERP, section 2.3, vision).

    Raises:
        ValueError: ``sparsity`` outside [0, 1) or an unknown ``scope``.
    """

    sparsity: float
    scope: Scope = "row"

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be 'row', 'balanced', 'layer' or 'global', got {self.scope!r}")

    def __str__(self) -> str:
        text = _percent(self.sparsity)
        return text if self.scope == "row" else f"{text} {self.scope}"


def kept_per_row(pattern: Unstructured, rows: int, cols: int) -> tuple[int, int]:
    """(k, more) for scope ``"row"`` or ``"balanced"``: each of ``rows`` keeps k, the first ``more`` of them k + 1."""
    if pattern.scope == "row":
        return kept_of(cols, pattern.sparsity), 0
    return divmod(kept_of(rows * cols, pattern.sparsity), rows)


@dataclass(frozen=True, slots=True)
class NM:
    """``n`` of every ``m`` consecutive inputs of an output are kept, 1 <= n < m <= 32 (2:4 on Ampere and later).

    Raises:
        ValueError: ``n`` or ``m`` out of range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} of an n:m pattern must be an integer, got {value!r}")
        if not 2 <= self.m <= 32:
            raise ValueError(f"m of an n:m pattern must be in 2..32, got {self.m}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"n of an n:m pattern must be in 1..m-1 = 1..{self.m - 1}, got {self.n}")

    @property
    def sparsity(self) -> float:
        """Pruned share, 1 - n/m."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows (outputs of a linear, filters of a convolution), ``sparsity`` in [0, 1) of them pruned.

    A row's score is the l2 norm of its weights' scores.

    Raises:
        ValueError: ``sparsity`` outside [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"{_percent(self.sparsity)} rows"


Pattern = Unstructured | NM | Rows

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%(?:\s+(row|balanced|layer|global|rows))?")
_N_OF_M = re.compile(r"(\d+)\s*:\s*(\d+)")


def parse_pattern(sparsity: float | str | Pattern) -> Pattern:
    """Turn ``0.5``, ``"50%"``, ``"50% layer"``, ``"50% rows"``, ``"2:4"`` or a pattern into a pattern.

    ``str()`` of every pattern reads back as the same pattern, to six digits of its sparsity.

    Raises:
        ValueError: anything else, or a value that the pattern refuses.
    """
    if isinstance(sparsity, Unstructured | NM | Rows):
        return sparsity
    if isinstance(sparsity, str):
        text = sparsity.strip()
        if found := _N_OF_M.fullmatch(text):
            return NM(int(found[1]), int(found[2]))
        if found := _PERCENT.fullmatch(text):
            share = float(found[1]) / 100
            if found[2] == "rows":
                return Rows(share)
            return Unstructured(share, scope=found[2] or "row")  # type: ignore[arg-type]
        try:
            return Unstructured(float(text))
        except ValueError:
            raise ValueError(
                f"sparsity {sparsity!r} is not understood; use a number in [0, 1), '50%', '50% balanced', "
                "'50% layer', '50% global', '50% rows', '2:4' or a Pattern"
            ) from None
    _check_sparsity(sparsity)
    return Unstructured(float(sparsity))
