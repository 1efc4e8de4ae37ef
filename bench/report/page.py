"""The report: one HTML page that needs nothing else, and the PNGs of its charts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trisparse.bench.report import reading
from trisparse.bench.report.charts import Chart
from trisparse.bench.report.content import Content, Section, Table
from trisparse.bench.report.markup import Markup, element, join
from trisparse.bench.report.png import check_matplotlib, save_png
from trisparse.bench.report.reading import grouped
from trisparse.bench.report.sections import OTHER, SECTIONS
from trisparse.bench.report.style import SCRIPT, style
from trisparse.bench.report.svg import draw
from trisparse.bench.rows import Row, quick, told_apart

PAGE = "index.html"
_SHOWN = 4  # charts of a section before "show more"
_WORDS = 4  # columns of a table before its numbers
_OPEN = 3  # tables in the charts' stead that are unfolded; more are folded
Runs = Mapping[tuple[str, str], int]


def write_report(rows: Sequence[Row], out: Path, *, png: bool = True) -> list[Path]:
    """Write ``index.html`` and a PNG of each chart to the folder ``out``; files of these names are replaced.

    Args:
        rows: of any benchmarks, each measurement once (:func:`trisparse.bench.rows.newest`).
        out: folder; made where it is missing.
        png: write the PNGs, which need matplotlib.

    Returns:
        The files written, the page first.

    Raises:
        ValueError: there are no rows.
        ImportError: PNGs are asked for and matplotlib is missing.
    """
    if not rows:
        raise ValueError("there are no rows to report: run trisparse bench run first")
    if png:
        check_matplotlib()
    rows = [row for part in (False, True) for row in told_apart(row for row in rows if quick(row) is part)]
    contents = {section: section.build(rows) for section in (*SECTIONS, OTHER)}
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE
    page.write_text(render(rows, contents), encoding="utf-8")
    charts = [chart for content in contents.values() for chart in content.charts] if png else []
    return [page, *(save_png(chart, out / file) for file, chart in _png_names(charts).items())]


def _png_names(charts: Sequence[Chart]) -> dict[str, Chart]:
    """The charts by file; names that differ in what a file's name cannot hold get a number."""
    files: dict[str, Chart] = {}
    for chart in charts:
        file, number = f"{chart.name}.png", 2
        while file in files:
            file, number = f"{chart.name}-{number}.png", number + 1
        files[file] = chart
    return files


def render(rows: Sequence[Row], contents: Mapping[Section, Content]) -> str:
    """The page; it parses as XML, too."""
    ordered = sorted(rows, key=lambda row: row.time)
    runs = {key: number for number, key in enumerate(grouped(ordered, _run), start=1)}
    shown = {section: content for section, content in contents.items() if content.rows or section is not OTHER}
    links = [
        element("li", element("a", title, href=f"#{key}"))
        for key, title in (("summary", "Summary"), *((section.key, section.title) for section in shown))
    ]
    header = element(
        "header",
        element("h1", "trisparse benchmarks"),
        element("button", "Light or dark", id="theme", type="button", hidden="hidden"),
        element("p", f"{len(rows)} rows of {len({row.benchmark for row in rows})} benchmarks, {_dates(ordered)}"),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", "trisparse benchmarks"),
        element("link", rel="icon", href="data:,"),  # else a browser asks the server for one
        element("style", Markup(style())),
        element("script", Markup(SCRIPT)),
    )
    main = element("main", _summary(ordered, shown), *(_section(item, shown[item], runs) for item in shown))
    footer = element("footer", "Made by trisparse bench report. Numbers of a case are the newest of its device.")
    nav = element("nav", element("ul", *links), aria_label="Sections")
    return "<!DOCTYPE html>\n" + element("html", head, element("body", header, nav, main, footer), lang="en") + "\n"


def _run(row: Row) -> tuple[str, str]:
    return row.run, row.command


def _dates(ordered: Sequence[Row]) -> str:
    first, last = ordered[0].time[:10], ordered[-1].time[:10]
    return first if first == last else f"{first} to {last}"


def _summary(rows: Sequence[Row], contents: Mapping[Section, Content]) -> Markup:
    warnings = []
    if dirty := [row for row in rows if row.environment.get("dirty")]:
        text = f"{len(dirty)} of {len(rows)} rows come from a checkout with uncommitted changes: not to be published."
        warnings.append(element("p", text, class_="warning", role="note"))
    if unknown := [row for row in rows if not row.environment.get("commit")]:
        text = f"{len(unknown)} of {len(rows)} rows do not name the commit that they were measured on."
        warnings.append(element("p", text, class_="warning", role="note"))
    if bounds := sum(row.kind == "bound" for row in rows):
        text = f"{len(rows) - bounds} rows were measured. {bounds} are bounds, counted or computed, and drawn hollow."
        warnings.append(element("p", text))
    machines = [_machine(found) for found in grouped(rows, _place).values()]
    missing = [element("li", section.missing) for section, content in contents.items() if not content.rows]
    absent = join(element("h3", "Not measured yet"), element("ul", *missing, class_="empty")) if missing else None
    return element("section", element("h2", "Summary"), *warnings, *machines, absent, id="summary")


