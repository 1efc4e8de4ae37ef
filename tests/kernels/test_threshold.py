"""Global selection: by hand, against a sort in plain Python, and route against reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.kernels import threshold
from trisparse.kernels.threshold import select_global, select_global_ref

BOTH = pytest.mark.parametrize("select", [select_global_ref, select_global])


def equal(masks, expected):
    return len(masks) == len(expected) and all(map(torch.equal, masks, expected))


@BOTH
def test_by_hand(select):
    first, second = torch.tensor([[3.0, -4.0], [0.5, 1.0]]), torch.tensor([[-2.0, 0.0, 5.0]])
    kept = select([first, second], 3)
    assert [mask.tolist() for mask in kept] == [[[True, True], [False, False]], [[False, False, True]]]
    # |W| * X of the second: 20, 0, 5
    kept = select([first, second], 3, xs=[None, torch.tensor([10.0, 1.0, 1.0])])
    assert [mask.tolist() for mask in kept] == [[[False, True], [False, False]], [[True, False, True]]]
    kept = select([first, second], 3, absolute=False)
    assert [mask.tolist() for mask in kept] == [[[True, False], [False, True]], [[False, False, True]]]
    assert select([], 0) == []


@BOTH
def test_ties_go_by_tensor_then_index(select):
    ones = [torch.ones(1, 2), torch.tensor([[2.0, -1.0], [1.0, 1.0]])]
    assert [mask.tolist() for mask in select(ones, 4)] == [[[True, True]], [[True, True], [False, False]]]
    zeros = [torch.tensor([[-0.0, 0.0]]), torch.tensor([[0.0, -1.0]])]
    assert [m.tolist() for m in select(zeros, 2, absolute=False)] == [[[True, True]], [[False, False]]]


def test_reference_against_a_python_sort(awkward, greatest, dtype):
    for name, weight in awkward(4, 7, dtype).items():
        other = awkward(3, 5, torch.float32)[name]
        for k in (0, 1, 20, 43):
            scores = [abs(v) for part in (weight, other) for v in part.flatten().tolist()]
            marks = torch.tensor(greatest(scores, k))
            expected = [marks[:28].reshape(4, 7), marks[28:].reshape(3, 5)]
            assert equal(select_global_ref([weight, other], k), expected), (name, k)


@pytest.mark.parametrize("small", [True, False], ids=["sampled", "whole"])
def test_route_equals_reference(awkward, dtype, small, monkeypatch):
    if small:  # so that the bracket and the misses are met at sizes that a test can sort
        monkeypatch.setattr(threshold, "_SAMPLES", 16)
        monkeypatch.setattr(threshold, "_MARGIN", 1)
    x = torch.rand(33, generator=torch.Generator().manual_seed(0))
    for name, weight in awkward(20, 33, dtype).items():
        for other in (torch.float32, torch.bfloat16):
            weights = [weight, awkward(7, 33, other)["few values"], weight[:0], weight[:3]]
            total = sum(part.numel() for part in weights)
            for xs in (None, [x, None, x, x - 0.5]):
                for absolute in (True, False):
                    for k in (0, 1, total // 3, total - 1, total):
                        masks = select_global(weights, k, xs=xs, absolute=absolute)
                        expected = select_global_ref(weights, k, xs=xs, absolute=absolute)
                        assert equal(masks, expected), (name, k, absolute)
                        assert sum(int(mask.sum()) for mask in masks) == k


@pytest.mark.parametrize("ties", [True, False])
def test_large_enough_to_sample(ties):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(600, 700, generator=generator), torch.randn(100, 333, generator=generator) * 3]
    if ties:
        weights = [(weight * 3).round() for weight in weights]
    for k in (1, 100, 300_000, 453_299):
        assert equal(select_global(weights, k), select_global_ref(weights, k))


def test_mixed_with_fp64_is_exact():
    weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0 + 1e-12, 0.0]], dtype=torch.float64)]
    for select in (select_global, select_global_ref):
        assert [mask.tolist() for mask in select(weights, 2)] == [[[False, True]], [[True, False]]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]) | st.floats(-1e3, 1e3, width=32)
    weights = []
    for _ in range(data.draw(st.integers(1, 4))):
        rows, cols = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
        flat = data.draw(st.lists(values, min_size=rows * cols, max_size=rows * cols))
        weights.append(torch.tensor(flat, dtype=torch.float32).reshape(rows, cols))
    k = data.draw(st.integers(0, sum(weight.numel() for weight in weights)))
    masks = select_global(weights, k)
    assert sum(int(mask.sum()) for mask in masks) == k  # the exact budget
    factor = 2.0 ** data.draw(st.integers(0, 20))
    assert equal(select_global([weight * factor for weight in weights], k), masks)
    if len({v for w in weights for v in w.abs().flatten().tolist()}) == sum(w.numel() for w in weights):
        assert equal(select_global([weight.flip(0) for weight in weights], k), [mask.flip(0) for mask in masks])


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 13}, r"k is 13; it must be an int in 0\.\.12"),
        ({"k": -1}, "k is -1"),
        ({"k": 1.5}, "k is 1.5"),
        ({"weights": torch.ones(2, 2)}, "weights is a Tensor"),
        ({"xs": [None]}, "xs has 1 entries"),
        ({"xs": [None, torch.ones(3)]}, r"xs\[1\] has shape \(3,\)"),
        ({"weights": [torch.ones(2, 2), torch.ones(2)]}, r"weights\[1\] has shape \(2,\)"),
        ({"weights": [torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int8)]}, r"weights\[1\] has dtype torch.int8"),
        ({"weights": [torch.ones(2, 2), torch.ones(2, 3).T]}, r"weights\[1\] has strides"),
        ({"weights": [torch.ones(2, 2), torch.ones(2, 3, device="meta")]}, r"weights\[1\] is on meta"),
        ({"weights": [torch.ones(2, 2), torch.full((2, 2), math.nan)]}, r"weights\[1\] gives NaN"),
        ({"weights": [torch.ones(2, 2), torch.full((2, 2), math.nan)], "k": 0}, r"weights\[1\] gives NaN"),
    ],
)
def test_wrong_input(select, arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"weights": [torch.ones(2, 2), torch.ones(2, 4)], "k": 3, **arguments})
