import math

import pytest
import torch
from torch import nn

from trisparse.sparsity.allocation import OWL
from trisparse.sparsity.allocation.owl import outlier_ratio
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.pattern import NM, Unstructured
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets

OUTLIER = torch.tensor([[1.0, -2], [3, 10]])  # mean 4: one of four exceeds 2 times that
FLAT = torch.ones(2, 2)


def test_outlier_ratio_by_hand(linears, ones_as_input):
    model = linears(OUTLIER, FLAT)
    targets, inputs = find_targets(model).found, ones_as_input(model)
    assert outlier_ratio(targets[:1], inputs, 2) == 1 / 4
    assert outlier_ratio(targets[:1], inputs, 2.5) == 0  # 10 does not exceed 2.5 · 4
    # one block of both: mean (16 + 4) / 8 = 2.5, and 10 alone exceeds 3 times that
    assert outlier_ratio(targets, inputs, 3) == 1 / 8


def test_outlier_ratio_scores_by_the_inputs(linears):
    model = linears(FLAT)
    target = find_targets(model).found[0]
    statistics = InputStatistics([target])
    with statistics.observing(), statistics.call():
        target.module(torch.tensor([[1.0, 5.0], [1.0, 5.0]]))
    # |W| · X = 1, 5, 1, 5 with mean 3
    assert outlier_ratio([target], {target.name: statistics}, 1.5) == 1 / 2


def test_two_layers_by_hand(kept, linears, ones_as_input):
    # D = 1/4 and 0: S = 0.5 - 0.25 and 0.5 + 0.25, so 3 and 1 of 4 stay.
    model = linears(OUTLIER, FLAT)
    assert kept(OWL(M=2, lambda_=0.25), model, 0.5, ones_as_input(model)) == [3, 1]


def test_the_bounds_hold_where_the_mean_must_be_shifted(kept, linears, ones_as_input):
    # D = 1/4, 0, 0: S = 0.25, 0.75, 0.75 has the mean 0.583. Shifted by -0.083 the first would leave [0.25, 0.75]:
    # it stays at 0.25, and the others get (1.5 - 0.25) / 2 = 0.625: 3, 1.5 and 1.5 of 4 stay.
    model = linears(OUTLIER, FLAT, FLAT)
    assert kept(OWL(M=2, lambda_=0.25), model, 0.5, ones_as_input(model)) == [3, 2, 1]


def test_the_upper_bound_of_the_sparsity_holds_too(kept, linears, ones_as_input):
    # D = 1/4, 1/4, 0: S = 0.25, 0.25, 0.75 has the mean 0.417. Shifted by 0.083 the last would leave [0.25, 0.75]:
    # it stays at 0.75, and the others get (1.5 - 0.75) / 2 = 0.375: 2.5, 2.5 and 1 of 4 stay.
    model = linears(OUTLIER, OUTLIER, FLAT)
    assert kept(OWL(M=2, lambda_=0.25), model, 0.5, ones_as_input(model)) == [3, 2, 1]


def test_layers_without_any_difference_are_uniform(kept, linears, ones_as_input):
    model = linears(FLAT, FLAT)
    assert kept(OWL(), model, 0.5, ones_as_input(model)) == [2, 2]


def test_n_of_m_by_hand(linears, ones_as_input):
    # D = 1/16 (the 100 among 16 weights) and 0: S = 0.25 and 0.75, that is 3:4 and 1:4.
    first = torch.ones(4, 4)
    first[2, 1] = 100
    model = linears(first, torch.ones(4, 4))
    found = OWL(lambda_=0.25).patterns(model, find_targets(model).found, NM(2, 4), ones_as_input(model))
    assert list(found.values()) == [NM(3, 4), NM(1, 4)]


def test_a_block_shares_one_sparsity(model_named, tokens):
    model = model_named("llama")
    targets = find_targets(model)
    with torch.no_grad():  # the middle block gets the outliers
        model.model.layers[1].mlp.up_proj.weight[::7, ::5] *= 50
    inputs = {}
    for group, statistics in walk(model, targets, [{"input_ids": tokens, "use_cache": False}], propagate="dense"):
        inputs |= {target.name: statistics for target in group}
    found = OWL(M=30, lambda_=0.2).patterns(model, targets.found, Unstructured(0.6, "layer"), inputs)
    by_block = [{one.sparsity for name, one in found.items() if f"layers.{i}." in name} for i in range(3)]
    for sparsities in by_block:
        assert max(sparsities) - min(sparsities) < 0.005  # rounding to whole weights, 512 of them in the least layer
    # D = d, 0, 0 as in the case by hand: 0.6 - 0.2, and what is left for the others
    assert [min(sparsities) for sparsities in by_block] == pytest.approx([0.7, 0.4, 0.7], abs=0.005)


def test_experts_that_no_token_reached_do_not_count(model_named, tokens):
    model = model_named("mixtral")
    target = next(t for t in find_targets(model).found if t.name.endswith("experts.down_proj"))
    statistics = InputStatistics([target])
    statistics._add(target, torch.ones(2, target.cols), 1)  # one expert alone
    assert statistics.reached(target).tolist() == [False, True, False, False]
    expected = target.matrix().chunk(4)[1].abs()
    ratio = (expected > 2 * expected.mean()).float().mean()
    with torch.no_grad():
        target.weight[0] *= 1000  # would be all the outliers
    assert outlier_ratio([target], {target.name: statistics}, 2) == pytest.approx(float(ratio))


def test_layers_that_no_input_reached_are_named(linears):
    model = linears(FLAT, FLAT)
    targets = find_targets(model).found
    inputs = dict.fromkeys([target.name for target in targets], InputStatistics(targets))
    with pytest.raises(ValueError, match=r"no calibration input reached part0\.weight, part1\.weight: exclude"):
        OWL().patterns(model, targets, Unstructured(0.5), inputs)


@pytest.mark.parametrize("wrong", [0, -1, "5", math.nan, math.inf, True])
def test_m_is_checked(wrong):
    with pytest.raises(ValueError, match="M must be a number"):
        OWL(M=wrong)


@pytest.mark.parametrize("wrong", [0, 1, -0.1, "x", math.nan])
def test_lambda_is_checked(wrong):
    with pytest.raises(ValueError, match="lambda_ must be a number in"):
        OWL(lambda_=wrong)


def test_is_a_module_of_several_layers_a_block(ones_as_input):
    blocks = nn.ModuleList(
        nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}) for _ in range(2)
    )
    model = nn.ModuleDict({"blocks": blocks})
    for block, weight in zip(blocks, (OUTLIER, FLAT), strict=True):
        block["a"].weight.data, block["b"].weight.data = weight.clone(), FLAT.clone()
    # the first block: mean (16 + 4) / 8 = 2.5, one of 8 exceeds 7.5; S = 0.25 and 0.75 in each layer of a block
    found = OWL(M=3, lambda_=0.25).patterns(model, find_targets(model).found, Unstructured(0.5), ones_as_input(model))
    assert [one.sparsity for one in found.values()] == [0.25, 0.25, 0.75, 0.75]
