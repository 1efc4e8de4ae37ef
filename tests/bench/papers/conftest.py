"""A table whose cells are a sum, so that its numbers can be worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from trisparse.bench.papers.cell import Cell, Session
from trisparse.bench.papers.store import CellStore

MEASURED: Counter[int] = Counter()
STOP_AT: list[int] = []


@dataclass(frozen=True)
class Sum(Cell):
    """Measures ``perplexity``, number + 0.5, and ``double`` if that is wanted."""

    kind: ClassVar[str] = "sum"

    number: int
    model: str = "a"

    def measure(self, wanted, session):
        if self.number in STOP_AT:
            raise KeyboardInterrupt
        MEASURED[self.number] += 1
        return {"perplexity": self.number + 0.5, **({"double": 2.0 * self.number} if "double" in wanted else {})}


@pytest.fixture
def measured():
    """How often each number was measured in this test."""
    MEASURED.clear()
    STOP_AT.clear()
    return MEASURED


@pytest.fixture
def stop_at(measured):
    """Numbers at which measuring is interrupted."""
    return STOP_AT


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "cells.jsonl")


@pytest.fixture
def session():
    return Session(torch.device("cpu"))


@pytest.fixture(scope="session")
def sum_cell():
    """The class of the cells."""
    return Sum
