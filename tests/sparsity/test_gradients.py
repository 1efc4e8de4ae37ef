"""G against plain autograd, one sequence at a time in fp64; what is restored; files; refusals."""

import pytest
import torch
from torch import nn

from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.capture import BlocksNotChainedError
from trisparse.sparsity.gradients import gradient_norms, split_batch
from trisparse.sparsity.statistics import experts_one_by_one
from trisparse.sparsity.targets import find_targets

MODES = ["whole", "block"]


def measure(model, data, mode="whole", **options):
    targets = find_targets(model)
    options = {"compute_dtype": torch.float32, "progress": False} | options
    return targets, gradient_norms(model, targets, calibration_batches(model, data), mode=mode, **options)


def norms_by_autograd(model, tokens, targets, labels=None, **extra):
    """G by the plainest means: one sequence, one backward pass, cross entropy written out; in fp64."""
    was = next(model.parameters()).dtype
    model.double()
    total = {}
    for row in range(len(tokens)):
        model.zero_grad()
        inputs = {name: value[row : row + 1] for name, value in extra.items()}
        with experts_one_by_one(model):  # torch's grouped product takes no fp64
            output = model(input_ids=tokens[row : row + 1], use_cache=False, **inputs)
        logp = output.logits[0, :-1].log_softmax(-1)
        wanted = (tokens if labels is None else labels)[row, 1:]
        losses = [-logp[t, int(wanted[t])] for t in range(len(wanted)) if wanted[t] >= 0]
        (sum(losses) / len(losses)).backward()
        for target in targets.found:
            gradient = target.weight.grad
            if gradient is not None:
                matrix = gradient.transpose(-1, -2) if target.transposed else gradient
                total[target.name] = total.get(target.name, 0) + matrix.reshape(-1, target.cols) ** 2
    model.zero_grad()
    model.to(was)
    return {name: squares.sqrt() for name, squares in total.items()}


def assert_close(statistics, targets, expected):
    for target in targets.found:
        norm = statistics.norm(target)
        assert norm.dtype == torch.float32
        assert norm.shape == target.matrix().shape
        scale = expected[target.name].max()
        torch.testing.assert_close(norm.double() / scale, expected[target.name] / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_norms_equal_plain_autograd(language_model, tokens, mode):
    expected = norms_by_autograd(language_model, tokens, find_targets(language_model))
    targets, statistics = measure(language_model, [{"input_ids": tokens}], mode)
    assert_close(statistics, targets, expected)
    assert statistics.info.sequences == 8
    assert statistics.info.tokens == 128
    assert statistics.info.unreached == ()
