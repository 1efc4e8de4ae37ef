"""Row selection: by hand, against a sort in plain Python, and route against reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.kernels.select import select_rows, select_rows_ref

BOTH = pytest.mark.parametrize("select", [select_rows_ref, select_rows])
SHAPES = [(1, 1), (3, 1), (1, 7), (5, 63), (4, 64), (3, 65), (2, 257), (2, 4097), (0, 8), (3, 0)]


def vector(cols: int) -> torch.Tensor:
    return torch.rand(cols, generator=torch.Generator().manual_seed(cols)) + 0.25


@BOTH
def test_by_hand(select):
    weight = torch.tensor([[3.0, -4.0, 0.5, 1.0], [-1.0, 2.0, -3.0, 0.0]])
    assert select(weight, 2).tolist() == [[True, True, False, False], [False, True, True, False]]
    # |W| * X: 3, 4, 5, 0.1 and 1, 2, 30, 0
    x = torch.tensor([1.0, 1.0, 10.0, 0.1])
    assert select(weight, 2, x=x).tolist() == [[False, True, True, False], [False, True, True, False]]
    # W itself: -4 and -3 are the least
    assert select(weight, 3, absolute=False).tolist() == [[True, False, True, True], [True, True, False, True]]


@BOTH
def test_ties_keep_the_lower_column(select):
    weight = torch.tensor([[1.0, -2.0, 2.0, 2.0, -1.0, 1.0]])
    assert select(weight, 2).tolist() == [[False, True, True, False, False, False]]
    assert select(weight, 4).tolist() == [[True, True, True, True, False, False]]
    zeros = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    assert select(zeros, 2, absolute=False).tolist() == [[True, True, False, False]]


@BOTH
def test_infinities_are_scores(select):
    weight = torch.tensor([[-math.inf, 5.0, math.inf, 3.0]])
    assert select(weight, 1).tolist() == [[True, False, False, False]]
    assert select(weight, 3, absolute=False).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (3, 33)])
def test_reference_against_a_python_sort(awkward, greatest, dtype, shape, absolute):
    for name, weight in awkward(*shape, dtype).items():
        for k in {0, 1, shape[1] // 2, shape[1]}:
            rows = [[abs(v) if absolute else v for v in row] for row in weight.tolist()]
            expected = [greatest(row, k) for row in rows]
            assert select_rows_ref(weight, k, absolute=absolute).tolist() == expected, (name, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_route_equals_reference(awkward, dtype, shape):
    for name, weight in awkward(*shape, dtype).items():
        for x in (None, vector(shape[1]), -vector(shape[1])):
            for absolute in (True, False):
                for k in {0, min(1, shape[1]), shape[1] // 2, shape[1]}:
                    mask = select_rows(weight, k, x=x, absolute=absolute)
                    expected = select_rows_ref(weight, k, x=x, absolute=absolute)
                    assert torch.equal(mask, expected), (name, k, absolute)
                    assert mask.dtype == torch.bool


def test_several_chunks_and_threads_and_fp64():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.randn(300, 1024, generator=generator, dtype=torch.float64).to(dtype)
        assert torch.equal(select_rows(weight, 300), select_rows_ref(weight, 300))


def test_fp64_is_not_rounded_to_fp32():
    weight = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert select_rows(weight, 1).tolist() == select_rows_ref(weight, 1).tolist() == [[False, True]]


def test_parameters_and_the_weight_stay_untouched():
    weight = torch.nn.Parameter(torch.randn(4, 16))
    before = weight.detach().clone()
    mask = select_rows(weight, 8, x=torch.rand(16, requires_grad=True))
    assert not mask.requires_grad
    assert torch.equal(weight, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -3.0]) | st.floats(-1e3, 1e3, width=32)
    weight = torch.tensor(data.draw(st.lists(values, min_size=rows * cols, max_size=rows * cols)))
    weight = weight.reshape(rows, cols)
    k = data.draw(st.integers(0, cols))
    mask = select_rows(weight, k)
    assert (mask.sum(1) == k).all()  # the exact budget
    order = torch.randperm(rows)
    assert torch.equal(select_rows(weight[order], k), mask[order])
    assert torch.equal(select_rows(weight * 2.0 ** data.draw(st.integers(0, 20)), k), mask)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, r"k is 5; it must be an int in 0\.\.4"),
        ({"k": -1}, "k is -1"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": True}, "k is True"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\)"),
        ({"weight": torch.ones(2, 4, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"weight": torch.ones(4, 2).T}, r"weight has strides \(1, 2\)"),
        ({"weight": torch.tensor([[1.0, math.nan, 0.0, 0.0]])}, "weight gives NaN"),
        ({"weight": torch.tensor([[1.0, -math.nan, 0.0, 0.0]]).bfloat16()}, "weight gives NaN"),
        ({"weight": torch.tensor([[1.0, math.inf, 0.0, 0.0]]), "x": torch.zeros(4)}, "weight times x gives NaN"),
        ({"weight": torch.tensor([[1.0, math.nan, 0.0, 0.0]]), "k": 0}, "weight gives NaN"),
        ({"weight": -torch.tensor([[1.0, math.nan, 0.0, 0.0]]), "k": 4, "absolute": False}, "weight gives NaN"),
        ({"x": torch.ones(3)}, r"x has shape \(3,\)"),
        ({"x": torch.ones(1, 4)}, r"x has shape \(1, 4\)"),
        ({"x": torch.ones(4, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.ones(4, device="meta")}, "x is on meta"),
    ],
)
def test_wrong_input(select, arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"weight": torch.ones(2, 4), "k": 2, **arguments})
