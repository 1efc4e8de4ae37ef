"""One JSON line for each contestant of a benchmark's case: what was measured, where, with what and by which command.

Rows of a clean checkout are appended to ``bench/results/runs/BENCHMARK.jsonl``, those of a changed one to
``bench/results/dirty/BENCHMARK.jsonl``, which git ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trisparse.bench.registry import Kind

RESULTS = Path("bench/results")
# Parameters that say what came out, where it was read or what else has the shape: the same measurement may have others
# next time.
_BESIDES = frozenset({"binding", "grid", "interleaved", "models", "patterns", "source"})


@dataclass(frozen=True)
class Row:
    """One contestant of one case.

    Attributes:
        benchmark, case, contestant, parameters: what it is; the runner adds ``quick`` to the parameters.
        kind: "measurement", or "bound" for what was counted or computed.
        baseline: the contestant that ``speedup`` is relative to, or None.
        seconds: ``min``, ``median`` and ``p90`` of ``repeats`` calls; empty where nothing was timed.
        speedup: median over the rounds of the baseline's seconds over the contestant's; None without a baseline.
        gb_per_s, tflop_per_s, tokens_per_s: at the median; None where the case does not give bytes, flops or tokens.
        roofline_share: the time that the device's peaks allow over the median time; None where unknown.
        metrics: other numbers: perplexity, peak_bytes, model_bytes, published, ...
        run: of all rows of one command; ``time`` (UTC, ISO 8601) when it began, or when what is read from a record was
            measured, whose ``environment`` and ``device`` it then has.
        command: that measured it.
        environment: :func:`trisparse.env.environment`, with ``commit`` and ``dirty``, and the device's clocks.
        device: "cpu" or the GPU's name.
    """

    benchmark: str
    case: str
    contestant: str
    parameters: dict[str, Any]
    kind: Kind
    device: str
    run: str
    time: str
    command: str
    environment: dict[str, Any]
    baseline: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    tokens_per_s: float | None = None
    roofline_share: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def rows_file(benchmark: str, *, dirty: bool, results: Path = RESULTS) -> Path:
    """Where rows of ``benchmark`` go."""
    return results / ("dirty" if dirty else "runs") / f"{benchmark.replace('/', '-')}.jsonl"


def append_rows(rows: Iterable[Row], file: Path) -> None:
    """Append one JSON line a row; what a killed run left of its last line is cut off first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    with file.open("a+b") as lines:
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)
        lines.write(text.encode())


def read_rows(*files: Path) -> Iterator[Row]:
    """The rows of JSON lines files, in order; a last line without its end was never finished and is left out.

    Raises:
        ValueError: a line is not a row, with the file and the line.
    """
    for file in files:
        finished = file.read_text(encoding="utf-8").split("\n")[:-1]
        for number, line in enumerate(finished, start=1):
            try:
                yield Row(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{file}:{number} is not a row of a benchmark: {error}") from error


def quick(row: Row) -> bool:
    """Whether ``--quick`` measured it; rows that do not say so are told by their command."""
    return bool(row.parameters.get("quick", "--quick" in row.command.split()))


def identity(row: Row) -> tuple[str, ...]:
    """What it is: rows of one identity are the same measurement, made again.

    All parameters count but those that only tell what came out. ``--quick`` counts bounds alike, and a paper's
    table says its scale, of which ``--quick`` is one.
    """
    asked = {key: value for key, value in row.parameters.items() if key not in _BESIDES and key != "quick"}
    if row.kind != "bound" and "scale" not in asked:
        asked["quick"] = quick(row)
    return (*_place(row), row.contestant, json.dumps(asked, sort_keys=True))


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each :func:`identity` the last row."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = identity(row)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def told_apart(rows: Iterable[Row]) -> list[Row]:
    """The rows; where a contestant of a case is there more than once, its case names the parameters that differ.

    For what shows rows by case and contestant: "prefill 1x256, 2:4" of two dtypes gives "prefill 1x256, 2:4
    (dtype bfloat16)" and "... (dtype float32)".
    """
    rows = list(rows)
    twins: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        twins.setdefault((*_place(row), row.contestant), []).append(_texts(row))
    differing: dict[tuple[str, ...], set[str]] = {}
    for key, found in twins.items():
        names = {name for one in found for name in one if len({other.get(name) for other in found}) > 1}
        differing.setdefault(key[:-1], set()).update(names)
    return [_with_case(row, sorted(differing[_place(row)])) for row in rows]


def _with_case(row: Row, names: Iterable[str]) -> Row:
    texts = _texts(row)
    words = ", ".join(f"{name} {texts[name]}" for name in names if name in texts)
    return replace(row, case=f"{row.case} ({words})") if words else row


def _texts(row: Row) -> dict[str, str]:
    found = {key: str(value) for key, value in row.parameters.items() if key not in _BESIDES}
    return found if row.kind == "bound" else found | {"quick": "yes" if quick(row) else "no"}


def _place(row: Row) -> tuple[str, ...]:
    return row.benchmark, row.case, row.device, row.kind
