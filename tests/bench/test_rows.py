"""What makes two rows the same measurement, and how rows are told apart where they are shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from trisparse.bench.compare import compare
from trisparse.bench.report import reading
from trisparse.bench.rows import Row, identity, newest, read_rows, told_apart

RECORDED = Path(__file__).resolve().parents[2] / "bench/results/runs"


def row(seconds=1.0, *, command="trisparse bench run toy", kind="measurement", **parameters):
    times = {"min": seconds, "median": seconds, "p90": seconds, "repeats": 1.0}
    where = {"device": "cpu", "run": "r", "time": "now", "environment": {}}
    return Row("toy", "c", "a", parameters, kind, command=command, seconds=times, **where)


@pytest.mark.parametrize("name", ["model", "scale", "dtype", "batch", "samples", "quick"])
def test_rows_of_other_parameters_are_other_measurements(name):
    one, two = row(1.0, **{name: True}), row(2.0, **{name: False})
    assert newest([one, two]) == [one, two]
    assert newest([one, two, row(3.0, **{name: True})]) == [two, row(3.0, **{name: True})]
    with pytest.raises(ValueError, match="in common"):
        compare([one], [two])
    (first, second) = compare([one, two], [row(4.0, **{name: True}), row(6.0, **{name: False})])
    assert (first.ratio, second.ratio) == (4.0, 3.0)
    assert first.case != second.case


@pytest.mark.parametrize("name", ["grid", "patterns", "binding", "source", "interleaved", "models"])
def test_what_came_out_does_not_make_another_measurement(name):
    one, two = row(dtype="float32", **{name: "x"}), row(2.0, dtype="float32", **{name: ["y"]})
    assert newest([one, two]) == [two]
    assert newest([one, row(2.0, dtype="float32")]) == [row(2.0, dtype="float32")]
    assert [change.ratio for change in compare([one], [two])] == [2.0]


def test_a_measurement_is_not_a_bound():
    assert len(newest([row(), row(kind="bound")])) == 2


def test_a_quick_row_is_known_by_its_command_where_it_does_not_say_so():
    old, new = row(command="trisparse bench run toy --quick"), row(quick=True)
    assert newest([old, new]) == [new]
    assert identity(old) != identity(row(command="trisparse bench run toy"))
    assert identity(row(command="trisparse bench run toy")) == identity(row(quick=False))
    # Where quick changes nothing: in bounds, and where a paper's table says its scale
    assert identity(row(kind="bound", quick=True)) == identity(row(kind="bound", quick=False))
    assert identity(row(scale="tiny", quick=True)) == identity(row(scale="tiny", quick=False))
    assert reading.of_model(old) == reading.of_model(new) == "toy, quick"


def test_a_row_is_itself_after_it_was_written():
    fresh = row(shape=(2, 4), dtype="float32")
    assert identity(Row(**json.loads(json.dumps(asdict(fresh))))) == identity(fresh)


def test_cases_name_the_parameters_that_differ():
    rows = [row(dtype="float32", pattern="2:4"), row(dtype="bfloat16", pattern="2:4", quick=True)]
    assert [found.case for found in told_apart(rows)] == [
        "c (dtype float32, quick no)",
        "c (dtype bfloat16, quick yes)",
    ]
    assert told_apart(rows[:1]) == rows[:1]


def test_the_recorded_rows_are_read_and_each_is_a_measurement_of_its_own():
    for file in RECORDED.glob("*.jsonl"):
        rows = list(read_rows(file))
        last_run = [found for found in rows if found.run == rows[-1].run]
        assert newest(last_run) == last_run
        assert told_apart(last_run) == last_run
