"""The log of a search: one JSON object a line, from which the whole state is rebuilt.

The first line is the header: settings, model, data and versions. Each further line is one evaluation (or reference),
written and synced before the next one starts; at the end stands a summary. A line that a crash tore is dropped when the
log is opened again, and so is the summary, which is written anew.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# A longer run continues a shorter one, and other versions are noted, not refused.
_MAY_DIFFER = ("versions", "iterations", "name")  # the model's hash stands beside its name


_BEGINNING = b'{"kind": "header"'


class LogError(RuntimeError):
    """A log cannot be continued: it is damaged, or belongs to another search."""


class SearchLog:
    """Opens ``path`` to go on with it, or begins it with ``header``.

    Attributes:
        records: the evaluations and references that the log had when it was opened.

    Raises:
        LogError: the log's header differs from ``header`` (with the first difference), or a line is damaged.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self.records: list[Record] = []
        header = {"kind": "header", **json.loads(json.dumps(header))}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise LogError(f"{path} is in use: another search runs in this folder") from error
        try:
            self._end = self._read(header)
        except BaseException:
            self._file.close()
            raise
        if not self._end:
            self.append(header)

    def _read(self, header: Record) -> int:
        """Take in the records that are there; returns where the next one goes."""
        path = self.path
        self._file.seek(0)
        content = self._file.read()
        if content and b"\n" not in content and not content.startswith(_BEGINNING[: len(content)]):
            raise LogError(f"{path} is no log of a search")
        whole = content[: content.rfind(b"\n") + 1]
        end = 0
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise LogError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(record, dict) or "kind" not in record:
                raise LogError(f"{path}, line {number} is no record of a search")
            if number == 1:
                _check_header(path, record, header)
            elif record["kind"] == "summary":
                break
            else:
                self.records.append(record)
            end += len(line)
        return end

    def append(self, record: Record) -> None:
        """Write one line; it is on the disk when this returns."""
        # NaN and infinity are no JSON: whoever writes them here has a defect.
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._file.truncate(self._end)  # a torn line or a summary goes only when there is something to write
        self._file.write(line)
        self._end += len(line)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _check_header(path: Path, found: Record, wanted: Record) -> None:
    if found.get("kind") != "header":
        raise LogError(f"{path} is no log of a search: its first line is no header")
    difference = _first_difference(found, wanted)
    if difference is not None:
        raise LogError(f"{path} is the log of another search: {difference}. Take a new folder, or the same settings")


def _first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in (*wanted, *(key for key in found if key not in wanted)):
            if key not in _MAY_DIFFER:
                inner = f"{name}.{key}" if name else key
                if (difference := _first_difference(found.get(key), wanted.get(key), inner)) is not None:
                    return difference
        return None
    return None if found == wanted else f"{name} was {found!r} and is now {wanted!r}"
