"""Ratios of two sets of rows by hand, where rows are found, and what counts as noise."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from trisparse import cli
from trisparse.bench import compare
from trisparse.bench.rows import Row, append_rows


def row(median, *, spread=1.0, case="c", contestant="a", commit="abcdef0123", run="r1", **more):
    seconds = {"min": 1.0, "median": median, "p90": spread, "repeats": 3.0}
    base = {"benchmark": "toy", "case": case, "contestant": contestant, "parameters": {}, "kind": "measurement"}
    base |= {"device": "cpu", "run": run, "time": "now", "command": "x", "environment": {"commit": commit}}
    return Row(**(base | {"seconds": seconds} | more))


def written(folder, *rows):
    append_rows(rows, folder / "toy.jsonl")
    return folder / "toy.jsonl"


def test_ratio_and_noise():
    before = [row(2.0, spread=1.1), row(2.0, case="d", spread=1.1), row(2.0, case="e", spread=1.1), row(1.0, case="f")]
    after = [row(3.0, spread=1.2), row(2.2, case="d", spread=1.2), row(1.0, case="e"), row(1.0, case="g")]
    changes = {change.case: change for change in compare.compare(before, after)}
    assert changes.keys() == {"c", "d", "e"}
    assert (changes["c"].ratio, changes["c"].spread, changes["c"].noise) == (1.5, 1.2, False)
    assert changes["d"].ratio == pytest.approx(1.1)
    assert changes["d"].noise  # within the spread of 1.2
    assert (changes["e"].ratio, changes["e"].noise) == (0.5, False)  # twice as fast is no noise either


def test_tokens_per_second_count_as_time():
    slow, fast = (row(0.0, seconds={}, tokens_per_s=rate) for rate in (10.0, 40.0))
    (change,) = compare.compare([slow], [fast])
    assert (change.ratio, change.spread, change.noise) == (0.25, None, False)


def test_nothing_in_common():
    for other in (row(1.0, case="d"), row(1.0, device="NVIDIA L4"), row(1.0, seconds={})):
        with pytest.raises(ValueError, match="in common"):
            compare.compare([row(1.0)], [other])


def test_sources(tmp_path, monkeypatch):
    runs = tmp_path / "bench/results/runs"
    file = written(runs, row(1.0), row(2.0, run="r2", commit="abc9999"), row(3.0, kind="bound", case="b"))
    monkeypatch.setattr(compare, "checkout", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    medians = lambda source: [found.seconds["median"] for found in compare.find_rows(str(source))]  # noqa: E731
    for source in (file, runs, runs.parent, "r2", "abc9"):
        assert medians(source) == [2.0]  # the newest, and no bound
    assert medians("r1") == medians("abcd") == [1.0]
    changed = row(9.0, run="r9", environment={"commit": "abc9999", "dirty": True})
    written(tmp_path / "bench/results/dirty", changed)
    assert medians("abc9") == [2.0]  # which a changed checkout is not
    assert medians("r9") == [9.0]
    for source in ("abc", "r3", tmp_path):
        with pytest.raises(ValueError, match="has no rows of benchmarks"):
            compare.find_rows(str(source))


def test_the_command(tmp_path):
    old = written(tmp_path / "old", row(2.0), row(1.0, case="d [x]", spread=2.0))
    new = written(tmp_path / "new", row(3.0), row(1.5, case="d [x]"))

    def invoke(*options):
        return CliRunner().invoke(cli.app, ["bench", "compare", str(old), str(new), *options])

    shown = invoke()
    assert shown.exit_code == 0
    assert "slower" in shown.stdout
    assert "noise" in shown.stdout
    assert "[x]" in shown.stdout
    assert invoke("--fail-above", "1.4").exit_code == 1
    assert invoke("--fail-above", "1.6").exit_code == 0
    changes = json.loads(invoke("--json").stdout)["changes"]
    assert [(change["ratio"], change["noise"]) for change in changes] == [(1.5, False), (1.5, True)]
    # What is noise does not fail.
    only_noise = written(tmp_path / "noise", row(1.5, case="d [x]"))
    result = CliRunner().invoke(cli.app, ["bench", "compare", str(old), str(only_noise), "--fail-above", "1.1"])
    assert result.exit_code == 0
