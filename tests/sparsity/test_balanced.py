"""Scope "balanced": the layer's number, spread over its rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trisparse.sparsity.mask import mask_of
from trisparse.sparsity.metric import Metric, Score
from trisparse.sparsity.pattern import Unstructured, kept_per_row, parse_pattern
from trisparse.sparsity.selection import select
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.targets import find_targets


def test_by_hand():
    model = nn.Linear(5, 3, bias=False)
    model.weight.data = torch.tensor([[5.0, 4, 3, 2, 1], [1.0, 2, 3, 4, 5], [1.0, 1, 1, 1, 1]])
    report = sparsify(model, "53.333% balanced", "magnitude", progress=False)
    # 8 of 15 are pruned, 7 stay: 3 in the first row, 2 in the others; ties go to the lower index
    assert mask_of(model).matrix().int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]]
    assert (report.kept, report.pattern) == (7, "53.333% balanced")


def test_text_reads_back():
    assert parse_pattern("61.5% balanced") == Unstructured(0.615, "balanced")
    assert str(Unstructured(0.615, "balanced")) == "61.5% balanced"


def test_text_of_a_sparsity_near_one_reads_back():
    pattern = Unstructured(1 - 1e-8, "layer")
    assert parse_pattern(str(pattern)).sparsity == pytest.approx(pattern.sparsity, abs=1e-12)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(0.5, "row"), (3, 0)),  # half of 5 is rounded to prune 2
        (Unstructured(0.5, "balanced"), (2, 2)),  # 10 of 20 stay: 3, 3, 2, 2
        (Unstructured(0.95, "balanced"), (0, 1)),
        (Unstructured(0.0, "balanced"), (5, 0)),
    ],
)
def test_kept_per_row(pattern, expected):
    assert kept_per_row(pattern, 4, 5) == expected


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 99))
def test_is_the_greatest_of_each_row(rows, cols, sparsity, seed):
    model = nn.Linear(cols, rows, bias=False)
    model.weight.data = torch.randint(-3, 4, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    target = find_targets(model).found[0]
    pattern = Unstructured(sparsity, "balanced")
    keep = select(target, [Score(model.weight.detach())], pattern).matrix()
    k, more = kept_per_row(pattern, rows, cols)
    order = model.weight.detach().abs().sort(dim=1, descending=True, stable=True).indices
    expected = torch.zeros(rows, cols, dtype=torch.bool)
    for row in range(rows):
        expected[row, order[row, : k + (row < more)]] = True
    assert torch.equal(keep, expected)


def test_rows_of_experts_count_as_one_layer(model_named):
    model = model_named("mixtral")
    target = next(t for t in find_targets(model).found if t.parts == 4)
    rows = target.weight.numel() // target.cols
    kept = rows * 5 + rows // 2 + 3  # the first half of the rows and 3 of the third expert keep 6
    scores = [Score(part) for part in target.matrix().chunk(4)]
    pattern = Unstructured(1 - kept / target.weight.numel(), "balanced")
    per_row = select(target, scores, pattern).matrix().sum(1)
    assert per_row.tolist() == [6] * (rows // 2 + 3) + [5] * (rows - rows // 2 - 3)


def test_a_metric_that_reads_the_whole_matrix_is_not_cut():
    # a column's sum over the first two rows alone would rank the weights of a row otherwise
    torch.manual_seed(0)
    metric = Metric.parse("abs(W) / colsum(abs(W))")
    layer = nn.Linear(6, 4, bias=False)
    whole = metric.score(layer.weight.detach(), None, None, torch.Generator(), fused=True)
    target = find_targets(layer).found[0]
    pattern = Unstructured(1 - 14 / 24, "balanced")
    fused = select(target, [whole], pattern)
    plain = select(target, [Score(whole.materialise(), absolute=False)], pattern)
    assert whole.metric is not None
    assert torch.equal(fused.bits, plain.bits)
    assert fused.matrix().sum(1).tolist() == [4, 4, 3, 3]
