import pytest
import torch
from torch import nn

from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets


@pytest.fixture
def kept():
    """Function: kept weights of each target, as its pattern by an allocation says; all of them where it is dense."""

    def of(allocation, model, sparsity, inputs=None):
        pattern = allocation.check(parse_pattern(sparsity))
        targets = find_targets(model).found
        patterns = allocation.patterns(model, targets, pattern, inputs)
        counts = []
        for target in targets:
            size, one = target.weight.numel(), patterns[target.name]
            counts.append(size if one is None else size - round(size * one.sparsity))
        return counts

    return of


@pytest.fixture
def linears():
    """Function: a Sequential of Linear layers of the given (out, in), or with the given weights."""

    def of(*shapes):
        layers = []
        for shape in shapes:
            weight = shape if isinstance(shape, torch.Tensor) else torch.randn(shape)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.float()
            layers.append(layer)
        return nn.ModuleDict({f"part{i}": layer for i, layer in enumerate(layers)})

    return of


@pytest.fixture
def ones_as_input():
    """Function: statistics of a model whose layers all saw ones, by name of the target."""

    def of(model):
        targets = find_targets(model).found
        statistics = InputStatistics(targets)
        with statistics.observing():
            for target in targets:
                with statistics.call():
                    target.module(torch.ones(1, target.cols))
        return {target.name: statistics for target in targets}

    return of
