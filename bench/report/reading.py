"""What the sections of the report read from a row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from trisparse.bench.rows import Row, quick

Key = TypeVar("Key", bound=Hashable)
PAPERS = "papers/"  # names of benchmarks that are a paper's table begin so


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """The rows by ``key``, keys in the order of their first row."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


NAME = ("benchmark", "case", "contestant", "kind")  # the columns of name()


def name(row: Row) -> tuple[str, str, str, str]:
    """What a table calls it."""
    return row.benchmark, row.case, row.contestant, "bound" if row.kind == "bound" else "measured"


def place(row: Row) -> tuple[str, str, str]:
    """What one chart may hold together: no two models or devices, and bounds never among what was measured."""
    return of_model(row), device(row), row.kind


def of_model(row: Row) -> str:
    """The benchmark, with the model where its rows are of one; what ``--quick`` measured is apart from the rest."""
    named = row.benchmark if (found := model(row)) is None else f"{row.benchmark}, {found}"
    return f"{named}, quick" if quick(row) and row.kind != "bound" else named


def device(row: Row) -> str:
    """What it ran on, a CPU by its model; or the GPU that bounds hold for, where they name one."""
    if row.kind == "bound" and (gpu := row.parameters.get("gpu")):
        return str(gpu)
    return processor(row.environment) if row.device == "cpu" else row.device


def processor(environment: Mapping[str, Any]) -> str:
    model = re.sub(r"\((R|TM|tm)\)|CPU|Processor|@.*", " ", str((environment.get("cpu") or {}).get("model") or "CPU"))
    return " ".join(model.split()) or "CPU"


def finite(value: Any) -> float | None:
    """``value`` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def positive(value: Any) -> float | None:
    """``value`` where it is a finite number above zero, which a log axis can show."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def perplexity(row: Row) -> float | None:
    return positive(row.metrics.get("perplexity"))


def sparsity(row: Row) -> float | None:
    """The share of pruned weights, from 0.5, ``"50%"`` or ``"2:4"`` (two of four stay)."""
    given = row.parameters.get("sparsity", row.metrics.get("sparsity"))
    if isinstance(given, str):
        if match := re.fullmatch(r"\s*([\d.]+)\s*%.*", given):
            return float(match[1]) / 100
        if match := re.fullmatch(r"(\d+):(\d+)", given):
            return 1 - int(match[1]) / int(match[2])
        return None
    return finite(given)


def pattern(row: Row) -> str | None:
    """``"2:4"`` and the like where the row is of such a pattern."""
    for given in (row.parameters.get("pattern"), row.parameters.get("sparsity")):
        if isinstance(given, str) and re.fullmatch(r"\d+:\d+", given):
            return given
    return None


def phase(row: Row) -> str:
    """Prefill, decode or train: the first word of the case where no parameter says it."""
    return str(row.parameters.get("phase") or row.parameters.get("mode") or (row.case.split() or [""])[0])


def model(row: Row) -> str | None:
    given = row.parameters.get("model")
    return None if given is None else str(given)


def intensity_and_rate(row: Row) -> tuple[float, float] | None:
    """FLOP/byte and TFLOP/s: by GB/s and TFLOP/s where both are there, else by the metrics ``flops`` and ``bytes`` and
    the time, which is ``bound_us`` where it was counted.
    """
    moved, rate = positive(row.gb_per_s), positive(row.tflop_per_s)
    if moved is not None and rate is not None:
        return 1e3 * rate / moved, rate
    flops, transfer = positive(row.metrics.get("flops")), positive(row.metrics.get("bytes"))
    counted, measured = positive(row.metrics.get("bound_us")), positive(row.seconds.get("median"))
    taken = measured if counted is None else counted / 1e6
    if flops is None or transfer is None or taken is None:
        return None
    return flops / transfer, flops / taken / 1e12


@dataclass(frozen=True)
class Peaks:
    """A device's peaks as the runner noted them: GB/s, TFLOP/s and the dtype of the latter."""

    gb_per_s: float
    tflop_per_s: float
    dtype: str


def peaks(row: Row) -> Peaks | None:
    """Both peaks of the device; None where one is unknown."""
    given = row.environment.get("peaks") or {}
    moved, done = positive(given.get("bytes_per_s")), positive(given.get("flops_per_s"))
    return None if moved is None or done is None else Peaks(moved / 1e9, done / 1e12, str(given.get("dtype")))


def whole_model(row: Row) -> bool:
    """Whether its tokens/s are a model's, and not those of one layer, which names its rows and columns."""
    return not {"rows", "cols"} <= row.parameters.keys()
