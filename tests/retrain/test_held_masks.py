"""Masks held while the weights under them train: no pruned gradient, in no optimizer and in no layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.held_masks import held_masks
from trisparse.sparsity.mask import Mask, attach, check_masks, masks
from trisparse.sparsity.pattern import Unstructured


class Experts(nn.Module):
    """Fused experts [experts, in, out], as transformers has them; the mask is of the transposed matrices."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weight)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12), False),
    "conv1d": (lambda: Conv1D(5, 12), (3, 12), True),
    "conv2d": (lambda: nn.Conv2d(3, 5, 2), (3, 3, 4, 4), False),
    "channels last": (lambda: nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last), (3, 3, 4, 4), False),
    "experts": (Experts, (3, 12), True),
}


def pruned_layer(kind):
    build, shape, transposed = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    cols = 12
    keep = torch.rand(layer.weight.numel() // cols, cols) > 0.5
    mask = Mask.from_matrix(keep, layer.weight.shape, Unstructured(0.5), transposed=transposed)
    attach(layer, "weight", mask)
    return layer, torch.randn(shape), mask.dense()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_pruned_stays_zero_and_the_rest_trains_as_without(kind, optimizer):
    layer, x, keep = pruned_layer(kind)
    usual, _, _ = pruned_layer(kind)

    def made(model):
        if optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    first, second = made(layer), made(usual)
    with held_masks(layer, layer.parameters()):
        for _ in range(4):
            layer(x).square().sum().backward()
            assert not layer.weight.grad[~keep].any()
            assert layer.weight.grad[keep].all()
            first.step()
            first.zero_grad()
            usual(x).square().sum().backward()
            second.step()
            second.zero_grad()
            with torch.no_grad():
                usual.weight.masked_fill_(~keep, 0)
            check_masks(layer)
    torch.testing.assert_close(layer.weight, usual.weight)
    moments = ["momentum_buffer"] if optimizer == "sgd" else ["exp_avg", "exp_avg_sq"]
    assert not any(first.state[layer.weight][moment][~keep].any() for moment in moments)
    layer(x).square().sum().backward()
    assert layer.weight.grad[~keep].all()  # not held any more


def test_the_norm_of_the_gradient_is_that_of_what_is_kept():
    layer, x, keep = pruned_layer("linear")
    with held_masks(layer, [layer.weight]):
        layer(x).square().sum().backward()
    held = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert torch.equal(held, layer.weight.grad * keep)
    assert held.norm() < 0.9 * layer.weight.grad.norm()


def test_only_what_trains_is_held():
    model = nn.Sequential(pruned_layer("linear")[0], nn.Linear(5, 5))
    model[0].weight.requires_grad_(False)
    with held_masks(model, model.parameters()):
        assert not model[0].weight._post_accumulate_grad_hooks
    model[0].weight.requires_grad_(True)
    with held_masks(model, [model[1].weight]):
        assert not model[0].weight._post_accumulate_grad_hooks
    with held_masks(model, model.parameters()):
        assert len(model[0].weight._post_accumulate_grad_hooks) == 1
    assert not model[0].weight._post_accumulate_grad_hooks
    assert list(masks(model)) == ["0.weight"]