def _place(row: Row) -> tuple[str, ...]:
    environment = row.environment
    cuda, packages = environment.get("cuda") or {}, environment.get("packages") or {}
    parts = (row.device, reading.processor(environment), cuda.get("driver"), environment.get("python"))
    return tuple(map(str, (*parts, *(packages.get(name) for name in ("torch", "triton", "transformers")))))


def _machine(rows: Sequence[Row]) -> Markup:
    """One machine with one set of versions."""
    environment, ordered = rows[-1].environment, sorted(rows, key=lambda row: row.time)
    cpu, cuda = environment.get("cpu") or {}, environment.get("cuda") or {}
    packages = environment.get("packages") or {}
    versions = {"python": environment.get("python")}
    versions |= {name: packages.get(name) for name in ("torch", "triton", "transformers")}
    memory = f"{cpu['memory_gib']} GiB" if cpu.get("memory_gib") else None
    cores = f"{cpu['cores']} cores, threads: {cpu.get('threads')}" if cpu.get("cores") else None
    commits: dict[str, None] = {}  # in the order of their first row
    for row in ordered:
        name = str(row.environment.get("commit") or "unknown")[:12]
        commits[name + (" (with uncommitted changes)" if row.environment.get("dirty") else "")] = None
    about = {
        "processor": ", ".join(part for part in (reading.processor(environment), cores, memory) if part),
        "CUDA": ", driver ".join(str(cuda[key]) for key in ("version", "driver") if cuda.get(key)) or None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "system": environment.get("os"),
        "commit": ", ".join(commits),
        "measured": _dates(ordered),
        "rows": ", ".join(f"{name} {len(found)}" for name, found in grouped(rows, _family).items()),
    }
    entries = [part for name, text in about.items() if text for part in (element("dt", name), element("dd", text))]
    title = reading.processor(environment) if rows[0].device == "cpu" else rows[0].device
    return join(element("h3", title), element("dl", *entries))


def _family(row: Row) -> str:
    return "papers" if row.benchmark.startswith(reading.PAPERS) else row.benchmark


def _section(section: Section, content: Content, runs: Runs) -> Markup:
    parts = [element("h2", section.title, id=f"{section.key}-title")]
    if not content.rows:
        parts.append(element("p", section.missing, class_="empty"))
    else:
        parts.append(element("p", section.lead, class_="lead"))
        parts += [element("p", remark, class_="empty") for remark in content.remarks]
        for table in content.shown:
            summary = element("summary", f"{table.caption} ({len(table.cells)} numbers)")
            open_ = "open" if len(content.shown) <= _OPEN else None
            parts.append(element("details", summary, _table(table, runs), open=open_))
        charts = [draw(chart) for chart in content.charts]
        if charts:
            parts.append(element("div", *charts[:_SHOWN], class_="charts"))
        if rest := charts[_SHOWN:]:
            summary = element("summary", f"Show {len(rest)} more chart{'s' if len(rest) > 1 else ''}")
            parts.append(element("details", summary, element("div", *rest, class_="charts")))
        if content.numbers is not None:
            summary = element("summary", f"Table of all numbers ({len(content.numbers.cells)} rows)")
            parts.append(element("details", summary, _table(content.numbers, runs)))
        parts.append(_commands(content.rows, runs))
    return element("section", *parts, id=section.key, aria_labelledby=f"{section.key}-title")


def _table(table: Table, runs: Runs) -> Markup:
    """The table, with the number of each line's command."""

    def kind(index: int) -> str:
        return "text" if index < _WORDS or table.columns[index] == "numbers" else "number"

    head = [element("th", name, scope="col", class_=kind(index)) for index, name in enumerate(table.columns)]
    lines = []
    for cells, row in zip(table.cells, table.rows, strict=True):
        line = [element("td", cell, class_=kind(index)) for index, cell in enumerate(cells)]
        lines.append(element("tr", *line, element("td", str(runs[_run(row)]), class_="number")))
    head.append(element("th", "command", scope="col", class_="number"))
    body = (element("thead", element("tr", *head)), element("tbody", *lines))
    whole = element("table", element("caption", table.caption), *body)
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=table.caption)


def _commands(rows: Sequence[Row], runs: Runs) -> Markup:
    """Which commands measured the rows of a section, by the numbers that its tables give."""
    lines = []
    for key, found in sorted(grouped(rows, _run).items(), key=lambda item: runs[item[0]]):
        row = found[0]
        commit = str(row.environment.get("commit") or "unknown")[:12]
        changed = ", with uncommitted changes" if row.environment.get("dirty") else ""
        when = re.sub(r"[+Z].*$", "", row.time).replace("T", " ")
        about = f" {when} UTC, commit {commit}{changed}, {reading.device(row)}"
        lines.append(element("li", element("code", row.command), about, value=runs[key]))
    return join(element("h3", "Measured by"), element("ol", *lines, class_="commands"))
