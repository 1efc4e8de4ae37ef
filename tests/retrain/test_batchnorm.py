"""Recalibration of batch norms against statistics computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trisparse.retrain.batchnorm import batch_norms, recalibrate


def network():
    return nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Dropout(0.5), nn.BatchNorm2d(1))


def test_statistics_by_hand():
    model = network().eval()
    model[0].weight.data.fill_(2.0)
    model[3].train()
    model[1].momentum = 0.3
    batches = [torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([2.0, 5.0]).view(2, 1, 1, 1)]
    model[1].running_mean.fill_(7)
    assert recalibrate(model, batches) == 2
    # doubled: means 1 and 7, variances (n - 1) 2 and 18
    assert model[1].running_mean.item() == pytest.approx(4)
    assert model[1].running_var.item() == pytest.approx(10)
    # behind it: normalised batches of mean 0 and variance (n - 1) 2, and no dropout
    assert model[3].running_mean.item() == pytest.approx(0, abs=1e-6)
    assert model[3].running_var.item() == pytest.approx(2, rel=1e-4)
    assert [module.training for module in model] == [False, False, False, True]
    assert model[1].momentum == 0.3
    assert model[1].num_batches_tracked == 2
    assert all(param.grad is None for param in model.parameters())


def test_a_failure_puts_the_statistics_back():
    model = network()
    model[1].running_mean.fill_(7)

    def failing():
        yield torch.ones(2, 1, 1, 1)
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        recalibrate(model, failing())
    assert model[1].running_mean.item() == 7
    assert model[1].num_batches_tracked == 0
    assert model[1].momentum == 0.1
    assert model[1].training
    with pytest.raises(ValueError, match="data is empty"):
        recalibrate(model, [])
    assert model[1].running_mean.item() == 7


def test_models_without_statistics():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    assert batch_norms(model) == {}
    with pytest.raises(ValueError, match="no batch norm"):
        recalibrate(model, [torch.ones(2, 1, 1, 1)])
