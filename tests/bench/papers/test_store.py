"""The store of cells: what is kept, what a kill leaves behind, and who sees what."""

from __future__ import annotations

import hashlib
import json

import pytest

from trisparse.bench.papers.language import LanguageCell, Pruning, Retraining, Texts
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.rows import RESULTS
from trisparse.env import checkout


def test_a_cell_is_found_again_with_where_it_was_measured(store, sum_cell):
    store.add(sum_cell(1), {"perplexity": 7.25}, 3.5)
    again = CellStore(store.file)
    record = again.record(sum_cell(1))
    assert again.metrics(sum_cell(1)) == {"perplexity": 7.25}
    assert again.metrics(sum_cell(2)) == {}
    assert record.spec == {"kind": "sum", "number": 1, "model": "a"}
    assert record.seconds == 3.5
    assert {"commit", "dirty"} <= record.environment.keys()
    assert record.device == "cpu"
    store.add(sum_cell(1), {"perplexity": 7.25}, 3.5, "some GPU")
    assert CellStore(store.file).record(sum_cell(1)).device == "some GPU"


def test_the_recorded_cells_are_found_by_their_specifications():
    files = sorted((checkout() / RESULTS / "papers").glob("cells-*.jsonl"))
    assert files
    for file in files:
        CellStore(file)
        for line in map(json.loads, file.read_text().splitlines()):
            digest = hashlib.sha256(json.dumps(line["spec"], sort_keys=True).encode()).hexdigest()
            assert digest[:24] == line["key"]


def test_the_last_record_of_a_cell_counts(store, sum_cell):
    store.add(sum_cell(1), {"perplexity": 1.0}, 0.0)
    store.add(sum_cell(1), {"perplexity": 2.0}, 0.0)
    assert store.metrics(sum_cell(1)) == CellStore(store.file).metrics(sum_cell(1)) == {"perplexity": 2.0}


def test_a_torn_last_line_is_dropped_and_cut_off(store, sum_cell):
    store.add(sum_cell(1), {"perplexity": 1.0}, 0.0)
    store.add(sum_cell(2), {"perplexity": 2.0}, 0.0)
    whole = store.file.read_bytes()
    store.file.write_bytes(whole[:-20])  # a process that was killed while it wrote
    again = CellStore(store.file)
    assert again.metrics(sum_cell(1)) == {"perplexity": 1.0}
    assert again.metrics(sum_cell(2)) == {}
    again.add(sum_cell(3), {"perplexity": 3.0}, 0.0)
    lines = [json.loads(line) for line in store.file.read_text().splitlines()]
    assert [line["spec"]["number"] for line in lines] == [1, 3]
    assert CellStore(store.file).metrics(sum_cell(3)) == {"perplexity": 3.0}


def test_a_broken_line_among_others_is_an_error(store, sum_cell):
    store.add(sum_cell(1), {"perplexity": 1.0}, 0.0)
    store.file.write_text(store.file.read_text() + '{"key": "x"}\n')
    with pytest.raises(ValueError, match=r"cells\.jsonl:2 is no measured cell"):
        CellStore(store.file)


def test_one_process_sees_what_another_adds(store, sum_cell):
    other = CellStore(store.file)
    assert other.metrics(sum_cell(1)) == {}
    store.add(sum_cell(1), {"perplexity": 1.0}, 0.0)
    assert other.metrics(sum_cell(1)) == {"perplexity": 1.0}


def test_infinite_perplexity_survives(store, sum_cell):
    store.add(sum_cell(1), {"perplexity": float("inf")}, 0.0)
    assert CellStore(store.file).metrics(sum_cell(1)) == {"perplexity": float("inf")}


def test_the_key_holds_all_that_matters():
    def cell(scale="small", model="m", method="magnitude", pattern="50%", **retraining):
        size = find_scale(scale)
        retrained = Retraining.of(size, ("norms", "lora"), **retraining)
        return LanguageCell(model, Texts.of(size, model), Pruning.of(size, method, pattern), retrained)

    others = [
        cell("tiny"),
        cell(model="n"),
        cell(method="wanda"),
        cell(pattern="60%"),
        cell(rank=8),
        cell(alpha=1.0),
        cell(seed=1),
        cell(steps=1),
        cell(targets=("q_proj",)),
    ]
    keys = {cell().key, *(other.key for other in others)}
    assert len(keys) == 1 + len(others)
    assert cell().key == cell(rank=16).key
    assert len(cell().key) == 24
    # the key is that of the specification as JSON gives it back, in every process
    assert cell().spec == json.loads(json.dumps(cell().spec))


def test_methods_without_data_do_not_depend_on_it():
    small = find_scale("small")
    assert Pruning.of(small, "magnitude", "50%").samples == 0
    assert Pruning.of(small, "magnitude", "50%").pattern == "50% layer"
    assert Pruning.of(small, "magnitude", "2:4").pattern == "2:4"
    assert Pruning.of(small, "wanda", "50%") == Pruning("wanda", "50%", small.samples)
    assert Pruning.of(small, "sparsegpt", "50%", samples=7).samples == 7
    assert Pruning.of(small, "pruner-zero", "50%").samples == small.samples
