"""Tables from the command line to the files, on a tiny model and on digits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trisparse.bench.papers.cell import Session
from trisparse.bench.papers.language import LanguageCell, Pruning, Retraining, Texts
from trisparse.bench.papers.perp_models import perp
from trisparse.bench.papers.registered import measured
from trisparse.bench.papers.run import cells_file, run_tables
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.store import CellStore
from trisparse.bench.papers.table import Layout, PaperTable, entry, find_tables
from trisparse.bench.registry import Options, benchmarks
from trisparse.bench.runner import chosen, run


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


def test_tables_are_benchmarks_that_give_rows(tiny_llama, tmp_path):
    known = benchmarks()
    assert {"papers/perp-table-1", "papers/perp-figure-3"} <= known.keys()
    options = Options(model=str(tiny_llama / "dense"), scale="tiny", only="50%", out=tmp_path, command="what was typed")
    rows = list(known["papers/perp-figure-3"].run(options))
    assert [row.name for row in rows] == ["50%, 0", "50%, 2"]
    assert rows[1].parameters["scale"] == "tiny"
    assert rows[1].parameters["model"] == "dense"
    assert rows[1].metrics["ours"].keys() == {"perplexity"}
    # cells and tables lie in a folder of their own, away from the rows
    written = tmp_path / "papers/perp-figure-3-dense-tiny.json"
    assert CellStore(cells_file(written.parent, "perp")).file.is_file()
    assert json.loads(written.read_text())["command"] == "what was typed"
    # nothing is measured again, so that what was written stays
    again = list(known["papers/perp-figure-3"].run(replace(options, command="another")))
    assert again == rows
    assert json.loads(written.read_text())["command"] == "what was typed"


def test_rows_of_recorded_cells_are_of_the_commit_and_the_time_of_the_cells(tiny_llama, tmp_path):
    [item] = chosen(["papers/perp-figure-3"])
    options = Options(model=str(tiny_llama / "dense"), scale="tiny", only="50%")
    run([item], options, command="first", out=tmp_path)
    cells = cells_file(tmp_path / "papers", "perp")
    lines = [json.loads(line) for line in cells.read_text().splitlines()]
    for number, line in enumerate(lines):
        pruned_alone = line["spec"]["retraining"] is None
        line["environment"] |= {"commit": f"c{number}", "dirty": pruned_alone}
        line |= {"time": "2001-02-03T04:05:06Z", "device": "some GPU"}
    cells.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = run([item], options, command="second", out=tmp_path)
    assert outcome.errors == []
    pruned, retrained = outcome.rows
    assert (pruned.case, retrained.case) == ("50%, 0", "50%, 2")
    assert (pruned.environment["dirty"], retrained.environment["dirty"]) == (True, False)
    assert pruned.environment["commit"] != retrained.environment["commit"]
    assert {row.environment["commit"] for row in outcome.rows} <= {f"c{number}" for number in range(len(lines))}
    assert {(row.time, row.device, row.command) for row in outcome.rows} == {
        ("2001-02-03T04:05:06+00:00", "some GPU", "second")
    }


def test_the_command_of_a_table_has_every_flag(tmp_path, trisparse_command, measured, sum_cell, monkeypatch):
    table = PaperTable(
        "perp-table-9", "a test", (), "sum", lambda model, scale: Layout({("r", "c"): entry(sum_cell(1))})
    )
    monkeypatch.setattr("trisparse.bench.papers.table.find_tables", lambda names: [table])
    flags = (
        "--scale",
        "tiny",
        "--out",
        tmp_path / "my results",
        "--no-resume",
        "--device",
        "cpu",
        "--images",
        "images",
    )
    shown = trisparse_command("bench", "papers", "perp-table-9", "--model", "a", *flags, "--no-picture", "--json")
    assert json.loads(shown)[0]["command"] == (
        f"trisparse bench papers perp-table-9 --model a --scale tiny --out '{tmp_path}/my results' --no-resume "
        "--device cpu --images images --no-picture"
    )


def test_the_plan_lists_tables_and_models(trisparse_command):
    shown = trisparse_command("bench", "papers", "perp-table-5", "perp-table-9", "--plan", "NousResearch/Llama-2-7b-hf")
    assert shown.splitlines() == [
        "perp-table-5 NousResearch/Llama-2-7b-hf",
        "perp-table-9 facebook/opt-2.7b",
        "perp-table-9 facebook/opt-6.7b",
    ]


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


def test_a_cell_gives_the_same_without_copies_of_the_model(tiny_llama):
    grid = replace(find_scale("tiny"), learning_rates={"": "grid"}, grid=(1e-3, 1e-2), grid_steps=1)
    model = str(tiny_llama / "dense")
    wanted = frozenset({"perplexity"})
    cells = [
        LanguageCell(model, Texts.of(grid, model), Pruning.of(grid, "wanda", "2:4"), retraining)
        for retraining in (perp(grid, model), None, Retraining.of(grid, ("norms",)))
    ]
    kept, anew = (Session(keep_copies=keep) for keep in (True, False))
    first = [cell.measure(wanted, kept) for cell in cells]
    second = [cell.measure(wanted, anew) for cell in reversed(cells)][::-1]
    # each from the pruned model, in whatever order they are measured
    assert [found["perplexity"] for found in first] == [found["perplexity"] for found in second]
    assert len({found["perplexity"] for found in first}) == 3
    assert first[0]["learning_rate"] in grid.grid
    assert "retraining_seconds" not in first[1]
