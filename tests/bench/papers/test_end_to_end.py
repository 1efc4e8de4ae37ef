"""Tables from the command line to the files, on a tiny model and on digits."""

from __future__ import annotations

import json

import pytest

from trisparse.bench.papers.cell import Session
from trisparse.bench.papers.registered import measured
from trisparse.bench.papers.run import cells_file, run_tables
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import find_tables
from trisparse.bench.registry import Options, benchmarks


def test_a_table_of_a_language_model(tiny_llama, tmp_path, trisparse_command):
    pytest.importorskip("matplotlib")
    model = str(tiny_llama / "dense")
    command = (
        "bench",
        "papers",
        "perp-table-9",
        "perp-table-11",
        "--model",
        model,
        "--scale",
        "tiny",
        "--out",
        tmp_path,
    )
    shown = trisparse_command(*command, "--no-picture")
    assert "# PERP, Table 9: pruning criteria with and without PERP" in shown
    assert "| SparseGPT + PERP | " in shown
    assert "Not the paper's seven tasks" in shown
    first = json.loads((tmp_path / "perp-table-9-dense-tiny.json").read_text())
    ours = {row["row"]: row["ours"] for row in first["rows"]}
    assert set(ours) == {f"{name}{perp}" for name in ("Magnitude", "Wanda", "SparseGPT") for perp in ("", " + PERP")}
    assert all(value > 1 for value in ours.values())
    assert all(ours[f"{name} + PERP"] != ours[name] for name in ("Magnitude", "Wanda", "SparseGPT"))
    shares = {cell["metrics"]["trainable_share"] > 0 for cell in first["cells"].values() if cell["spec"]["retraining"]}
    assert shares == {True}
    sparsities = [cell["metrics"]["sparsity"] for cell in first["cells"].values() if cell["spec"]["pruning"]]
    assert sparsities == [0.5] * 6

    # everything is in the store: nothing is measured again, and the numbers are the same
    before = cells_file(tmp_path, "perp").read_bytes()
    again = json.loads(trisparse_command(*command, "--no-picture", "--json"))
    assert cells_file(tmp_path, "perp").read_bytes() == before
    assert again[0]["rows"] == first["rows"]
    accuracies = {row["row"]: row["ours"] for row in again[1]["rows"]}
    assert set(accuracies) == set(ours)
    assert all(0 <= value <= 100 for value in accuracies.values())
    assert all(row["difference"] is None for row in again[1]["rows"])


def test_a_figure_of_an_image_classifier(store):
    pytest.importorskip("sklearn")
    [found] = run_tables(find_tables(["perp-figure-2"]), "any", find_scale("tiny"), store, Session())
    assert found.model == "digits"
    ours = {row: value for (row, _), value in found.ours.items()}
    # the shape of the paper's: pruning alone collapses, statistics bring most of it back
    assert ours["No Retraining"] < 60 < ours["BN-Recalibrate"] <= ours["Full IMP"]
    assert found.dense > 90


def test_freezing_is_measured_against_full_retraining(tiny_llama, session):
    layout = find_tables(["perp-table-12"])[0].layout(str(tiny_llama / "dense"), find_scale("tiny"))
    thawed, frozen = (layout.entries[f"{mode} from the output", "2 cycles"] for mode in ("unfreeze", "freeze"))
    assert thawed.cells[0].freezing == ("unfreeze", "output", 3)
    assert thawed.minus == frozen.minus
    assert thawed.minus[0].freezing is None
    wanted = frozenset({"perplexity", "trainable_share"})
    found = [cell.measure(wanted, session) for cell in (*thawed.cells, *frozen.cells)]
    assert len({one["perplexity"] for one in found}) == 2
    # of these layers, unfreezing trains more of the steps than freezing does
    assert 1 > found[0]["trainable_share"] > found[1]["trainable_share"] > 0


def test_tables_are_benchmarks_that_give_rows(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = benchmarks()
    assert {"papers/perp-table-1", "papers/perp-figure-3"} <= known.keys()
    options = Options(model=str(tiny_llama / "dense"), scale="tiny", only="50%")
    rows = list(known["papers/perp-figure-3"].run(options))
    assert [row.name for row in rows] == ["50%, 0", "50%, 2"]
    assert rows[1].parameters["scale"] == "tiny"
    assert rows[1].parameters["model"] == "dense"
    assert rows[1].metrics["ours"].keys() == {"perplexity"}
    assert CellStore(cells_file(tmp_path / "bench-results" / "papers", "perp")).file.is_file()


def test_rows_hold_the_published_number_of_the_same_model(store):
    [table] = find_tables(["perp-table-1"])
    layout = table.layout("facebook/opt-2.7b", find_scale("paper"))
    for one in layout.every():
        for cell in one.cells:
            store.add(cell, {"perplexity": 20.0, "trainable_share": 0.5}, 0.0)
    [found] = run_tables([table], "facebook/opt-2.7b", find_scale("paper"), store, Session())
    rows = {row.name: row.metrics["ours"] for row in measured(found)}
    assert rows["PERP, 50%"] == {"perplexity": 20.0, "published": 16.38}
    assert rows["PERP, % trainable"] == pytest.approx({"trainable_share": 0.5, "published": 0.0027})
