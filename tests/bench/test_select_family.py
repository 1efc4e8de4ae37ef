"""The benchmark "select": data without ties, every contestant equal to the reference, and a broken one caught."""

from __future__ import annotations

import pytest
import torch

from trisparse.bench.families import select as family
from trisparse.bench.families import usual_selection as usual
from trisparse.bench.registry import Options
from trisparse.bench.runner import right_contestants

CPU = torch.device("cpu")


def all_cases(dtype, only="", compiled=False):
    return list(family.cases(32, 64, dtype, Options(only=only), compiled=compiled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_is_right(dtype):
    cases = all_cases(dtype)
    assert len(cases) == 2 * 7 + 2
    for case in cases:
        wrong = []
        right_contestants(case, wrong.append)
        assert not wrong, case.name
        assert {"usual", "trisparse"} <= case.contestants.keys()
        assert ("vectorised" in case.contestants) == (":" in case.parameters["pattern"])


def test_a_broken_selection_is_caught(monkeypatch):
    monkeypatch.setattr(family, "select_rows", lambda weight, k, **_: torch.ones_like(weight, dtype=torch.bool))
    (case,) = all_cases(torch.float32, only="row 50%, |W|, ")
    wrong = []
    assert right_contestants(case, wrong.append).keys() == {"usual"}
    assert wrong == ["trisparse is wrong and not timed: AssertionError: not equal to the reference"]


def test_one_wrong_tensor_of_a_global_selection_is_caught(monkeypatch):
    def broken(weights, k, **_):
        masks = family.select_global_ref(weights, k)
        return [*masks[:-1], ~masks[-1]]

    monkeypatch.setattr(family, "select_global", broken)
    (case,) = all_cases(torch.float32, only="global 50%, |W|, ")
    assert right_contestants(case, lambda _: None).keys() == {"usual"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_have_no_ties_in_a_row(dtype):
    x = usual.powers_of_two(300, CPU)
    for vector in (None, x):
        weight = usual.tie_free(40, 300, dtype, vector, CPU)
        scores = usual.scores(weight.float(), vector)
        assert weight.dtype == dtype
        assert (weight < 0).any()
        assert all(row.unique().numel() == 300 for row in scores)
    inputs = usual.tie_free_squares(40, 300, dtype, CPU)
    assert inputs is not None
    scores = usual.published_metric(*inputs)
    assert all(row.unique().numel() == 300 for row in scores)
    exact = inputs[0].double() ** 2 * inputs[1].double()
    assert torch.equal(scores.double(), exact)


def test_what_has_no_such_weights_is_refused(capsys):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        usual.tie_free(2, 4, torch.float16, None, CPU)
    with pytest.raises(ValueError, match="too few values for 40000"):
        usual.tie_free(1, 40000, torch.bfloat16, None, CPU)
    assert usual.tie_free_squares(1, 20000, torch.bfloat16, CPU) is None
    assert not list(family.cases(1, 20000, torch.bfloat16, Options(only="mms"), compiled=False))
    assert "1x20000 bfloat16 has no scores of abs(W * W) * mms(G) without ties" in capsys.readouterr().err


def test_by_hand():
    metric = torch.tensor([[1.0, 4.0, 3.0, 2.0], [8.0, 5.0, 6.0, 7.0]])
    half = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(usual.usual_rows(metric, 2), half)
    assert torch.equal(usual.usual_nm(metric, 2, 4), half)
    assert torch.equal(usual.vectorised_nm(metric, 2, 4), half)
    lower = torch.tensor([[False] * 4, [True] * 4])
    assert torch.equal(usual.usual_layer(metric, 4), lower)
    assert torch.equal(torch.cat(usual.usual_global([metric[:1], metric[1:]], 4)), lower)


def test_without_a_compiler_its_contestant_is_left_out_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(family, "compiler_problem", lambda device: "InvalidCxxCompiler: no g++")
    monkeypatch.setattr(family, "QUICK_SHAPES", ((8, 32, torch.float32),))
    cases = list(family.select(Options(quick=True)))
    assert len(cases) == 2 * 5 + 2
    assert not any("torch.compile" in case.contestants for case in cases)
    assert "torch.compile does not work here and is left out (InvalidCxxCompiler: no g++)" in capsys.readouterr().err


def test_bytes_are_the_compulsory_ones():
    found = {case.parameters["score"]: case.bytes for case in all_cases(torch.bfloat16, only="row")}
    size = 32 * 64
    assert found == {
        "|W|": 2 * size + size,
        "|W| * X": 2 * size + 4 * 64 + size,
        "abs(W * W) * mms(G)": 2 * size + 4 * size + size,
    }


def test_the_options_dtype_is_taken_once_a_shape(monkeypatch):
    monkeypatch.setattr(family, "compiler_problem", lambda device: "none")
    cases = list(family.select(Options(quick=True, dtype=torch.float32, only="2:4, |W|, ")))
    assert [case.name for case in cases] == ["2:4, |W|, 1024x1024 float32", "2:4, |W|, 2048x2048 float32"]
