"""Each formula by hand, on layers of a few weights."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.allocation import ERK, LAMP, Global, Uniform, UniformPlus
from trisparse.sparsity.allocation.formulas import _counts_of_the_greatest, lamp_scores
from trisparse.sparsity.pattern import NM, Rows, Unstructured
from trisparse.sparsity.targets import find_targets


class ConvNet(nn.Module):
    """Two convolutions of 18 and 36 weights and a linear of 16."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, bias=False)
        self.second = nn.Conv2d(2, 2, 3, bias=False)
        self.classifier = nn.Linear(4, 4, bias=False)


def test_uniform_by_hand(kept, linears):
    # 21 weights at 50%: 11 stay (half of 21, rounded down, is pruned). 6 · 11/21 = 3.14 and 15 · 11/21 = 7.86.
    assert kept(Uniform(), linears((2, 3), (3, 5)), 0.5) == [3, 8]


def test_uniform_keeps_exactly_what_rounding_each_row_would_miss(linears):
    model = linears((4, 5), (2, 5))
    # Half of 5 is 2.5: each row alone would keep 3 of 5, 18 of 30 in all. 15 are to stay: 10 and 5.
    patterns = Uniform().patterns(model, find_targets(model).found, Unstructured(0.5))
    assert patterns == {
        "part0.weight": Unstructured(0.5, "balanced"),  # 10 in 4 rows: 3, 3, 2, 2
        "part1.weight": Unstructured(0.5, "balanced"),  # 5 in 2 rows: 3, 2
    }


def test_rows_that_share_evenly_stay_with_scope_row(linears):
    model = linears((4, 5))
    assert Uniform().patterns(model, find_targets(model).found, Unstructured(0.4)) == {
        "part0.weight": Unstructured(1 - 3 / 5, "row")
    }


def test_uniform_plus_by_hand(kept):
    # 70 weights at 50%: 35 stay, 18 of them in the first convolution. 17 for 36 + 16: 11.77 and 5.23.
    assert kept(UniformPlus(), ConvNet(), 0.5) == [18, 12, 5]
    # 65%: 70 - 46 = 24 stay. 6 for 36 + 16 would be 4.15 and 1.85, but the linear keeps 16 - 12 = 4 (80% is 12.8).
    assert kept(UniformPlus(), ConvNet(), 0.65) == [18, 2, 4]
    # with a last linear that may lose 95%: 16 - 15 = 1
    assert kept(UniformPlus(last=0.95), ConvNet(), 0.65) == [18, 4, 2]


def test_uniform_plus_says_what_must_stay(kept):
    with pytest.raises(ValueError, match="must keep 23 weights, and the sparsity leaves 21"):
        kept(UniformPlus(), ConvNet(), 0.7)


def test_uniform_plus_refuses_a_model_where_it_changes_nothing():
    model = ConvNet()
    only = [target for target in find_targets(model).found if "second" in target.name]
    with pytest.raises(ValueError, match="first convolution and its last linear, and neither is pruned"):
        UniformPlus().patterns(model, only, Unstructured(0.5))


def test_the_first_convolution_needs_no_groups_where_it_stays_dense():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Linear(8, 9)})
    # 108 weights in rows of 27, then 144 and 72: 162 of 324 stay, and 54 are left for 36 + 18 groups of 4.
    found = UniformPlus().patterns(model, find_targets(model).found, NM(2, 4))
    assert list(found.values()) == [None, NM(1, 4), NM(1, 4)]
    with pytest.raises(ValueError, match=r"divisible by 4, but not so: a.weight \(27\)"):
        ERK().patterns(model, find_targets(model).found, NM(2, 4))


def test_erk_by_hand(kept, linears):
    # 4, 16 and 32 weights, 26 to stay; size · (out + in) / (out · in) = out + in = 4, 8, 12.
    # c = 26/24 gives the first 4.33 of 4: it stays dense. 22 for 8c + 12c: 8.8 and 13.2.
    assert kept(ERK(), linears((2, 2), (4, 4), (4, 8)), 0.5) == [4, 9, 13]


def test_erk_counts_the_kernel(kept):
    # 18, 36 and 16 weights, 35 to stay; sums of the dims 2+1+3+3 = 9, 2+2+3+3 = 10, 4+4 = 8, together 27.
    # c = 35/27: 11.67, 12.96, 10.37.
    assert kept(ERK(), ConvNet(), 0.5) == [12, 13, 10]


