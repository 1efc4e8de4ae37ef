"""`trisparse bench list` and `run`: what they print, write and end with."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from trisparse import cli
from trisparse.bench import registry
from trisparse.bench.registry import Case, Measured, Options, benchmark, benchmarks
from trisparse.bench.rows import read_rows


@pytest.fixture
def toy(monkeypatch):
    """A benchmark of a right and, where the model is "bad", a wrong contestant; gives the options that it saw."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_MODULES", ())
    seen = []

    @benchmark("toy", "doubles one", takes=("dtype", "model", "repeats"))
    def run(options):
        seen.append(options)
        one = torch.ones(1, dtype=options.dtype or torch.float32)
        wrong = {"wrong": lambda: one} if options.model == "bad" else {}
        yield Case("twice [a]", {}, {"add": lambda: one + one, **wrong}, lambda: one * 2, "add", repeats=2)
        yield Measured("quality", {}, {"add": {"perplexity": 12.5}})

    return seen


def invoke(*args):
    return CliRunner().invoke(cli.app, ["bench", *map(str, args)])


def test_list(toy):
    assert invoke("list").stdout == "toy  doubles one\n"
    assert json.loads(invoke("list", "--json").stdout) == {"toy": "doubles one"}


def test_run(toy, tmp_path):
    options = ["--quick", "--device", "cpu", "--dtype", "bfloat16", "--model", "m", "--repeats", 4, "--out", tmp_path]
    result = invoke("run", "toy", *options)
    assert result.exit_code == 0, result.output
    assert "twice [a]" in result.stdout
    assert "12.5" in result.stdout
    assert "toy: quality: add" in result.stderr
    timed, quality = read_rows(tmp_path / "toy.jsonl")
    command = "trisparse bench run toy --quick --device cpu --dtype bfloat16 --model m --repeats 4 --out "
    assert timed.command.startswith(command)
    assert toy == [Options(True, torch.device("cpu"), torch.bfloat16, "m", 4, out=tmp_path, command=timed.command)]
    assert timed.seconds["repeats"] == 4
    assert quality.metrics == {"perplexity": 12.5}


def test_a_wrong_contestant_ends_with_1(toy, tmp_path):
    result = invoke("run", "toy", "--model", "bad", "--device", "cpu", "--out", tmp_path, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert [row["contestant"] for row in content["rows"]] == ["add", "add"]
    assert content["errors"] == [
        "toy: twice [a]: wrong is wrong and not timed: AssertionError: not equal to the reference"
    ]
    assert "error: toy: twice [a]: wrong is wrong" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "tow"], "there is no benchmark 'tow'; known are toy"),
        (["run", "toy", "--dtype", "fp8"], "dtype must be one of float32, bfloat16, float16, got 'fp8'"),
        (["run", "toy", "--repeats", "0"], "repeats must be at least 1"),
        (["run", "toy", "--device", "meta"], "device must be cpu or cuda"),
        (["run", "toy", "--device", "cuda"], "benchmark toy measures cpu, not cuda"),
        (["run", "toy", "--scale", "tiny"], "benchmark toy does not read --scale"),
        (["compare", "nothing", "here"], "has no rows of benchmarks"),
    ],
)
def test_errors_are_one_line(toy, trisparse_error, args, message):
    assert message in trisparse_error("bench", *args)


def test_a_name_is_registered_once(toy):
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        benchmark("toy", "again")(lambda options: iter(()))


def test_the_families_are_there():
    known = benchmarks()
    families = {"select", "linear", "tokens", "prune", "roofline"}
    assert families | {"papers/perp-table-1"} <= known.keys()
    on_gpus = {name for name, item in known.items() if "cuda" in item.devices and not name.startswith("papers/")}
    assert on_gpus == families - {"roofline"}
    assert all(item.takes == ("model", "scale") for name, item in known.items() if name.startswith("papers/"))


def test_no_case_of_that_name_ends_with_1(toy, tmp_path):
    result = invoke("run", "toy", "--only", "zzz", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1
    assert "error: no case of toy has 'zzz' in its name" in result.stderr


def test_tables_say_small_rates_and_the_gpu_that_bounds_hold_for():
    from trisparse.bench.row_table import tables
    from trisparse.bench.rows import Row

    about = {"run": "r", "time": "now", "command": "x", "environment": {}, "device": "cpu"}
    timed = Row("toy", "c", "a", {}, "measurement", gb_per_s=0.0123, **about)
    bound = Row("toy", "c", "a", {"gpu": "A100-SXM-80GB"}, "bound", metrics={"bound_us": 2.0}, **about)
    one, two = tables([timed, bound])
    assert [str(cell) for cell in one.columns[1].cells][-1] == "0.0123"
    assert (one.title, two.title) == ("toy on cpu", "toy on A100-SXM-80GB (bounds, not measured)")
