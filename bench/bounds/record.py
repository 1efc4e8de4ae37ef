"""Studies of bounds: what is counted, how a count becomes rows of ``roofline``, and the file that records it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trisparse.bench.registry import Measured

GPU = "A100-SXM-80GB"
SHOWN = (
    "bound_us", "flops", "bytes", "dram_us", "tensor_us", "shared_us", "issue_us", "bytes_over_compulsory", "registers",
    "spill_bytes",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"  # in a checkout; an installed package has none


@dataclass(frozen=True)
class Study:
    """Bounds of one kernel, or of several that belong together.

    Attributes:
        name: of the study.
        file: of its record in bench/results.
        cases: what is counted, each the keyword arguments that name it.
        count: the counts of a case, by emulation; takes seconds to minutes.
        names: of the rows that a case gives.
        rows: those rows, of a case with its counts.
        about: what the record says besides, such as peaks.
    """

    name: str
    file: str
    cases: Callable[[], Iterator[dict[str, Any]]]
    count: Callable[[dict[str, Any]], dict[str, Any]]
    names: Callable[[Mapping[str, Any]], tuple[str, ...]]
    rows: Callable[[Mapping[str, Any]], Iterator[Measured]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def counted(self, only: str = "") -> Iterator[dict[str, Any]]:
        """Cases with their counts, of those that have a row whose name contains ``only``."""
        for case in self.cases():
            if any(only in name for name in self.names(case)):
                yield {**case, **self.count(case)}

    def recorded(self) -> list[dict[str, Any]]:
        """The cases and counts of the record.

        Raises:
            FileNotFoundError: there is no record here.
        """
        file = RESULTS / self.file
        if not file.is_file():
            raise FileNotFoundError(f"there is no {self.file}: its records are in a checkout, in bench/results")
        found: list[dict[str, Any]] = json.loads(file.read_text())["results"]
        return found

    def record(self, folder: Path = RESULTS) -> None:
        """Count everything and write the record."""
        content = {
            "what": f"bounds counted from PTX by emulation, for an {GPU}; nothing was measured on a GPU",
            "how": f"python -m trisparse.bench.bounds {self.name}",
            **self.about,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "results": list(self.counted()),
        }
        (folder / self.file).write_text(json.dumps(content, indent=1) + "\n")


def figures(row: Mapping[str, Any], **renamed: str) -> dict[str, float]:
    """What a row of ``roofline`` shows of a case's counts, of those that it has; the record holds all.

    ``renamed`` says under which name the case has a figure, where that is another one. ``bytes`` are those of DRAM, and
    ``flops`` the operations of the dense product, or of the update: what the report's roofline shows.
    """
    found = {name: row.get(renamed.get(name, name)) for name in SHOWN}
    return {name: float(value) for name, value in found.items() if value is not None}


def bounded(
    name: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    baseline: str | None = None,
) -> Measured:
    """A row of counts; ``bound_us`` is the least time that they allow, ``speedup`` that of the baseline over it."""
    found = {contestant: dict(values) for contestant, values in metrics.items()}
    if baseline is not None:
        for values in found.values():
            values["speedup"] = found[baseline]["bound_us"] / values["bound_us"]
    return Measured(name, {"gpu": GPU, **parameters}, found, baseline=baseline, kind="bound")
