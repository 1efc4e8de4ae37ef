"""The benchmark roofline: bounds by name, from a count or from its record, and what kernels compile to."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from trisparse.bench.bounds import __main__ as command
from trisparse.bench.bounds import record
from trisparse.bench.bounds.studies import STUDIES
from trisparse.bench.families import roofline
from trisparse.bench.registry import Options

TRITON = os.environ.get("TRITON_INTERPRET") != "1"


def without_counts(study, rows):
    def count(case):
        raise AssertionError(f"{case} was counted")

    return replace(study, count=count, cases=lambda: iter(rows))


@pytest.mark.parametrize("name", STUDIES)
def test_records_hold_every_case_of_their_study_and_the_command_that_makes_them(name):
    study = STUDIES[name]
    content = json.loads((record.RESULTS / study.file).read_text())
    assert content["how"] == f"python -m trisparse.bench.bounds {name}"
    cases = list(study.cases())
    rows = study.recorded()
    assert [{key: row[key] for key in case} for case, row in zip(cases, rows, strict=True)] == cases
    found = list(roofline.bounds(study, anew=False))
    assert [row.name for row in found] == [title for case in cases for title in study.names(case)]
    for row in found:
        assert row.kind == "bound"
        assert not row.seconds
        assert row.parameters["gpu"] == "A100-SXM-80GB"
        assert row.parameters["source"] == f"bench/results/{study.file}"
        assert row.parameters["binding"]
        assert all(metrics["bound_us"] > 0 for metrics in row.metrics.values())
        own = list(row.metrics.values())[-1]
        assert {"bound_us", "bytes_over_compulsory", "spill_bytes", "bytes"} <= set(own)
        # no more than what the device moves in that time
        assert all(metrics["bytes"] <= 1.01 * 2039e3 * metrics["bound_us"] for metrics in row.metrics.values())
        assert all(metrics.get("flops", 1) > 0 for metrics in row.metrics.values())
        assert ("flops" in own) == (name != "selection")


def test_names_differ_between_all_studies():
    names = [name for study in STUDIES.values() for case in study.cases() for name in study.names(case)]
    assert len(set(names)) == len(names)


def test_figures_of_one_row_by_hand():
    by_name = {row.name: row for row in roofline.bounds(STUDIES["linear24"], anew=False)}
    row = by_name["linear24 4096x4096 2:4, 1 tokens"]
    # 9/8 bytes a bf16 weight, x and y, and 2 bytes a dense one, at 2039 GB/s
    compressed, dense = (4096 * 4096 * share + 2 * 8192 for share in (9 / 8, 2))
    assert row.metrics["dense"]["bound_us"] == pytest.approx(dense / 2039e3, rel=1e-3)
    assert row.metrics["mma.sp"]["bound_us"] == pytest.approx(compressed / 2039e3, rel=1e-2)
    assert row.metrics["mma.sp"]["speedup"] == pytest.approx(dense / compressed, rel=1e-2)
    assert row.metrics["dense"]["speedup"] == 1
    assert row.metrics["dense"]["bytes"] == 4096 * 4096 * 2 + 2 * 8192
    assert {own["flops"] for own in row.metrics.values()} == {2 * 4096 * 4096}
    assert row.baseline == "dense"


def test_only_counts_what_it_shows():
    study = STUDIES["linear24"]
    case = next(study.cases())
    one = replace(study, count=lambda given: {"counted": given})
    assert list(one.counted("4096x11008 2:4, 512 tokens, rank 16")) == [
        {**wanted, "counted": wanted} for wanted in [{"rows": 4096, "cols": 11008, "tokens": 512, "rank": 16}]
    ]
    assert not list(without_counts(study, [case]).counted("no such row"))


def test_without_ptxsim_or_quick_nothing_is_counted(monkeypatch):
    def missing():
        raise ImportError("no ptxsim")

    asked = []

    def bounds(study, *, anew, only):
        asked.append(anew)
        return iter(())

    monkeypatch.setattr(roofline, "bounds", bounds)
    monkeypatch.setattr(roofline, "SHAPES", ())
    list(roofline.roofline(Options(quick=True)))
    monkeypatch.setattr(roofline, "ptxsim", missing)
    list(roofline.roofline(Options()))
    assert asked == [False] * 2 * len(STUDIES)
    monkeypatch.setattr(roofline, "ptxsim", lambda: None)
    asked.clear()
    list(roofline.roofline(Options()))
    assert asked == [True] * len(STUDIES)


def test_without_a_record(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no obs-bounds-a100\.json: its records are in a checkout"):
        STUDIES["obs"].recorded()


def test_the_command_writes_records(monkeypatch, tmp_path, capsys):
    case = {"rows": 4096, "n": 0, "m": 0, "by_columns": False}
    study = replace(STUDIES["obs"], cases=lambda: iter([case]), count=lambda case: {"dram_us": 1.0})
    monkeypatch.setitem(STUDIES, "obs", study)
    command.main(["obs", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "obs-bounds-a100.json").read_text())
    assert content["results"] == [{**case, "dram_us": 1.0}]
    assert content["block"] == 128
    with pytest.raises(SystemExit):
        command.main(["osb"])
    assert "there is no study 'osb'; known are selection, linear" in capsys.readouterr().err


@pytest.mark.skipif(not TRITON, reason="compiles kernels")
def test_resources_of_compiled_kernels():
    pytest.importorskip("triton")
    (row,) = roofline.compiled((4096, 4096), ("2:4 compressed",))
    assert row.name == "sm_80: 2:4 compressed, 4096x4096"
    assert row.kind == "bound"
    ((kernel, found),) = row.metrics.items()
    assert kernel == "select_nm_kernel"
    assert 16 <= found["registers"] <= 255
    assert found["spill_bytes"] == 0
    assert not list(roofline.compiled((4096, 4096), only="no such operation"))


def test_quick_compiles_operations_that_there_are():
    assert set(roofline.QUICK) <= set(roofline.operations_of(4096, 4096))


@pytest.mark.ptx
@pytest.mark.skipif(not TRITON, reason="compiles kernels")
def test_a_count_equals_its_record():
    if not roofline.emulator_found():
        pytest.skip("needs ptxsim")
    study, name = STUDIES["linear24"], "linear24 4096x4096 2:4, 1 tokens, rank 16"
    (case,) = study.counted(name)
    recorded = next(row for row in study.recorded() if study.names(row) == (name,))
    for figure in ("bound_us", "dense_us", "dram_bytes"):
        assert case[figure] == pytest.approx(recorded[figure], rel=0.01)
