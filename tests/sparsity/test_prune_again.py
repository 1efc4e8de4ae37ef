"""Pruning a model that is pruned already: what was pruned goes first, whatever else is zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trisparse.kernels.metric import compile_metric
from trisparse.sparsity import obs
from trisparse.sparsity.mask import Mask, attach, mask_of
from trisparse.sparsity.metric import Metric, Score
from trisparse.sparsity.pattern import Unstructured
from trisparse.sparsity.sparsify import sparsify


def linear(weight, keep=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    if keep is not None:
        attach(layer, "weight", Mask.from_matrix(torch.tensor(keep, dtype=torch.bool), layer.weight.shape, None))
    return layer


def kept(module):
    return mask_of(module).matrix().int().tolist()


def test_pruned_weights_go_before_kept_zeros_of_a_higher_index():
    model = linear([[5, 0, 0, 3]], keep=[[0, 1, 1, 1]])
    sparsify(model, "50%", "magnitude", progress=False)
    assert kept(model) == [[0, 1, 0, 1]]


def test_pruned_rows_go_again_with_a_metric_of_inputs():
    model = linear([[4, 4], [1, 1], [3, 3], [2, 2]])
    data = [torch.ones(1, 2)]
    sparsify(model, "25% rows", "wanda", data, progress=False)
    assert kept(model) == [[1, 1], [0, 0], [1, 1], [1, 1]]
    sparsify(model, "50% rows", "wanda", data, progress=False)
    assert kept(model) == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_one_budget_over_layers_of_which_one_was_pruned_before():
    # |W| · 1: the second layer's large weights are negative, and only the first layer has a mask
    model = nn.Sequential(linear([[9, 1], [8, 2]], keep=[[1, 0], [1, 1]]), linear([[-7, 0.5], [-6, 0.25]]))
    sparsify(model, Unstructured(0.5, "global"), "wanda", [torch.eye(2)], propagate="dense", progress=False)
    assert kept(model[0]) == [[1, 0], [1, 0]]
    assert kept(model[1]) == [[1, 0], [1, 0]]


def test_a_weight_pruned_before_is_not_kept_for_its_update(monkeypatch):
    monkeypatch.setattr(obs, "MAX_BLOCK", 2)
    layer = linear([[4.0, 4.5, 1.0, 5.0]])
    sparsify(layer, "25%", "magnitude", progress=False)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 0] / 2 + 0.01 * x[:, 2]  # pruning the first weight, 4, makes the third one 8
    sparsify(layer, "50%", "magnitude", [x], update="iterative", progress=False)
    assert kept(layer) == [[0, 1, 0, 1]]


def test_groups_are_scored_once_each(monkeypatch):
    layer = linear(torch.randn(6, 48, generator=torch.Generator().manual_seed(0)).tolist())
    sparsify(layer, "2:4", "magnitude", progress=False)
    scored, unpacked = [], []
    materialise, matrix = Score.materialise, Mask.matrix
    monkeypatch.setattr(Score, "materialise", lambda self: scored.append(self.weight.shape) or materialise(self))
    monkeypatch.setattr(Mask, "matrix", lambda self, *device: unpacked.append(self.shape) or matrix(self, *device))
    x = torch.randn(99, 48, generator=torch.Generator().manual_seed(1))
    sparsify(layer, "1:4", "sparsegpt", [x], progress=False)
    assert scored == [(6, 4)] * 12
    assert len(unpacked) == 1


def test_a_metric_inside_kernels_has_no_columns():
    score = Score(torch.ones(2, 4), metric=compile_metric(Metric.parse("zsn(W)").root))
    with pytest.raises(ValueError, match="a metric reads whole matrices"):
        score.columns(0, 2)
