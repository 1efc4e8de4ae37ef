"""A table as Markdown, as JSON and as a picture: ours, the paper's, and the difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trisparse.bench.papers.run import Comparison, settings
from trisparse.bench.papers.table import Place, published_paper
from trisparse.env import environment


def markdown(found: Comparison, command: str) -> str:
    """The table three times, ours, published and the difference, with what was done and what differs."""
    table, published = found.table, found.published
    lines = [f"# {table.title}: {table.about}", ""]
    lines += [f"{table.metric}; {found.model} at scale `{found.scale.name}`: {_described(found)}.", ""]
    lines += [*(f"{note}\n" for note in found.layout.notes)]
    lines += ["## Ours", "", *_grid(found, found.ours, deviations=found.deviations)]
    if found.dense is not None:
        lines += ["", f"The dense model has {_number(found.dense)}."]
    if published is None:
        lines += ["", "The paper shows this as a picture, without numbers."]
    else:
        title = f"## Published, {published.model}"
        lines += ["", title, "", *_grid(found, {place: found.theirs(place) for place in found.ours})]
        if published.dense is not None:
            lines += ["", f"The dense model has {_number(published.dense)}."]
        lines += ["", *_differences(found)]
    lines += ["", f"Its {len(found.records)} cells took {found.seconds:.0f} s. Measured by", "", f"    {command}", ""]
    return "\n".join(lines)


def as_json(found: Comparison, command: str) -> dict[str, Any]:
    """All of it, with each number's cells and where these were measured."""
    rows = []
    for place, one in found.layout.entries.items():
        ours, theirs = found.ours[place], found.theirs(place)
        row: dict[str, Any] = {"row": place[0], "column": place[1], "metric": one.metric, "ours": ours}
        row |= {"published": theirs, "difference": found.difference(place)}
        if (deviation := found.deviations[place]) is not None:
            row["deviation"] = deviation
        rows.append({**row, "cells": [cell.key for cell in one.cells], "minus": [cell.key for cell in one.minus]})
    return {
        "table": found.table.name,
        "title": found.table.title,
        "about": found.table.about,
        "metric": found.table.metric,
        "source": published_paper(found.table.paper)["source"],
        "model": found.model,
        "scale": found.scale.name,
        "settings": settings(found.scale),
        "dense": found.dense,
        "published_model": None if found.published is None else found.published.model,
        "published_dense": None if found.published is None else found.published.dense,
        "same_model": found.published is not None and found.published.same_model,
        "other_task": found.layout.other_task,
        "notes": list(found.layout.notes),
        "rows": rows,
        "cells": {
            key: {"spec": record.spec, "metrics": record.metrics, "seconds": record.seconds, "time": record.time}
            | {"commit": record.environment.get("commit"), "dirty": record.environment.get("dirty")}
            for key, record in found.records.items()
        },
        "command": command,
        "environment": environment(),
    }


def write(found: Comparison, folder: Path, command: str, *, picture: bool = True) -> list[Path]:
    """NAME-MODEL-SCALE.md, .json and .png in ``folder``; the picture needs matplotlib, the extra ``plot``."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{found.table.name}-{found.model.replace(' ', '-').lower()}-{found.scale.name}"
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".md", ".json", ".png")]
    files[0].write_text(markdown(found, command), "utf-8")
    files[1].write_text(json.dumps(as_json(found, command), indent=1) + "\n", "utf-8")
    if not picture:
        return files[:2]
    from trisparse.bench.papers.plot import draw

    draw(found, files[2])
    return files


def _described(found: Comparison) -> str:
    if found.layout.settings:
        return found.layout.settings
    scale = found.scale
    length = scale.context(found.model)
    batch = (
        "the paper's batch" if scale.batch_size is None else f"{scale.batch_size * (scale.accumulation or 1)} windows"
    )
    tested = "all" if scale.test_windows is None else scale.test_windows
    return (
        f"{scale.samples} calibration windows, retraining of {scale.steps} steps of {batch}, {tested} test windows, "
        f"each of {length} tokens; {scale.train} to train on, {scale.test} to test on"
    )


def _differences(found: Comparison) -> list[str]:
    published = found.published
    assert published is not None
    if found.layout.other_task:
        return [f"No difference is taken: ours is {found.layout.other_task}, which is another task than the paper's."]
    heading = "## Difference, ours minus published"
    lines = [heading, "", *_grid(found, {place: found.difference(place) for place in found.ours}, signed=True)]
    if published.same_model:
        return lines
    lines += ["", f"Ours is another model on other data than {published.model}: what can be compared is the shape."]
    if found.dense is not None and published.dense is not None:
        ours, theirs = _over_dense(found)
        lines += ["", "## Times the perplexity of the dense model, ours / published", ""]
        lines += _lines(found, lambda place: f"{_number(ours.get(place))} / {_number(theirs.get(place))}")
    return lines


def _over_dense(found: Comparison) -> tuple[dict[Place, float], dict[Place, float]]:
    published = found.published
    assert found.dense is not None
    assert published is not None
    assert published.dense is not None
    of_perplexity = [place for place, one in found.layout.entries.items() if one.metric == "perplexity"]
    ours = {place: value / found.dense for place in of_perplexity if (value := found.ours[place]) is not None}
    theirs = {place: value / published.dense for place in of_perplexity if (value := found.theirs(place)) is not None}
    return ours, theirs


def _grid(
    found: Comparison,
    values: dict[Place, float | None],
    *,
    signed: bool = False,
    deviations: dict[Place, float | None] | None = None,
) -> list[str]:
    def shown(place: Place) -> str:
        text = _number(values.get(place), signed=signed)
        spread = None if deviations is None else deviations.get(place)
        return text if spread is None else f"{text} ± {spread:.2g}"

    return _lines(found, shown)


def _lines(found: Comparison, shown: Any) -> list[str]:
    columns = found.columns
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in found.rows:
        cells = [shown((row, column)) if (row, column) in found.layout.entries else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 0.1 or value == 0 else 3
    return f"{value:{sign},.{digits}f}"
