"""Each schedule's values against ones computed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from trisparse.retrain.schedule import (
    ALLR,
    CLR,
    FT,
    LLR,
    LRW,
    SLR,
    Linear,
    Original,
    Schedule,
    lr_lambda,
    pruning_change,
)
from trisparse.sparsity.sparsify import sparsify

# Le & Hua's figure 1 has this shape: a tenth at one half and at three quarters of the training.
STEPPED = Original.stepped(1.0, 8, milestones=(4, 6))
LINEAR = Original.linear(0.8, 4)
EVERY = [
    FT(STEPPED), LRW(STEPPED, 4), SLR(STEPPED), CLR(STEPPED), LLR(LINEAR), ALLR(LINEAR, 0.5, 1), Linear(0.1),
]  # fmt: skip


def values(schedule, steps):
    return [schedule.at(step, steps) for step in range(steps + 1)]


def test_originals():
    assert STEPPED.rates == pytest.approx((1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01))
    assert LINEAR.rates == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert Original.linear(0.1, 2, steps_per_epoch=2).rates == pytest.approx((0.1, 0.075, 0.05, 0.025))
    warmed_up = Original([0.1, 0.5, 0.3, 0.2, 0.2], epochs=5)
    assert (warmed_up.highest, warmed_up.lowest, warmed_up.last) == (0.5, 0.2, 0.2)


def test_ft_stays_at_the_last_rate():
    assert values(FT(STEPPED), 3) == pytest.approx([0.01] * 4)


def test_lrw_repeats_the_end_of_the_original():
    # the last 4 of 8 epochs in 8 steps: 2 steps an epoch
    assert values(LRW(STEPPED, 4), 8) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01])
    # the whole of it, as many steps as epochs
    assert values(LRW(LINEAR, 4), 4) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


def test_slr_compresses_the_original_after_a_warm_up():
    # 2 of 10 steps from 0.01 to 1, then 8 rates in 8 steps
    assert values(SLR(STEPPED, 0.2), 10) == pytest.approx(
        [0.01, 0.505, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
    )  # fmt: skip
    # 8 rates in 4 steps
    assert values(SLR(STEPPED, 0), 4) == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_slr_does_not_warm_up_twice():
    original = Original([0.1, 0.5, 1.0, 0.4], epochs=4)
    assert values(SLR(original, 0), 4) == pytest.approx([1.0, 1.0, 1.0, 0.4, 0.4])


def test_clr_is_one_cosine_after_a_warm_up():
    # cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4), cos(pi) between 1 and 0.01
    half, span = (1 + 0.01) / 2, (1 - 0.01) / 2
    expected = [0.01, 0.505, 1, half + span * math.sqrt(0.5), half, half - span * math.sqrt(0.5), 0.01]
    assert values(CLR(STEPPED, 0.4), 6) == pytest.approx(expected)


def test_llr_falls_to_zero():
    assert values(LLR(LINEAR), 4) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert values(LLR(LINEAR, warmup_ratio=0.5), 4) == pytest.approx([0, 0.4, 0.8, 0.4, 0])


def test_allr_takes_the_greater_of_change_and_budget():
    by_change = ALLR(LINEAR, change=0.5, epochs=1)  # d_1 = 0.5, d_2 = 1/4
    assert values(by_change, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    by_budget = ALLR(LINEAR, change=0.5, epochs=3)  # d_2 = 3/4
    assert values(by_budget, 2) == pytest.approx([0.6, 0.3, 0])
    assert ALLR(LINEAR, change=0.5, epochs=9).discount == 1


def test_linear_is_that_of_transformers():
    for ratio in (0, 0.1, 0.25):
        for steps in (1, 7, 10, 70):
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
            reference = get_linear_schedule_with_warmup(optimizer, math.floor(steps * ratio), steps)
            for step in range(steps):
                assert Linear(0.5, ratio).at(step, steps) == pytest.approx(reference.get_last_lr()[0])
                optimizer.step()
                reference.step()


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
def test_they_drive_lambda_lr(schedule):
    assert isinstance(schedule, Schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lr_lambda(schedule, 5))
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.at(step, 5))
        optimizer.step()
        scheduler.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.at(5, 5))


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("step", "steps"), [(-1, 5), (6, 5), (0, 0), (1.0, 5), (True, 5)])
def test_a_step_outside_is_refused(schedule, step, steps):
    with pytest.raises(ValueError, match=r"steps? must be an integer"):
        schedule.at(step, steps)


def two_layers(first, second):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data = torch.tensor([first])
    model[1].weight.data = torch.tensor([[second[0]], [second[1]]])
    return model


def test_pruning_change_by_hand():
    model = two_layers([1.0, -3.0], [2.0, 4.0])
    dense = copy.deepcopy(model)
    sparsify(model, "50% global", "magnitude", include="*", progress=False)  # 1 and 2 go, 3 and 4 stay
    expected = math.sqrt(5 / 30) / math.sqrt(0.5)
    assert pruning_change(dense, model) == pytest.approx(expected)
    assert pruning_change(dense.state_dict(), model) == pytest.approx(expected)

    once = copy.deepcopy(model)
    sparsify(model, "75% global", "magnitude", include="*", progress=False)  # of 3 and 4, the 3 goes: s = 1/2
    assert pruning_change(once, model) == pytest.approx(math.sqrt(9 / 25) / math.sqrt(0.5))


def test_pruning_change_is_at_most_one():
    model = two_layers([1.0, -1.0], [1.0, 1.0])
    dense = copy.deepcopy(model)
    sparsify(model, "50% global", "magnitude", include="*", progress=False)
    assert pruning_change(dense, model) == 1  # all equal: the greatest change that magnitude pruning can make


def test_pruning_change_refuses_models_that_do_not_fit():
    model = two_layers([1.0, -3.0], [2.0, 4.0])
    with pytest.raises(ValueError, match="pruned has no masks"):
        pruning_change(model, model)
    dense = copy.deepcopy(model)
    sparsify(model, "50% global", "magnitude", include="*", progress=False)
    with pytest.raises(ValueError, match=r"dense must have 0.weight of shape \(1, 2\), got nothing"):
        pruning_change({}, model)
    with pytest.raises(ValueError, match=r"got \(2, 2\)"):
        pruning_change({"0.weight": torch.ones(2, 2)}, model)
    with pytest.raises(ValueError, match="nothing was pruned"):
        pruning_change(copy.deepcopy(model), model)
    with pytest.raises(ValueError, match="nothing was pruned"):
        pruning_change({name: torch.zeros_like(p) for name, p in dense.named_parameters()}, model)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Original([], 1), r"rates must be numbers of at least 0, one of them above 0, got \[\]"),
        (lambda: Original([0.1, -0.1], 1), "rates"),
        (lambda: Original([0.0], 1), "rates"),
        (lambda: Original([math.nan], 1), "rates"),
        (lambda: Original([0.1], 0), "epochs must be an integer of at least 1, got 0"),
        (lambda: Original.linear(0, 1), "peak must be a number above 0, got 0"),
        (lambda: Original.linear(1, 1, 0), "steps_per_epoch"),
        (lambda: Original.stepped(1, 1, (), gamma=-1), "gamma"),
        (lambda: FT(Original([0.1, 0.0], 2)), "last rate of 0"),
        (lambda: FT(0.1), r"original must be an Original.*got 0.1"),
        (lambda: LRW(STEPPED, 9), "epochs must be at most the original's 8 for LRW, got 9"),
        (lambda: LRW(STEPPED, 0), "epochs"),
        (lambda: SLR(STEPPED, 1), r"warmup_ratio must be a number in \[0, 1\), got 1"),
        (lambda: CLR(STEPPED, -0.1), "warmup_ratio"),
        (lambda: LLR(STEPPED, "x"), "warmup_ratio"),
        (lambda: ALLR(STEPPED, 1.1, 1), r"change must be a number in \[0, 1\], got 1.1"),
        (lambda: ALLR(STEPPED, 0.5, True), "epochs"),
        (lambda: Linear(0.0), "peak must be a number above 0, got 0.0"),
        (lambda: Linear(math.inf), "peak"),
        (lambda: lr_lambda(Linear(0.1), 0), "steps must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_values_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
