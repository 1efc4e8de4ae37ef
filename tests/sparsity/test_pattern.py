import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trisparse.sparsity.pattern import NM, Rows, Unstructured, kept_of, parse_pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0.0)),
        ("0.5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        (" 62.5 % ", Unstructured(0.625)),
        ("50% layer", Unstructured(0.5, scope="layer")),
        ("90% global", Unstructured(0.9, scope="global")),
        ("25% rows", Rows(0.25)),
        ("2:4", NM(2, 4)),
        ("31:32", NM(31, 32)),
        (NM(1, 4), NM(1, 4)),
    ],
)
def test_parses_every_form(text, expected):
    assert parse_pattern(text) == expected


@pytest.mark.parametrize(
    "wrong",
    [1, 1.0, -0.1, math.nan, math.inf, "100%", "-5%", "1.5", "half", "", "50% columns", "4:4", "5:4", "0:4", "2:33"],
)
def test_refuses_what_is_no_pattern(wrong):
    with pytest.raises(ValueError, match=r"sparsity|n:m"):
        parse_pattern(wrong)


@pytest.mark.parametrize("wrong", [True, None, [0.5]])
def test_refuses_other_types(wrong):
    with pytest.raises(ValueError, match="sparsity must be a number"):
        parse_pattern(wrong)


def test_unknown_scope_is_named():
    with pytest.raises(ValueError, match=r"scope must be.*'column'"):
        Unstructured(0.5, scope="column")


@given(st.floats(0, 0.999), st.sampled_from(["row", "layer", "global"]))
def test_unstructured_text_reads_back(sparsity, scope):
    pattern = Unstructured(round(sparsity, 6), scope)
    again = parse_pattern(str(pattern))
    assert again.scope == scope
    assert again.sparsity == pytest.approx(pattern.sparsity, abs=1e-7)


@given(st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_nm_text_reads_back(n_and_m):
    pattern = NM(*n_and_m)
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.sparsity == pytest.approx(1 - n_and_m[0] / n_and_m[1])


@pytest.mark.parametrize(
    ("count", "sparsity", "kept"),
    [(8, 0.5, 4), (10, 0.3, 7), (100, 0.29, 71), (576, 0.5, 288), (3, 0.0, 3), (0, 0.5, 0)],
)
def test_budget_is_the_nearest_count(count, sparsity, kept):
    assert kept_of(count, sparsity) == kept
