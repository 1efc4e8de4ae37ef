"""bench/gpu.sh with stand-ins for the programs: its steps, what goes on after a failure, and what is not done twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from trisparse.bench.papers.plan import billions_of, plan
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.table import paper_tables

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
# Each call is a line of calls.txt; one that has the text of fail.txt in it fails.
STAND_IN = """#!/bin/sh
cd "$(dirname "$0")/.."
echo "$(basename "$0") $*" >> calls.txt
[ "$*" = "bench list" ] && printf 'papers/one  a table\\nselect  masks\\npapers/two  another\\n'
for last; do :; done
case "$*" in *--plan*) printf 'one %s\\ntwo own/b\\n' "$last" ;; esac
[ ! -s fail.txt ] || ! echo "$*" | grep -q "$(cat fail.txt)"
"""


@pytest.fixture
def recipe(tmp_path):
    """``recipe(fail="", **settings)``: the finished script and the calls that it made."""
    for name in ("trisparse", "python", "make"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(STAND_IN)
        program.chmod(0o755)
    (tmp_path / "bench").mkdir()
    shutil.copy(SCRIPT, tmp_path / "bench")

    (tmp_path / "bin/git").write_text("#!/bin/sh\ncat head.txt\n")
    (tmp_path / "bin/git").chmod(0o755)

    def run(fail="", head="a1", **settings):
        (tmp_path / "head.txt").write_text(head)
        (tmp_path / "fail.txt").write_text(fail)
        (tmp_path / "calls.txt").write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        known = {"PATH": path, "BIN": "bin", "MAKE": "bin/make", "OUT": "gpu-results-x"} | settings
        environment = {name: value for name, value in known.items() if value is not None}
        done = subprocess.run(["bash", tmp_path / "bench/gpu.sh"], env=environment, capture_output=True, text=True)
        return done, (tmp_path / "calls.txt").read_text().splitlines()

    return run


def test_all_steps_in_order(recipe, tmp_path):
    done, calls = recipe(MODEL="seven/b")
    assert done.returncode == 0, done.stdout + done.stderr
    out = "gpu-results-x"
    paper, own = (f"--model {model} --scale paper --device cuda" for model in ("seven/b", "own/b"))
    assert calls == [
        "make .venv/.demo",
        "trisparse env --json",
        "python -m pytest -m gpu",
        "trisparse bench tune --device cuda --json",
        f"trisparse bench run select --device cuda --out {out}/rows",
        f"trisparse bench run linear --device cuda --out {out}/rows",
        f"trisparse bench run tokens --device cuda --out {out}/rows",
        f"trisparse bench run prune --model seven/b --device cuda --out {out}/rows",
        f"trisparse bench run roofline --out {out}/rows",
        "trisparse bench papers --plan seven/b",
        f"trisparse bench papers one {paper} --out {out}/rows/papers",
        f"trisparse bench run papers/one {paper} --out {out}/rows",
        f"trisparse bench papers two {own} --out {out}/rows/papers",
        f"trisparse bench run papers/two {own} --out {out}/rows",
        f"trisparse bench report {out}/rows --out {out}/report",
    ]
    assert "an estimate" in done.stdout
    with tarfile.open(tmp_path / f"{out}.tar.gz") as packed:
        assert {f"{out}/summary.txt", f"{out}/env.json", f"{out}/logs/bench-select.log"} <= set(packed.getnames())


def test_a_failure_is_logged_and_the_next_run_does_what_is_left(recipe, tmp_path):
    done, calls = recipe(fail="run linear")
    assert done.returncode == 1
    assert "bench-linear: FAILED" in done.stdout
    assert "failed: bench-linear" in (tmp_path / "gpu-results-x/summary.txt").read_text()
    assert any("run tokens" in call for call in calls)
    assert any("bench report" in call for call in calls)
    done, calls = recipe()
    assert done.returncode == 0
    assert [call for call in calls if "--plan" not in call] == [
        "trisparse bench run linear --device cuda --out gpu-results-x/rows",
        "trisparse bench report gpu-results-x/rows --out gpu-results-x/report",
    ]


def test_a_failed_first_part_of_a_step_fails_it(recipe):
    assert recipe(fail="env --json", STEPS="env")[0].returncode == 1  # though tee after it succeeds
    assert recipe(fail="papers one", STEPS="papers", PAPERS="one")[0].returncode == 1


def test_without_names_the_papers_are_a_failure(recipe, tmp_path):
    (tmp_path / "bin/trisparse").write_text("#!/bin/sh\nexit 2\n")
    done, _ = recipe(STEPS="papers")
    assert done.returncode == 1
    assert "names no tables" in done.stdout


def test_an_unfinished_folder_is_taken_up_and_a_finished_one_is_not(recipe, tmp_path):
    recipe(fail="run select", OUT=None, STEPS="env bench", BENCHES="select linear")
    (first,) = tmp_path.glob("gpu-results-*/")
    assert f"Folder: {first.name}\n" not in recipe(head="b2", OUT=None, DRY="1")[0].stdout  # of another commit
    _, calls = recipe(OUT=None, STEPS="env bench", BENCHES="select linear")
    assert calls == [f"trisparse bench run select --device cuda --out {first.name}/rows"]
    assert (first / "finished").exists()
    old = tmp_path / "gpu-results-2000-01-01-000000"
    old.mkdir()
    assert f"Folder: {old.name}" not in recipe(OUT=None, DRY="1")[0].stdout  # of no commit
    (old / "commit").write_text("a1\n")
    assert f"Folder: {old.name}" in recipe(OUT=None, DRY="1")[0].stdout
    (old / "finished").touch()
    assert f"Folder: {old.name}" not in recipe(OUT=None, DRY="1")[0].stdout


def test_quick_and_dry(recipe, tmp_path):
    done, calls = recipe(QUICK="1", DRY="1", STEPS="bench papers", BENCHES="select prune", PAPERS="one", DEVICE="cpu")
    assert done.returncode == 0
    assert calls == []
    assert not (tmp_path / "gpu-results-x").exists()
    assert "bench-select: bin/trisparse bench run select --quick --device cpu --out" in " ".join(done.stdout.split())
    assert "--scale tiny" in done.stdout
    assert "--model" not in done.stdout


def test_a_named_folder_of_another_commit_is_an_error(recipe, tmp_path):
    assert recipe(STEPS="env")[0].returncode == 0
    done, calls = recipe(head="b2", STEPS="env")
    assert (done.returncode, calls) == (2, [])
    assert "gpu-results-x has results of another commit than b2" in done.stderr


def test_dry_without_the_program(recipe, tmp_path):
    (tmp_path / "bin/trisparse").unlink()
    for settings in ({}, {"QUICK": "1"}):
        done, _ = recipe(DRY="1", **settings)
        assert done.returncode == 0
        assert "papers-NAME: ... for each table of trisparse bench list" in done.stdout
        assert "FAILED" not in done.stdout


def test_names_with_spaces_and_dollars_are_one_word(recipe, tmp_path):
    settings = {"MODEL": "my models/$b", "OUT": "a folder", "STEPS": "env tune bench papers report"}
    done, calls = recipe(**settings, BENCHES="prune", PAPERS="one")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trisparse bench run prune --model my models/$b --device cuda --out a folder/rows" in calls
    assert any(call.startswith("trisparse bench run papers/one --model my models/$b --scale paper") for call in calls)
    assert (tmp_path / "a folder/env.json").is_file()
    assert (tmp_path / "a folder.tar.gz").is_file()
    _, calls = recipe(**settings, BENCHES="prune", PAPERS="one")
    assert len(calls) == 2  # the plan and the report


def test_the_papers_have_numbers_of_the_default_model():
    model = re.search(r"MODEL=\$\{MODEL:-(.+)\}", SCRIPT.read_text())[1]
    tables = paper_tables()
    planned, left_out = plan(list(tables.values()), model)
    paper = find_scale("paper")
    of_it, others = (
        {one.table for one in planned if (one.model == model) == same and tables[one.table].published(one.model)}
        for same in (True, False)
    )
    assert {"perp-table-5", "perp-table-10", "pruner-zero-table-2", "pruner-zero-table-24"} <= of_it
    for one in planned:
        table = tables[one.table]
        published, layout = table.published(one.model), table.layout(one.model, paper)
        assert layout.entries
        # each is the paper's own, but for language models in place of an image classifier
        assert published is None or published.same_model or layout.other_task
        if published is not None and not layout.other_task:
            assert layout.entries.keys() & published.values.keys()
    assert {"perp-table-1", "perp-table-9", "pruner-zero-table-4"} <= others
    assert left_out == ["perp-table-6", "perp-table-8", "perp-table-13", "perp-table-14", "perp-table-15"]
    assert max(billions_of(one.model) for one in planned) <= billions_of(model) == 7


def test_an_unknown_step(recipe):
    done, calls = recipe(STEPS="env tets")
    assert (done.returncode, calls) == (2, [])
    assert "unknown step tets" in done.stderr
