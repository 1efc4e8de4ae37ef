"""Two sets of rows against each other: the ratio of the times of each case and contestant that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from trisparse.bench.rows import RESULTS, Row, identity, newest, read_rows, told_apart
from trisparse.bench.runner import OUTSIDE
from trisparse.env import checkout

_SHORTEST_COMMIT = 4


@dataclass(frozen=True)
class Change:
    """One case and contestant of both.

    Attributes:
        benchmark, case, contestant, device: what it is; the case names parameters where they alone tell two apart.
        before, after: median seconds, or seconds for one token where the rows give tokens/s alone.
        ratio: after over before; over 1 is slower.
        spread: the greater of both rows' p90 over min; None where a row has no seconds.
        noise: the times differ by less than the spread of either.
    """

    benchmark: str
    case: str
    contestant: str
    device: str
    before: float
    after: float
    ratio: float
    spread: float | None
    noise: bool


def find_rows(source: str) -> list[Row]:
    """The newest rows of ``source``, measurements alone.

    Args:
        source: a .jsonl file, a folder of such files (or with ``runs`` in it), the run id of rows, or the commit (at
            least four digits of it) that rows of this checkout were measured on, without changes.

    Raises:
        ValueError: there is nothing of that name, or it holds no rows.
    """
    path = Path(source)
    if path.is_file():
        rows = list(read_rows(path))
    elif path.is_dir():
        rows = list(read_rows(*(_files(path) or _files(path / "runs"))))
    else:
        rows = [row for row in read_rows(*_recorded()) if _is_of(row, source)]
    rows = [row for row in newest(rows) if row.kind == "measurement"]
    if not rows:
        raise ValueError(
            f"{source!r} has no rows of benchmarks: give a .jsonl file, a folder of them, a run id or a commit"
        )
    return rows


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _recorded() -> list[Path]:
    root = checkout()
    folders = [OUTSIDE] if root is None else [root / RESULTS / "runs", root / RESULTS / "dirty", OUTSIDE]
    return [file for folder in folders for file in _files(folder)]


def _is_of(row: Row, name: str) -> bool:
    commit = row.environment.get("commit") or ""
    clean = not row.environment.get("dirty")  # a changed checkout is not what the commit names
    return row.run == name or (clean and len(name) >= _SHORTEST_COMMIT and commit.startswith(name))


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The changes of what both have and what was timed in both.

    Raises:
        ValueError: they have nothing in common.
    """
    known = {identity(row): row for row in before}
    changes = []
    after = [row for row in after if identity(row) in known]
    for row, named in zip(after, told_apart(after), strict=True):
        old = known[identity(row)]
        was, now = _seconds(old), _seconds(row)
        if was is None or now is None:
            continue
        ratio = now / was
        spreads = [found.seconds["p90"] / found.seconds["min"] for found in (old, row) if found.seconds]
        spread = max(spreads) if len(spreads) == 2 else None
        noise = spread is not None and max(ratio, 1 / ratio) <= spread
        place = (named.benchmark, named.case, named.contestant, named.device)
        changes.append(Change(*place, was, now, ratio, spread, noise))
    if not changes:
        raise ValueError("the two have no timed case and contestant with the same parameters and device in common")
    return changes


def _seconds(row: Row) -> float | None:
    if row.seconds:
        return row.seconds["median"]
    return 1 / row.tokens_per_s if row.tokens_per_s else None


def as_table(changes: Sequence[Change]) -> Table:
    """One line for each change; what is noise says so."""
    table = Table("benchmark", "case", "contestant", title="after / before: over 1 is slower")
    for heading in ("before", "after", "ratio", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for change in changes:
        spread = "" if change.spread is None else f"{change.spread:.2f}"
        verdict = "noise" if change.noise else "slower" if change.ratio > 1 else "faster"
        times = (f"{1e3 * change.before:.3f} ms", f"{1e3 * change.after:.3f} ms")
        name = map(escape, (change.benchmark, change.case, change.contestant))
        table.add_row(*name, *times, f"{change.ratio:.2f}", spread, verdict)
    return table
