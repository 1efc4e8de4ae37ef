"""Pruner-Zero's tables: their layouts, the published numbers, and the cells that are not of perplexity alone."""

import json
import math
import shutil
import statistics
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from trisparse.bench.papers import pruner_zero_search
from trisparse.bench.papers.cell import Cell, Session, machine_name
from trisparse.bench.papers.language import LanguageCell
from trisparse.bench.papers.pruner_zero_search import OpposingCell, SearchCell
from trisparse.bench.papers.pruner_zero_time import PruningTimeCell
from trisparse.bench.papers.registered import measured
from trisparse.bench.papers.render import write
from trisparse.bench.papers.run import run_tables
from trisparse.bench.papers.scale import SCALES
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import entry, find_tables, published_paper
from trisparse.kernels.cache import cache_folder
from trisparse.sparsity.search.run import search

TINY = SCALES["tiny"]
LLAMA_7B = "huggyllama/llama-7b"


def of_paper(name):
    return published_paper("pruner-zero")["tables"][name]["models"]


def run(name, model, tmp_path, session):
    """The comparison of one table at the scale "tiny", and the store."""
    store = CellStore(tmp_path / "cells.jsonl")
    (found,) = run_tables(find_tables([f"pruner-zero-{name}"]), str(model), TINY, store, session)
    return found, store


@pytest.fixture
def session():
    return Session()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path / "cache"))


def test_every_published_number_has_a_cell():
    for table in find_tables(["pruner-zero"]):
        for model in table.models:
            published = table.published(model)
            layout = table.layout(model, SCALES["paper"])
            if published is None:
                assert table.name.startswith("pruner-zero-figure-")
                continue
            assert published.same_model
            missing = {place for place in published.values if place not in layout.entries}
            assert {row for row, _ in missing} == ({"GBLM-Pruner, l1"} if "table-13" in table.name else set())
            assert layout.entries.keys() <= published.values.keys()


def test_the_tables_and_figures_are_those_of_the_issue():
    names = [table.name.removeprefix("pruner-zero-") for table in find_tables(["pruner-zero"])]
    assert names == [
        *("figure-2", "figure-3a", "figure-3b", "figure-4"),
        *(f"table-{number}" for number in (2, 4, 5, 6, 12, 13, 22, 23, 24, 25)),
    ]


def test_published_averages_and_deviations_are_those_of_their_trials_but_for_the_one_in_the_notes():
    wrong = []
    for table, of_mean, of_spread in (("table-12", 0.006, 0.0025), ("table-25", 6e-5, 6e-5)):  # as they are rounded
        for model, numbers in of_paper(table).items():
            for row, of in numbers["rows"].items():
                trials = [value for column, value in of.items() if column not in ("average", "deviation")]
                assert len(trials) == 4
                mean, spread = statistics.mean(trials), statistics.pstdev(trials)
                if abs(mean - of["average"]) > of_mean or abs(spread - of["deviation"]) > of_spread:
                    wrong.append((table, model, row))
    assert wrong == [("table-25", LLAMA_7B, "2:4")]


def test_numbers_that_two_tables_share_agree():
    of_2, of_6, of_13, of_23 = (of_paper(f"table-{number}")[LLAMA_7B]["rows"] for number in (2, 6, 13, 23))
    assert of_2["Pruner-Zero"] == of_6["no fine-tuning"] == of_13["Pruner-Zero"]
    assert {row: of["perplexity"] for row, of in of_23.items()} == {row: of["50%"] for row, of in of_2.items()}
    assert of_paper("table-24")[LLAMA_7B]["dense"] == of_paper("table-2")[LLAMA_7B]["dense"] == 5.68


def test_paper_scale_calibrates_pruner_zero_on_wikitext_and_the_others_on_c4():
    (table,) = find_tables(["pruner-zero-table-2"])
    entries = table.layout(LLAMA_7B, SCALES["paper"]).entries
    texts = {row: one.cells[0].texts.calibration for (row, column), one in entries.items() if column == "50%"}
    assert texts == {
        "Magnitude": "c4:train",
        "SparseGPT": "c4:train",
        "Wanda": "c4:train",
        "Pruner-Zero": "wikitext2:train",
    }


@dataclass(frozen=True)
class Known(Cell):
    kind: ClassVar[str] = "known"
    number: float

    def measure(self, wanted, session):
        return {"perplexity": self.number}


def test_deviation_of_cells_is_that_of_the_population(tmp_path):
    store = CellStore(tmp_path / "cells.jsonl")
    cells = [Known(1.0), Known(3.0)]
    one = entry(*cells, statistic="deviation")
    assert one.value(store) is None
    for cell in cells:
        store.add(cell, cell.measure(frozenset(), None), 0.0)
    assert one.value(store) == 1.0
    assert one.deviation(store) is None  # it is one itself
    assert entry(*cells).value(store) == 2.0
    assert entry(*cells).deviation(store) == pytest.approx(math.sqrt(2))


