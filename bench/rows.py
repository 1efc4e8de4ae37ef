"""One JSON line for each contestant of a benchmark's case: what was measured, where, with what and by which command.

Rows of a clean checkout are appended to ``bench/results/runs/BENCHMARK.jsonl``, those of a changed one to
``bench/results/dirty/BENCHMARK.jsonl``, which git ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trisparse.bench.registry import Kind

RESULTS = Path("bench/results")


@dataclass(frozen=True)
class Row:
    """One contestant of one case.

    Attributes:
        benchmark, case, contestant, parameters: what it is.
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


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each benchmark, case, contestant and device, and of each model and scale, the last row."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        of_model = (str(row.parameters.get("model")), str(row.parameters.get("scale")))
        key = (row.benchmark, row.case, row.contestant, row.device, *of_model)
        found.pop(key, None)
        found[key] = row
    return list(found.values())
