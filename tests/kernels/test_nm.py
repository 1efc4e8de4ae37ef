"""N:M selection: by hand, against a sort in plain Python, and route against reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.kernels.nm import select_nm, select_nm_ref

BOTH = pytest.mark.parametrize("select", [select_nm_ref, select_nm])
PATTERNS = [(2, 4), (4, 8), (1, 4), (8, 16), (2, 8), (1, 2), (3, 7), (31, 32)]


@BOTH
def test_by_hand(select):
    weight = torch.tensor([[3.0, -4.0, 0.5, 1.0, 0.0, 2.0, -1.0, 3.0]])
    assert select(weight, 2, 4).tolist() == [[True, True, False, False, False, True, False, True]]
    assert select(weight, 1, 2).tolist() == [[False, True, False, True, False, True, False, True]]
    # |W| * X: 3, 4, 5, 0.1 in the first group
    x = torch.tensor([1.0, 1.0, 10.0, 0.1, 1.0, 1.0, 1.0, 1.0])
    assert select(weight, 2, 4, x=x)[0, :4].tolist() == [False, True, True, False]
    assert select(weight, 2, 4, absolute=False)[0, :4].tolist() == [True, False, False, True]


@BOTH
def test_ties_keep_the_lower_column(select):
    weight = torch.tensor([[1.0, 1.0, -1.0, 1.0, -0.0, 0.0, -0.0, 0.0]])
    expected = [[True, True, False, False, True, True, False, False]]
    assert select(weight, 2, 4).tolist() == expected
    zeros = torch.tensor([[0.0, -0.0, -1.0, 0.0]])
    assert select(zeros, 2, 4, absolute=False).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_reference_against_a_python_sort(awkward, greatest, dtype, n, m):
    for name, weight in awkward(3, 2 * m, dtype).items():
        for absolute in (True, False):
            groups = [[abs(v) if absolute else v for v in group] for group in weight.reshape(-1, m).tolist()]
            expected = torch.tensor([greatest(group, n) for group in groups]).reshape(3, 2 * m)
            assert torch.equal(select_nm_ref(weight, n, m, absolute=absolute), expected), name


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("groups", [0, 1, 9, 300])
def test_route_equals_reference(awkward, dtype, n, m, groups):
    x = torch.rand(groups * m, generator=torch.Generator().manual_seed(0))
    for name, weight in awkward(3, groups * m, dtype).items():
        for vector in (None, x, x - 0.5):
            for absolute in (True, False):
                mask = select_nm(weight, n, m, x=vector, absolute=absolute)
                expected = select_nm_ref(weight, n, m, x=vector, absolute=absolute)
                assert torch.equal(mask, expected), (name, absolute)


def test_several_chunks_and_no_rows():
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    assert torch.equal(select_nm(weight, 2, 4), select_nm_ref(weight, 2, 4))
    assert select_nm(weight[:0], 2, 4).shape == (0, 1024)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    m = data.draw(st.integers(2, 32))
    n, rows, groups = data.draw(st.integers(1, m - 1)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    size = rows * groups * m
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]) | st.floats(-1e3, 1e3, width=32)
    weight = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).reshape(rows, groups * m)
    mask = select_nm(weight, n, m)
    assert (mask.reshape(-1, m).sum(1) == n).all()  # the exact budget
    order = torch.randperm(rows)
    assert torch.equal(select_nm(weight[order], n, m), mask[order])
    assert torch.equal(select_nm(weight * 2.0 ** data.draw(st.integers(0, 20)), n, m), mask)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 4}, r"n is 4; it must be in 1\.\.3 for m = 4"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.0}, "n is 2.0; it must be an int"),
        ({"m": 33}, r"m is 33; it must be in 2\.\.32"),
        ({"m": 1}, "m is 1"),
        ({"m": 3}, "weight has 8 columns; they must be a multiple of m = 3"),
        ({"weight": torch.ones(8)}, r"weight has shape \(8,\)"),
        ({"weight": torch.ones(2, 8, dtype=torch.int8)}, "weight has dtype torch.int8"),
        ({"weight": torch.ones(8, 8).T}, "weight has strides"),
        ({"weight": torch.full((1, 4), math.nan)}, "weight gives NaN"),
        ({"x": torch.ones(7)}, r"x has shape \(7,\)"),
        ({"weight": torch.full((1, 8), math.inf), "x": torch.zeros(8)}, "weight times x gives NaN"),
    ],
)
def test_wrong_input(select, arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"weight": torch.ones(2, 8), "n": 2, "m": 4, **arguments})