def test_what_is_undefined_is_no_number(tmp_path):
    store = CellStore(tmp_path / "cells.jsonl")
    store.add(Known(0.0), {"perplexity": math.nan}, 0.0)
    assert entry(Known(0.0)).value(store) is None


def test_lora_is_measured_beside_the_pruned_weights(tiny_llama, tmp_path, session):
    found, store = run("table-6", tiny_llama / "dense", tmp_path, session)
    place = ("LoRA", "2:4")
    (cell,) = found.layout.entries[place].cells
    assert isinstance(cell, LanguageCell)
    assert cell.retraining is not None
    assert not cell.retraining.config(16).merge
    assert 0 < store.metrics(cell)["trainable_share"] < 0.5
    assert found.ours[place] != found.ours["no fine-tuning", "2:4"]


def test_pruning_time_leaves_the_gradients_out_and_prunes_alike(tiny_llama, tmp_path, session, monkeypatch):
    found, _ = run("table-23", tiny_llama / "dense", tmp_path, session)
    assert all(found.ours[row, "seconds"] > 0 for row in found.rows)
    (cell,) = found.layout.entries["Pruner-Zero", "seconds"].cells
    assert isinstance(cell, PruningTimeCell)
    same = LanguageCell(cell.model, cell.texts, cell.pruning)
    assert found.ours["Pruner-Zero", "perplexity"] == same.measure(frozenset({"perplexity"}), session)["perplexity"]
    # seconds are of this machine, and of no other
    assert cell.machine == machine_name(session.device)
    elsewhere = replace(cell, machine="another")
    assert elsewhere.key != cell.key
    with pytest.raises(ValueError, match=r"the cell is of another, the session of .* threads"):
        elsewhere.measure(frozenset({"seconds"}), session)
    rows = {row.name: row.metrics["ours"].keys() for row in measured(found)}
    assert rows["Wanda, seconds"] == {"seconds"}
    assert rows["Wanda, perplexity"] == {"perplexity"}


def tiny_search(model, **options):
    cell = SearchCell(str(model), "pydoc:calibration", "pydoc:validation", 2, 2, 16, 4, 4)
    return SearchCell(**{**vars(cell), **options})


def test_a_search_goes_on_from_its_log_and_is_read_from_a_recorded_one(tiny_llama, tmp_path, session, monkeypatch):
    monkeypatch.setattr(pruner_zero_search, "RESULTS", tmp_path)
    cell = tiny_search(tiny_llama / "dense")
    wanted = frozenset({"perplexity", "correlation W perplexity", "correlation W W", "correlation norm1 W"})
    first = cell.measure(wanted, session)
    assert first["after 4"] >= first["after 8"] == first["perplexity"]
    assert 1 <= first["converged_after"] <= 8
    assert "correlation norm1 W" in first
    log = cache_folder() / "searches" / cell.key / "log.jsonl"
    lines = log.read_text().splitlines()
    (tmp_path / "search").mkdir()
    shutil.copy(log, tmp_path / "search" / "recorded.jsonl")
    shutil.rmtree(log.parent)

    def refuse(*arguments, **options):
        raise AssertionError("a recorded search runs again")

    monkeypatch.setattr(pruner_zero_search, "search", refuse)
    again = cell.measure(wanted, session)
    assert json.dumps(again) == json.dumps(first)
    shorter = tiny_search(tiny_llama / "dense", iterations=2).measure(frozenset({"perplexity"}), session)
    best = [json.loads(line).get("perplexity") for line in lines if '"kind": "evaluation"' in line][:6]
    assert shorter["perplexity"] == min(value for value in best if value is not None)
    for other in ({"iterations": 5}, {"opposing": False}, {"strategy": "random"}, {"seed": 1}, {"windows": 3}):
        with pytest.raises(AssertionError, match="runs again"):
            tiny_search(tiny_llama / "dense", **other).measure(frozenset({"perplexity"}), session)
    assert search is not refuse


def test_random_trees_have_more_opposing_operations_the_deeper_they_are(session):
    shallow, deep = (OpposingCell(depth, 60, 1).measure(frozenset(), session)["share"] for depth in (3, 7))
    assert 0 <= shallow < deep <= 1
    assert OpposingCell(7, 60, 1).measure(frozenset(), session) != OpposingCell(7, 60, 2).measure(frozenset(), session)


def test_correlations_are_drawn_and_random_trees_need_no_model(tiny_llama, tmp_path, session, monkeypatch):
    monkeypatch.setattr(pruner_zero_search, "RESULTS", tmp_path)
    found, _ = run("figure-4", tiny_llama / "dense", tmp_path, session)
    assert found.ours["W", "W"] in (None, pytest.approx(1.0))
    page, content, picture = write(found, tmp_path / "out", "command")
    assert picture.stat().st_size > 1000
    assert "–" in page.read_text("utf-8")  # what no metric has
    assert "NaN" not in content.read_text("utf-8").split('"cells": {')[0]
    trees, _ = run("table-12", "smollm2", tmp_path, session)
    assert trees.published is not None
    assert trees.published.same_model
