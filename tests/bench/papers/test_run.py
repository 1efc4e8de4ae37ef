"""Running tables: cells are shared, runs resume, and differences are right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trisparse.bench.papers import run as run_module
from trisparse.bench.papers.plan import billions_of, plan
from trisparse.bench.papers.registered import origin
from trisparse.bench.papers.render import as_json, markdown, write
from trisparse.bench.papers.run import papers_folder, run_tables
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import Layout, PaperTable, entry, find_tables, paper_table
from trisparse.bench.registry import Origin
from trisparse.bench.runner import OUTSIDE

TINY = find_scale("tiny")
OPT = "facebook/opt-2.7b"


def table_of(entries, name="perp-table-9", **layout):
    return PaperTable(name, "a test", (OPT,), "perplexity", lambda model, scale: Layout(entries, **layout))


def run(tables, store, session, model="a", **options):
    return list(run_tables(tables, model, TINY, store, session, **options))


def test_tables_share_cells_and_measure_each_once(store, session, measured, sum_cell):
    first = table_of({("r", "x"): entry(sum_cell(1)), ("r", "y"): entry(sum_cell(2))})
    second = table_of({("r", "y"): entry(sum_cell(2)), ("r", "z"): entry(sum_cell(3), minus=(sum_cell(1),))})
    one, two = run([first, second], store, session)
    assert measured == {1: 1, 2: 1, 3: 1}
    assert one.ours == {("r", "x"): 1.5, ("r", "y"): 2.5}
    assert two.ours == {("r", "y"): 2.5, ("r", "z"): 2.0}


def test_an_interrupted_run_goes_on_where_it_was(store, session, measured, stop_at, sum_cell):
    table = table_of({("r", str(number)): entry(sum_cell(number)) for number in (1, 2, 3)})
    stop_at.append(3)
    with pytest.raises(KeyboardInterrupt):
        run([table], store, session)
    stop_at.clear()
    [found] = run([table], CellStore(store.file), session)
    assert measured == {1: 1, 2: 1, 3: 1}
    assert [found.ours["r", str(number)] for number in (1, 2, 3)] == [1.5, 2.5, 3.5]
    run([table, table], store, session, again=True)  # anew, but each once
    assert measured == {1: 2, 2: 2, 3: 2}


def test_metrics_of_several_tables_are_measured_together(store, session, measured, sum_cell):
    first = table_of({("r", "x"): entry(sum_cell(1))})
    second = table_of({("r", "x"): entry(sum_cell(1), metric="double")})
    run([first, second], store, session)
    assert measured == {1: 1}
    run([first], store, session)
    assert measured == {1: 1}


def test_a_metric_that_a_later_table_wants_keeps_the_earlier_ones(store, session, measured, sum_cell):
    run([table_of({("r", "x"): entry(sum_cell(1))})], store, session)
    [found] = run([table_of({("r", "x"): entry(sum_cell(1), metric="double", factor=10)})], store, session)
    assert measured == {1: 2}
    assert found.ours == {("r", "x"): 20.0}
    assert store.metrics(sum_cell(1)) == {"perplexity": 1.5, "double": 2.0}


def test_a_cell_without_the_metric_is_an_error(store, session, measured, sum_cell):
    with pytest.raises(ValueError, match="a cell of perp-table-9 has no accuracy"):
        run([table_of({("r", "x"): entry(sum_cell(1), metric="accuracy")})], store, session)


def test_differences_by_hand(store, session, measured, sum_cell):
    entries = {("Magnitude", "50%"): entry(sum_cell(300)), ("Wanda", "50%"): entry(sum_cell(10), sum_cell(14))}
    [found] = run([table_of(entries, dense=entry(sum_cell(9)))], store, session, model=OPT)
    assert found.published.same_model
    assert found.difference(("Magnitude", "50%")) == pytest.approx(300.5 - 265.19)
    assert found.difference(("Wanda", "50%")) == pytest.approx(12.5 - 14.35)
    assert found.deviations["Wanda", "50%"] == pytest.approx(8**0.5)  # of 10.5 and 14.5
    assert found.dense == 9.5
    text = markdown(found, "a command")
    assert "| Magnitude | +35.31 |" in text
    assert "| Wanda | 12.50 ± 2.8 |" in text
    assert "what can be compared is the shape" not in text
    rows = {row["row"]: row for row in as_json(found, "a command")["rows"]}
    assert rows["Wanda"]["published"] == 14.35
    assert rows["Wanda"]["difference"] == pytest.approx(-1.85)


def test_another_model_is_set_beside_the_paper_s_and_related_to_its_own_dense_one(store, session, measured, sum_cell):
    entries = {("Magnitude", "50%"): entry(sum_cell(39)), ("Magnitude", "4:8"): entry(sum_cell(59))}
    [found] = run([table_of(entries, dense=entry(sum_cell(19)))], store, session)
    assert not found.published.same_model
    text = markdown(found, "a command")
    assert "Ours is another model on other data than facebook/opt-2.7b" in text
    # 39.5 / 19.5 and 265.19 / 12.47; 59.5 / 19.5 and 166.92 / 12.47
    assert "| Magnitude | 2.03 / 21.27 | 3.05 / 13.39 |" in text


def test_no_difference_to_another_task(store, session, measured, sum_cell):
    table = table_of({("Magnitude", "50%"): entry(sum_cell(39))}, other_task="a sum")
    [found] = run([table], store, session)
    assert found.difference(("Magnitude", "50%")) is None
    assert "No difference is taken: ours is a sum" in markdown(found, "a command")


def test_what_is_written(store, session, measured, sum_cell, tmp_path):
    pytest.importorskip("matplotlib")
    entries = {(row, column): entry(sum_cell(i)) for i, (row, column) in enumerate([("a", "50%"), ("a", "60%")])}
    [found] = run([table_of(entries)], store, session, model="some/Model")
    files = write(found, tmp_path / "out", "a command")
    assert [file.name for file in files] == [f"perp-table-9-model-tiny.{kind}" for kind in ("md", "json", "png")]
    assert json.loads(files[1].read_text())["model"] == "Model"
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_copy_of_a_model_is_set_beside_the_numbers_of_the_original():
    [table] = find_tables(["perp-table-5"])
    copy, original = "NousResearch/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"
    assert table.published(copy) == table.published(original)
    assert table.published(copy).same_model
    assert not table.published("NousResearch/Llama-2-70b-hf").same_model
    paper = find_scale("paper")
    # the places that the paper has for it, and none of the other model's
    assert table.layout(copy, paper).entries.keys() == table.layout(original, paper).entries.keys()
    [zero] = find_tables(["pruner-zero-table-2"])
    assert zero.published(copy).same_model
    assert zero.layout(copy, paper).entries.keys() == zero.layout(original, paper).entries.keys()


def test_a_plan_takes_the_model_or_the_paper_s_own_up_to_its_size():
    def table(name, *of, run_on=()):
        return PaperTable(name, "", of, "", lambda model, scale: Layout({}), run_on=run_on)

    tables = [
        table("a", "facebook/opt-2.7b", "facebook/opt-6.7b", "facebook/opt-13b"),
        table("b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"),
        table("c", "mistralai/Mixtral-8x7B-v0.1"),
        table("d", "ResNet-50", run_on=("facebook/opt-125m",)),
        table("e", "random-trees"),
    ]
    small = [("d", "facebook/opt-125m"), ("e", "random-trees")]
    copy = "NousResearch/Llama-2-7b-hf"
    medium = [("a", "facebook/opt-2.7b"), ("a", "facebook/opt-6.7b")]
    assert plan(tables, copy) == ([*medium, ("b", copy), *small], ["c"])
    assert plan(tables, "my-model") == ([*medium, ("b", "meta-llama/Llama-2-7b-hf"), *small], ["c"])
    assert plan(tables, "facebook/opt-2.7b") == ([("a", "facebook/opt-2.7b"), *small], ["b", "c"])
    names = ("opt-125m", "opt-1.3b", "Llama-2-70b-hf", "Mixtral-8x7B-v0.1", "TinyLlama_v1.1", "ResNet-50")
    assert [billions_of(name) for name in names] == [0.125, 1.3, 70, 56, 0, 0]


def test_clean_and_dirty_results_lie_apart(tmp_path, monkeypatch):
    assert papers_folder(tmp_path / "named") == tmp_path / "named"
    monkeypatch.setattr(run_module, "checkout", lambda: tmp_path)
    for dirty, folder in ((False, "papers"), (True, "dirty/papers")):
        monkeypatch.setattr(run_module, "environment", lambda dirty=dirty: {"dirty": dirty})
        assert papers_folder() == tmp_path / "bench/results" / folder  # wherever the command is started
    monkeypatch.setattr(run_module, "checkout", lambda: None)
    assert papers_folder() == OUTSIDE / "papers"


def test_a_number_of_several_cells_is_as_dirty_as_any_and_as_late_as_the_last(store, session, measured, sum_cell):
    [found] = run([table_of({("r", "x"): entry(sum_cell(1), sum_cell(2), minus=(sum_cell(3),))})], store, session)
    assert found.fresh == 3
    [found] = run([found.table], store, session)
    assert found.fresh == 0
    for number, (commit, dirty, day) in enumerate((("a", True, 1), ("b", False, 3), ("a", False, 2)), start=1):
        key = sum_cell(number).key
        of_then = {"commit": commit, "dirty": dirty}
        found.records[key] = replace(found.records[key], time=f"2026-01-0{day}T00:00:00Z", environment=of_then)
    [one] = found.layout.entries.values()
    assert origin(found, one) == Origin(
        "cpu", "2026-01-03T00:00:00+00:00", {"commit": "b", "dirty": True, "commits": ["a", "b"]}
    )


def test_names_are_found_or_listed():
    assert [table.name for table in find_tables(["perp-table-9", "perp-table-9"])] == ["perp-table-9"]
    assert {table.paper for table in find_tables(["perp"])} == {"perp"}
    with pytest.raises(ValueError, match=r"no table 'perp-table-3': there are .*perp-table-1, perp-table-2"):
        find_tables(["perp-table-3"])
    with pytest.raises(ValueError, match="registered twice"):
        paper_table("perp-table-9", "", models=(), metric="")(lambda model, scale: Layout({}))
    with pytest.raises(ValueError, match="scale must be one of tiny, small, paper, got 'large'"):
        find_scale("large")
