"""Measured cells in a file of JSON lines, appended as each is done, so that a killed run loses one cell at most.

Several processes may share a file: a line is written whole under a lock. A last line without an end, of a process that
was killed while it wrote, is left out when reading and cut off by the next write.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trisparse.bench.papers.cell import Cell
from trisparse.env import environment


@dataclass(frozen=True)
class Record:
    """One measured cell.

    Attributes:
        spec: of the cell.
        metrics: what was measured.
        seconds: wall time of it all.
        time: when it ended, UTC, ISO 8601.
        environment: :func:`trisparse.env.environment`, with commit and dirty flag.
        device: "cpu" or the GPU's name; lines that do not say are from before there were others than CPUs.
    """

    spec: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    time: str
    environment: dict[str, Any]
    device: str = "cpu"


class CellStore:
    """The cells in ``file``, which need not exist yet.

    Raises:
        ValueError: a whole line is no record, with the file and the line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._records: dict[str, Record] = {}
        self._read = 0  # bytes, of whole lines
        self._lines = 0
        self._environment: dict[str, Any] | None = None
        self._refresh()

    def record(self, cell: Cell) -> Record | None:
        """What was measured of ``cell``, by any process, or None."""
        self._refresh()
        return self._records.get(cell.key)

    def metrics(self, cell: Cell) -> dict[str, float]:
        """Numbers of ``cell`` by name; empty where it was not measured."""
        record = self.record(cell)
        return {} if record is None else record.metrics

    def add(self, cell: Cell, metrics: Mapping[str, float], seconds: float, device: str = "cpu") -> None:
        """Append what was measured of ``cell``; it takes the place of an earlier record."""
        if self._environment is None:
            self._environment = environment()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        content = {
            "key": cell.key,
            "spec": cell.spec,
            "metrics": dict(metrics),
            "seconds": seconds,
            "time": now,
            "environment": self._environment,
            "device": device,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as lines:
            fcntl.flock(lines, fcntl.LOCK_EX)
            lines.seek(0)
            whole = lines.read()
            if whole and not whole.endswith(b"\n"):
                lines.truncate(whole.rfind(b"\n") + 1)
            lines.write(json.dumps(content, sort_keys=True).encode() + b"\n")
            lines.flush()
            os.fsync(lines.fileno())
        self._refresh()

    def _refresh(self) -> None:
        if not self.file.is_file():
            return
        with self.file.open("rb") as lines:
            lines.seek(self._read)
            new = lines.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            try:
                content = json.loads(line)
                key = content.pop("key")
                self._records[key] = Record(**content)
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{self.file}:{self._lines} is no measured cell: {error}") from error
        self._read += len(whole)
