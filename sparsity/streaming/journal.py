"""What of a streamed prune is finished: one line of JSON for each part, in a file that only grows.

A line is written when all that it speaks of is on disk. A process that is killed leaves at most the beginning of a
line, which is cut off when the file is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_VERSION = 1
JOURNAL_FILE = "journal.jsonl"


class JournalError(ValueError):
    """The folder holds unfinished work that this call cannot go on with."""


class Journal:
    """The journal in the folder ``folder``, which is made; :meth:`close` lets another process have it.

    Attributes:
        lines: what runs before this one wrote after the settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with a run of the same settings.

        Raises:
            JournalError: another process works here, or the settings differ; names those that do.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL_FILE
        self._file = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise JournalError(f"another process is at work in {folder}: wait for it") from None
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
            try:
                self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
            except json.JSONDecodeError as error:
                raise JournalError(f"{path} is damaged ({error}): remove {folder} to start anew") from error
            if len(self.lines) > 1:
                self._check(folder, self.lines.pop(0), settings)
            else:  # new, or nothing was finished that other settings would spoil
                self.lines.clear()
                self._file.truncate(0)
                self._append({"version": _VERSION, "settings": dict(settings)})
        except BaseException:
            self._file.close()
            raise

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        self._append(line)

    def close(self) -> None:
        """Let another process have the folder."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def _check(folder: Path, first: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        if first.get("version") != _VERSION:
            raise JournalError(f"{folder} is of another version of trisparse: remove it to start anew")
        before = first["settings"]
        now = json.loads(json.dumps(dict(settings)))  # as they come back from a file
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            what = ", ".join(f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)" for name in names)
            raise JournalError(
                f"{folder} holds an unfinished run that differs in {what}: give the same command to go on with it, or "
                "remove the folder to start anew"
            )


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file, which appears as ``path`` whole or not at all, and stays there when power fails."""
    unfinished = path.with_name(f".{path.name}.unfinished")  # one name: what a killed process left is overwritten
    write(unfinished)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
