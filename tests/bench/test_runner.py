"""What is wrong is not timed, rounds are interleaved, and every row has the figures that can be computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from trisparse.bench import runner
from trisparse.bench.registry import Benchmark, Case, Measured, Options
from trisparse.bench.rows import read_rows

RIGHT = torch.ones(2)


def case(contestants, **more):
    return Case("c", {"n": 2}, contestants, lambda: RIGHT, "a", **({"repeats": 2} | more))


def run(items, machine, tmp_path, options=None, **more):
    def items_of(_):
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    bench = Benchmark("toy", "a toy", items_of, takes=("repeats",))
    how = {"command": "trisparse bench run toy", "out": tmp_path, "machine": machine} | more
    return runner.run([bench], options or Options(), **how)


def test_calls_go_in_turn_after_the_check_and_the_warm_up(machine, tmp_path):
    calls = []
    contestants = {name: lambda name=name: (calls.append(name), RIGHT)[1] for name in "ab"}
    run([case(contestants)], machine(), tmp_path)
    assert "".join(calls) == "ab" + "ab" + "abab"  # check, warm-up, two rounds


def test_figures_by_hand(machine, tmp_path):
    # Warm-up first, then the rounds (a 4, b 1), (a 4, b 2), (a 2, b 2): ratios 4, 2, 1.
    seconds = [9, 9, 4, 1, 4, 2, 2, 2]
    item = case(
        {"a": lambda: RIGHT, "b": lambda: RIGHT},
        repeats=3, bytes=100, flops=400, tokens=6, metrics={"b": {"held": 5.0}},
    )  # fmt: skip
    outcome = run([item], machine(seconds), tmp_path)
    a, b = outcome.rows
    assert a.seconds == {"min": 2, "median": 4, "p90": 4, "repeats": 3}
    assert b.seconds == {"min": 1, "median": 2, "p90": 2, "repeats": 3}
    assert (a.speedup, b.speedup) == (1.0, 2.0)
    assert (b.gb_per_s, b.tflop_per_s, b.tokens_per_s) == (50e-9, 200e-12, 3.0)
    # 100 bytes take 1 s at 100 bytes/s, 400 flops 0.4 s: the roofline allows 1 s of the 2.
    assert (a.roofline_share, b.roofline_share) == (0.25, 0.5)
    assert (a.metrics, b.metrics) == ({}, {"held": 5.0})
    assert b.environment["peaks"]["flops_per_s"] == 1000.0
    assert (b.baseline, b.parameters, b.device, b.kind) == ("a", {"n": 2, "quick": False}, "cpu", "measurement")
    assert b.run.endswith("-abcdef0")
    assert list(read_rows(tmp_path / "toy.jsonl")) == outcome.rows


def test_what_is_wrong_is_not_timed_and_the_others_go_on(machine, tmp_path):
    calls = []

    def wrong():
        calls.append("wrong")
        return RIGHT + 1

    def broken():
        raise RuntimeError("no such\nkernel")

    item = case({"wrong": wrong, "broken": broken, "a": lambda: RIGHT})
    outcome = run([item], machine(), tmp_path)
    assert calls == ["wrong"]
    assert [row.contestant for row in outcome.rows] == ["a"]
    assert outcome.errors == [
        "toy: c: wrong is wrong and not timed: AssertionError: not equal to the reference",
        "toy: c: broken is wrong and not timed: RuntimeError: no such kernel",
    ]


def test_a_case_may_bring_its_check(machine, tmp_path):
    def close(result, expected):
        assert (result - expected).abs().max() < 0.5

    item = case({"a": lambda: RIGHT + 0.1, "b": lambda: RIGHT + 1}, check=close)
    outcome = run([item], machine(), tmp_path)
    assert [row.contestant for row in outcome.rows] == ["a"]


def test_without_its_baseline_a_case_has_no_speedups(machine, tmp_path):
    outcome = run([case({"a": lambda: RIGHT + 1, "b": lambda: RIGHT})], machine(), tmp_path)
    (row,) = outcome.rows
    assert (row.contestant, row.speedup, row.baseline) == ("b", None, "a")


def test_nothing_right_writes_nothing(machine, tmp_path):
    outcome = run([case({"a": lambda: RIGHT + 1})], machine(), tmp_path)
    assert (outcome.rows, outcome.files, list(tmp_path.iterdir())) == ([], [], [])


def test_an_unknown_peak_gives_no_share(machine, tmp_path):
    outcome = run([case({"a": lambda: RIGHT}, flops=4, peak="bfloat16")], machine(), tmp_path)
    assert outcome.rows[0].roofline_share is None
    assert outcome.rows[0].tflop_per_s == 4e-12


def test_rows_are_there_before_the_next_case_and_after_a_benchmark_that_raises(machine, tmp_path):
    seen = []

    def items(_):
        yield Measured("first", {}, {"a": {"perplexity": 3.0}})
        seen.extend(read_rows(tmp_path / "bad.jsonl"))
        raise ValueError("out of luck")

    def more(_):
        yield Measured("second", {}, {"a": {"perplexity": 4.0}})

    both = [Benchmark("bad", "", items), Benchmark("good", "", more)]
    outcome = runner.run(both, Options(), command="x", out=tmp_path, machine=machine())
    assert [row.metrics for row in seen] == [{"perplexity": 3.0}]
    assert [row.case for row in outcome.rows] == ["first", "second"]
    assert outcome.errors == ["bad: ValueError: out of luck"]
    assert outcome.files == [tmp_path / "bad.jsonl", tmp_path / "good.jsonl"]


def test_a_case_whose_reference_raises_is_an_error_and_the_next_is_run(machine, tmp_path):
    def reference():
        raise RuntimeError("no memory")

    items = [Case("bad", {}, {"a": lambda: RIGHT}, reference, "a"), case({"a": lambda: RIGHT})]
    outcome = run(items, machine(), tmp_path)
    assert outcome.errors == ["toy: bad: RuntimeError: no memory"]
    assert [row.case for row in outcome.rows] == ["c"]


def test_an_interrupt_is_not_swallowed(machine, tmp_path):
    def stop(_):
        yield Measured("first", {}, {"a": {"perplexity": 3.0}})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run([Benchmark("toy", "", stop)], Options(), command="x", out=tmp_path, machine=machine())
    assert [row.case for row in read_rows(tmp_path / "toy.jsonl")] == ["first"]


def test_measured_rows(machine, tmp_path):
    items = [
        Measured("timed", {}, {"b": {"peak_bytes": 7.0}}, {"a": [2.0, 4.0], "b": [1.0, 1.0]}, baseline="a"),
        Measured("tokens", {}, {"a": {"tokens_per_s": 10.0}, "b": {"tokens_per_s": 5.0}}, baseline="a"),
        Measured("bound", {}, {"a": {"gb_per_s": 9.0}}, kind="bound"),
    ]
    rows = {(row.case, row.contestant): row for row in run(items, machine([]), tmp_path).rows}
    assert rows["timed", "b"].speedup == 3.0  # median of 2 and 4
    assert rows["timed", "b"].metrics == {"peak_bytes": 7.0}
    assert (rows["tokens", "b"].speedup, rows["tokens", "b"].tokens_per_s) == (0.5, 5.0)
    assert rows["tokens", "b"].metrics == {}
    bound = rows["bound", "a"]
    assert (bound.kind, bound.gb_per_s, bound.speedup, bound.seconds) == ("bound", 9.0, None, {})


def test_options_choose_cases_and_repeats(machine, tmp_path):
    items = [case({"a": lambda: RIGHT}), Measured("other", {}, {"a": {"perplexity": 1.0}})]
    outcome = run(items, machine(), tmp_path, Options(only="c", repeats=5))
    assert [(row.case, row.seconds["repeats"]) for row in outcome.rows] == [("c", 5)]


def test_no_case_of_that_name_is_an_error(machine, tmp_path):
    outcome = run([case({"a": lambda: RIGHT})], machine(), tmp_path, Options(only="zzz"))
    assert (outcome.rows, outcome.errors) == ([], ["no case of toy has 'zzz' in its name"])


def test_an_option_that_a_benchmark_does_not_read_is_an_error(machine, tmp_path):
    with pytest.raises(ValueError, match="toy does not read --model; its options are --quick --only --repeats"):
        run([case({"a": lambda: RIGHT})], machine(), tmp_path, Options(model="smollm2"))


def test_what_measures_the_cpu_alone_says_so_on_a_machine_with_a_gpu(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "this_machine", lambda device: replace(machine(), device=device))
    monkeypatch.setattr(runner, "clocks", lambda device: None)
    gpu = replace(machine(), device=torch.device("cuda"), name="NVIDIA L4")
    seen = []

    def items(options):
        seen.append(options.device.type)
        yield Measured("c", {}, {"a": {"perplexity": 3.0}})

    both = [Benchmark("one", "", items), Benchmark("two", "", items, devices=("cpu", "cuda"))]
    outcome = runner.run(both, Options(device=gpu.device), command="x", out=tmp_path, machine=gpu)
    assert seen == ["cpu", "cuda"]
    assert [row.device for row in outcome.rows] == ["cpu", "NVIDIA L4"]


@pytest.mark.parametrize(("dirty", "folder"), [(False, "runs"), (True, "dirty")])
def test_a_changed_checkout_has_its_own_folder(machine, tmp_path, monkeypatch, dirty, folder):
    monkeypatch.setattr(runner, "checkout", lambda: tmp_path)
    outcome = run([case({"a": lambda: RIGHT})], machine(dirty=dirty), tmp_path, out=None)
    assert outcome.files == [tmp_path / "bench/results" / folder / "toy.jsonl"]


def test_outside_a_checkout_rows_go_to_the_working_directory(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "checkout", lambda: None)
    run([case({"a": lambda: RIGHT})], machine(), tmp_path, out=None)
    assert (tmp_path / "bench-results" / "toy.jsonl").is_file()


def test_a_torn_last_line_is_neither_read_nor_kept(machine, tmp_path):
    file = tmp_path / "toy.jsonl"
    run([case({"a": lambda: RIGHT})], machine(), tmp_path)
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    assert len(list(read_rows(file))) == 1
    run([case({"a": lambda: RIGHT})], machine(), tmp_path)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 2


def test_names(monkeypatch):
    known = {name: Benchmark(name, "", lambda _: iter(())) for name in ("papers/one", "papers/two", "select")}
    monkeypatch.setattr(runner, "benchmarks", lambda: known)
    assert [item.name for item in runner.chosen(["papers/", "select", "papers/one"])] == list(known)
    with pytest.raises(ValueError, match="no benchmark 'selct'; known are papers/one, papers/two, select"):
        runner.chosen(["selct"])
    with pytest.raises(ValueError, match="name at least one"):
        runner.chosen([])
    assert [item.name for item in runner.chosen(["select"], "cpu")] == ["select"]
    with pytest.raises(ValueError, match="select measures cpu, not cuda:1"):
        runner.chosen(["select"], "cuda:1")


@pytest.mark.parametrize(("device", "message"), [("cuda", "finds no CUDA device"), ("meta", "must be cpu or cuda")])
def test_devices_that_cannot_be_timed(device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        runner.this_machine(torch.device(device))
