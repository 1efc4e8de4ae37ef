"""Tables of the metrics and of the operations, for people and as plain data."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from trisparse.sparsity.metric.library import METRICS
from trisparse.sparsity.metric.operations import OPERATIONS


def list_metrics() -> tuple[list[dict[str, str]], Table]:
    """The library: name, expression, what has to be measured, summary and source of each metric."""
    rows = []
    for metric in METRICS.values():
        needs = ", ".join(name for name in ("X", "G") if name in metric.uses)
        row = {"name": metric.name, "expression": "" if metric.root is None else metric.infix, "needs": needs}
        rows.append({**row, "summary": metric.summary, "source": metric.source})
    return rows, _table(rows, ("name", "expression", "needs", "source"))


def list_operations() -> tuple[list[dict[str, str]], Table]:
    """The vocabulary: how each operation is written, what it computes and whether the paper has it."""
    rows = []
    for operation in OPERATIONS.values():
        call = f"{operation.name}({', '.join('xy'[: operation.arity])})"
        symbol = {1: f"{operation.symbol}x", 2: f"x {operation.symbol} y"}[operation.arity] if operation.symbol else ""
        origin = "Pruner-Zero" if operation.published else "extension"
        rows.append({"operation": call, "infix": symbol, "value": operation.summary, "origin": origin})
    return rows, _table(rows, ("operation", "infix", "value", "origin"))


def _table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in columns))
    return table
