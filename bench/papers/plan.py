"""Which models the papers' tables run on where one GPU has no room for all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from trisparse.bench.papers.table import PaperTable, paper_name

BILLIONS = 7.0


class Planned(NamedTuple):
    """A table and a model to run it on."""

    table: str
    model: str


def billions_of(model: str) -> float:
    """Billions of parameters by a model's name, ``opt-125m``, ``Llama-2-7b-hf`` or ``Mixtral-8x7B``; 0 without any."""
    found = re.search(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", model.rpartition("/")[2].lower())
    if found is None:
        return 0.0
    experts, number, unit = found.groups()
    return int(experts or 1) * float(number) / (1 if unit == "b" else 1000)


def plan(tables: Sequence[PaperTable], model: str) -> tuple[list[Planned], list[str]]:
    """What to run, and the names of tables that are left out.

    A table runs on ``model``, or the copy of one of its models that it is, where the paper has numbers of that; else on
    those of its own models that are no larger than ``model``, or than 7 billion parameters where its name has no size.
    It is left out where there is none.
    """
    limit = billions_of(model) or BILLIONS
    planned, left_out = [], []
    for table in tables:
        own = [name for name in table.run_on or table.models if billions_of(name) <= limit]
        models = [model] if paper_name(model) in table.models else own
        planned += [Planned(table.name, name) for name in models]
        left_out += [] if models else [table.name]
    return planned, left_out
