"""Every allocation meets the model's budget exactly, whatever the shapes."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from trisparse.sparsity.allocation import ERK, LAMP, OWL, Uniform, UniformPlus
from trisparse.sparsity.metric import Score
from trisparse.sparsity.pattern import NM, Unstructured, kept_of, kept_per_row
from trisparse.sparsity.selection import select
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets

ALLOCATIONS = [Uniform(), UniformPlus(), ERK(), LAMP(), OWL(M=2, lambda_=0.3), OWL(M=4, lambda_=0.01)]
SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


def measured(shapes, seed):
    """A model of linears of the given (out, in), and statistics of random inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict()
    for i, (rows, cols) in enumerate(shapes):
        model[f"part{i}"] = nn.Linear(cols, rows, bias=False)
        model[f"part{i}"].weight.data = torch.randn(rows, cols, generator=generator) ** 3
    targets = find_targets(model).found
    statistics = InputStatistics(targets)
    with statistics.observing():
        for target in targets:
            with statistics.call():
                target.module(torch.randn(4, target.cols, generator=generator) ** 3)
    return model, targets, {target.name: statistics for target in targets}


def kept_by(pattern, target):
    """Counted in a mask, not computed from the pattern."""
    return select(target, [Score(target.matrix())], pattern).kept


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    shapes=SHAPES,
    sparsity=st.floats(0.01, 0.9),
    scope=st.sampled_from(["row", "balanced", "layer"]),
    seed=st.integers(0, 99),
)
def test_unstructured_budgets_are_exact(allocation, shapes, sparsity, scope, seed):
    model, targets, inputs = measured(shapes, seed)
    total = sum(target.weight.numel() for target in targets)
    last = targets[-1].weight.numel()
    least = len(targets) - 1 + (max(1, last - int(0.8 * last)) if isinstance(allocation, UniformPlus) else 1)
    if kept_of(total, sparsity) < least:
        with pytest.raises(ValueError, match=r"some would keep none|must keep"):
            allocation.patterns(model, targets, Unstructured(sparsity, scope), inputs)
        return
    patterns = allocation.patterns(model, targets, Unstructured(sparsity, scope), inputs)
    kept = 0
    for target in targets:
        pattern = patterns[target.name]
        if pattern is None:
            kept += target.weight.numel()
            continue
        assert 0 < pattern.sparsity < 1
        mask = select(target, [Score(target.matrix())], pattern)
        assert mask.kept > 0
        kept += mask.kept
        if scope != "layer":
            per_row = mask.matrix().sum(1)
            assert per_row.max() - per_row.min() <= 1
            assert per_row.tolist() == sorted(per_row.tolist(), reverse=True)
    assert kept == kept_of(total, sparsity)


def test_layers_of_one_weight_keep_it():
    model, targets, inputs = measured([(1, 1), (1, 1), (4, 10), (4, 10)], 0)
    for allocation in ALLOCATIONS:
        patterns = allocation.patterns(model, targets, Unstructured(0.5), inputs)
        assert [patterns[target.name] for target in targets[:2]] == [None, None]
        assert sum(kept_by(patterns[target.name], target) for target in targets[2:]) == 41 - 2


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@settings(deadline=None, max_examples=40)
@given(shapes=SHAPES, m=st.sampled_from([2, 4, 8]), data=st.data(), seed=st.integers(0, 99))
def test_n_of_m_budgets_are_exact(allocation, shapes, m, data, seed):
    n = data.draw(st.integers(1, m - 1))
    model, targets, inputs = measured([(rows, cols * m) for rows, cols in shapes], seed)
    assume(not isinstance(allocation, UniformPlus) or n >= 0.2 * m)  # else the last linear may take too much
    patterns = allocation.patterns(model, targets, NM(n, m), inputs)
    kept = 0
    for target in targets:
        pattern = patterns[target.name]
        assert pattern is None or pattern.m == m
        kept += target.weight.numel() if pattern is None else kept_by(pattern, target)
    assert kept * m == n * sum(target.weight.numel() for target in targets)


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.floats(0, 0.999))
def test_a_count_of_a_layer_survives_its_sparsity(rows, cols, share):
    size = rows * cols
    kept = max(1, math.floor(size * (1 - share)))
    if kept == size:
        return
    assert kept_of(size, Unstructured(1 - kept / size, "layer").sparsity) == kept
    k, more = kept_per_row(Unstructured(1 - kept / size, "balanced"), rows, cols)
    assert (k * rows + more, more < rows) == (kept, True)
