"""One progress bar for everything that takes long: done, total and the time left; transformers' own are hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils import logging


class Advance(Protocol):
    """Moves a progress bar on; ``note`` replaces the text behind the bar."""

    def __call__(self, steps: float, note: str = "") -> None: ...


@contextmanager
def progress_bar(label: str, total: int, *, enabled: bool = True) -> Iterator[Advance]:
    """Show a bar on stderr, if that is a terminal, while open; it vanishes at the end."""
    with _bar(label, total, enabled) as (progress, task):
        yield lambda steps, note="": progress.update(task, advance=steps, note=note)


@contextmanager
def counting_bar(label: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """The same for work that counts by itself; yields a function of (done, total)."""
    with _bar(label, None, enabled) as (progress, task):
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _bar(label: str, total: int | None, enabled: bool) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        yield progress, progress.add_task(label, total=total, note="")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers' loading and saving while open."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
