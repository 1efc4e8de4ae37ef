"""Cross-entropy by chunks of tokens against torch's in fp64, and what its backward does to the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from trisparse.kernels import cross_entropy as module
from trisparse.kernels.cross_entropy import cross_entropy_sum, cross_entropy_sum_ref


def gradient(function, logits, targets, factor):
    """The loss, and the gradient of the logits that come out of an operation of the model's own."""
    leaf = logits.clone().requires_grad_()
    loss = function(leaf * 1.0, targets)
    (loss * factor).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
def test_loss_and_gradient_against_fp64(monkeypatch, dtype, tokens):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 3 * 4 * 33)  # three tokens at once
    generator = torch.Generator().manual_seed(tokens)
    logits = (4 * torch.randn(tokens, 33, generator=generator)).to(dtype)
    targets = torch.randint(0, 33, (tokens,), generator=generator)
    targets[1::3] = -100
    exact, exact_gradient = gradient(cross_entropy_sum_ref, logits.double(), targets, 0.37)
    usual, usual_gradient = gradient(cross_entropy_sum_ref, logits, targets, 0.37)
    loss, found = gradient(cross_entropy_sum, logits, targets, 0.37)
    assert (loss.dtype, found.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    ulp = torch.finfo(loss.dtype).eps
    assert (loss - exact).abs() <= 2 * (usual - exact).abs() + 2 * ulp * exact
    worst = (usual_gradient.double() - exact_gradient).abs().max()
    assert (found.double() - exact_gradient).abs().max() <= 2 * worst + 2 * ulp
    assert (found[targets == -100] == 0).all()


def test_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], requires_grad=True)
    loss = cross_entropy_sum(logits * 1.0, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.25], [-0.5, 0.5]]))


def test_another_ignored_index_and_nothing_that_counts():
    logits = torch.randn(4, 9)
    targets = torch.tensor([0, 2, 0, 8])
    expected = F.cross_entropy(logits, targets, ignore_index=0, reduction="sum")
    torch.testing.assert_close(cross_entropy_sum(logits, targets, 0), expected)
    loss, found = gradient(cross_entropy_sum, logits, torch.full((4,), -100), 1.0)
    assert float(loss) == 0
    assert not found.any()


def test_gradient_is_where_the_logits_were():
    logits = torch.randn(5, 7, requires_grad=True) * 1.0
    before = logits.detach().clone()
    loss = cross_entropy_sum(logits, torch.arange(5))
    assert torch.equal(logits, before)  # untouched until the backward
    (found,) = torch.autograd.grad(loss, logits)
    assert found.data_ptr() == logits.data_ptr()


def test_an_operation_that_needs_its_logits_raises():
    logits = torch.tanh(torch.randn(5, 7, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_sum(logits, torch.arange(5)).backward()


def test_a_second_consumer_of_the_logits():
    leaf = torch.randn(5, 7, requires_grad=True)
    targets = torch.arange(5)

    def both(function):
        logits = leaf * 1.0
        other = torch.log_softmax(logits / 2, -1)[:, 0].sum()
        return torch.autograd.grad(function(logits, targets) + other, leaf)[0]

    torch.testing.assert_close(both(cross_entropy_sum), both(cross_entropy_sum_ref))


def test_wrong_shapes_and_targets():
    with pytest.raises(ValueError, match=r"logits must be \[tokens, vocabulary\].*got \(2, 3, 4\)"):
        cross_entropy_sum(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets \[tokens\], got \(3, 4\) and \(2,\)"):
        cross_entropy_sum(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(IndexError):
        cross_entropy_sum(torch.zeros(2, 4), torch.tensor([1, 4]))