def test_erk_takes_each_expert_as_a_layer(kept, model_named):
    model = model_named("mixtral")
    allocated = ERK().patterns(model, find_targets(model).found, Unstructured(0.7, "layer"))
    density = {name: 1 - (one.sparsity if one else 0) for name, one in allocated.items()}
    gate, down = (density[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    # per expert [2 · 48, 32] and [32, 48]: (96 + 32) / (96 · 32) and (48 + 32) / (48 · 32)
    assert gate / down == pytest.approx((128 / (96 * 32)) / (80 / (48 * 32)), rel=1e-3)


def test_lamp_by_hand(kept, linears):
    # W² of the first: 9, 4, 1, 1/4 over the sums 9, 13, 14, 14.25: 1, 0.308, 0.071, 0.018.
    # Of the second: 100 each over 100, 200, 300, 400: 1, 0.5, 0.333, 0.25.
    # The four greatest are 1, 1, 0.5 and 0.333; by magnitude alone the first layer would be gone.
    model = linears(torch.tensor([[3.0, -2], [0.5, 1]]), torch.tensor([[10.0, -10], [10, 10]]))
    scores = lamp_scores(model["part0"].weight)
    assert scores.tolist() == pytest.approx([0.25 / 14.25, 1 / 14, 4 / 13, 1])
    assert kept(LAMP(), model, 0.5) == [1, 3]
    assert kept(LAMP(), model, 0.25) == [2, 4]  # then 0.308 and 0.25


def test_lamp_ties_go_to_the_earlier_layer(kept, linears):
    model = linears(torch.ones(1, 4), torch.ones(1, 4))  # 1, 1/2, 1/3, 1/4 in both
    assert kept(LAMP(), model, 1 - 3 / 8) == [2, 1]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 1))
def test_counts_of_the_greatest_are_those_of_a_stable_sort(layers, share):
    arrays = [np.sort(np.array(layer, dtype=np.float32)) for layer in layers]
    kept = round(share * sum(map(len, layers)))
    ranked = sorted(((-score, i) for i, layer in enumerate(layers) for score in layer))[:kept]
    assert _counts_of_the_greatest(arrays, kept) == [sum(i == j for _, j in ranked) for i in range(len(layers))]


def test_a_layer_of_zeros_is_not_pruned_wholly(kept, linears):
    model = linears(torch.ones(1, 4), torch.zeros(1, 4))
    assert lamp_scores(model["part1"].weight).tolist() == [0, 0, 0, 0]
    assert kept(LAMP(), model, 0.5) == [3, 1]  # not 4 and 0


def test_transposed_weights_are_layers_like_any_other(kept):
    model = nn.ModuleDict({"a": Conv1D(2, 2), "b": Conv1D(4, 4), "c": Conv1D(8, 4)})
    assert kept(ERK(), model, 0.5) == [4, 9, 13]


def test_n_of_m_by_hand(linears):
    # out + in = 16, 16, 16 and 32 with 16, 16, 16 and 64 groups of 4, 224 to stay; c = 224/80 = 2.8.
    # 44.8 of 64 and 89.6 of 256: n = 2.8, 2.8, 2.8 and 1.4, where a + b + c + 4d = 14. d = 1 leaves 10: 4, 3, 3 costs
    # 16 · (1.44 + 0.04 + 0.04) + 64 · 0.16 = 34.6; d = 2 leaves 6: 2, 2, 2 costs 48 · 0.64 + 64 · 0.36 = 53.8.
    model = linears((8, 8), (8, 8), (8, 8), (16, 16))
    found = ERK().patterns(model, find_targets(model).found, NM(2, 4))
    assert list(found.values()) == [None, NM(3, 4), NM(3, 4), NM(1, 4)]


def test_global_is_the_scope():
    assert Global().check(Unstructured(0.5)) == Unstructured(0.5, "global")
    for pattern in (NM(2, 4), Rows(0.5), Unstructured(0.5, "layer")):
        with pytest.raises(ValueError, match="allocation global ranks single weights"):
            Global().check(pattern)


@pytest.mark.parametrize("allocation", [Uniform(), UniformPlus(), ERK(), LAMP()])
def test_what_has_no_budget_of_weights_is_refused(allocation):
    with pytest.raises(ValueError, match="prunes whole rows"):
        allocation.check(Rows(0.5))
    with pytest.raises(ValueError, match="is itself an allocation"):
        allocation.check(Unstructured(0.5, "global"))


def test_fewer_weights_than_layers_are_refused(linears):
    model = linears((2, 2), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="keeps 1 weights of 3 layers"):
        Uniform().patterns(model, find_targets(model).found, Unstructured(0.9))


def test_inputs_that_m_does_not_divide_are_named(linears):
    model = linears((2, 6))
    with pytest.raises(ValueError, match=r"divisible by 4.*part0"):
        ERK().patterns(model, find_targets(model).found, NM(2, 4))


@pytest.mark.parametrize("wrong", [1, -0.1, "0.8", True, float("nan")])
def test_uniform_plus_checks_its_parameter(wrong):
    with pytest.raises(ValueError, match="last must be a sparsity"):
        UniformPlus(last=wrong)
