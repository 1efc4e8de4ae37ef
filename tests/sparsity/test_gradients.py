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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_predicted_nor_predicted_from(model_named, tokens, mode, side):
    model = model_named("llama")
    mask = torch.ones_like(tokens)
    mask[1:4, :5] = 0
    mask = mask.flip(1) if side == "right" else mask
    cut = [row[keep.bool()] for row, keep in zip(tokens, mask, strict=True)]
    targets, padded = measure(model, [{"input_ids": tokens, "attention_mask": mask}], mode)
    _, plain = measure(model, [{"input_ids": row[None]} for row in cut], mode)
    for target in targets.found:
        torch.testing.assert_close(padded.norm(target), plain.norm(target), rtol=1e-3, atol=1e-6)
    assert padded.info.tokens == plain.info.tokens == 128 - 15


def test_labels_of_the_batch_are_used(model_named, tokens):
    model = model_named("llama")
    labels = tokens.flip(1).clone()
    labels[:, :9] = -100
    expected = norms_by_autograd(model, tokens, find_targets(model), labels)
    targets, statistics = measure(model, [{"input_ids": tokens, "labels": labels}], "block")
    assert_close(statistics, targets, expected)


def test_hand_computed_norm():
    layer = nn.Linear(2, 1, bias=False)
    targets = find_targets(layer)
    batches = [{"input": torch.tensor([[3.0, 0.0], [4.0, 1.0]])}]
    statistics = gradient_norms(layer, targets, batches, loss=lambda m, b: m(**b).sum(), compute_dtype=torch.float32)
    assert statistics.info.mode == "whole"
    assert statistics.norm(targets.found[0]).tolist() == [[5.0, 1.0]]


def test_conv_net_with_its_own_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
    net.append(nn.Linear(8 * 2 * 2, 5))
    targets = find_targets(net)
    images, classes = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 4])

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["input"]), batch["labels"])

    statistics = gradient_norms(net, targets, [{"input": images, "labels": classes}], mode="whole", loss=loss)
    expected = {target.name: 0 for target in targets.found}
    for image, label in zip(images, classes, strict=True):
        value = nn.functional.cross_entropy(net(image[None]), label[None])
        gradients = torch.autograd.grad(value, [target.weight for target in targets.found])
        for target, gradient in zip(targets.found, gradients, strict=True):
            expected[target.name] += gradient.reshape(-1, target.cols) ** 2
    for target in targets.found:
        tolerance = 3e-2 if statistics.info.compute_dtype == "bfloat16" else 1e-5
        norm = expected[target.name].sqrt()
        torch.testing.assert_close(statistics.norm(target), norm, rtol=0, atol=tolerance * norm.max())


def test_bfloat16_is_rounded_once(model_named, tokens):
    model = model_named("llama")
    targets, exact = measure(model, [{"input_ids": tokens}], "block")
    _, rounded = measure(model, [{"input_ids": tokens}], "block", dtype=torch.bfloat16)
    for target in targets.found:
        assert torch.equal(rounded.norm(target), exact.norm(target).bfloat16())


def test_small_terms_of_many_sequences_are_not_lost(model_named, tokens):
    model = model_named("llama")
    row = tokens[:1]
    targets, once = measure(model, [{"input_ids": row}], "block")
    _, often = measure(model, [{"input_ids": row.expand(1024, -1)}], "block", dtype=torch.bfloat16)
    target = targets.found[0]
    torch.testing.assert_close(often.norm(target).float(), once.norm(target) * 32, rtol=2**-8, atol=0)


def test_autocast_computes_in_bfloat16(model_named, tokens):
    model = model_named("llama")
    targets, exact = measure(model, [{"input_ids": tokens}], "block")
    whole, block = (measure(model, [{"input_ids": tokens}], m, compute_dtype=torch.bfloat16)[1] for m in MODES)
    assert block.info.compute_dtype == "bfloat16"
    for target in targets.found:
        scale = exact.norm(target).max()
        assert not torch.equal(block.norm(target), exact.norm(target))
        torch.testing.assert_close(block.norm(target), exact.norm(target), rtol=0, atol=0.05 * scale)
        torch.testing.assert_close(block.norm(target), whole.norm(target), rtol=0, atol=0.02 * scale)


def state_of(model):
    return [(p.requires_grad, p.grad, p.data_ptr()) for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_came(model_named, tokens, mode, fails):
    model = model_named("llama").train()
    model.model.layers[1].eval()
    model.activation_checkpointing_enable()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    parameters[4].grad = torch.ones_like(parameters[4])
    before = state_of(model)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    if fails:
        handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, out: _Poison.apply(out))
        with pytest.raises(ValueError, match=r"the gradient of model\.layers\.1\.mlp\.up_proj\.weight is NaN or Inf"):
            measure(model, [{"input_ids": tokens}], mode)
        handle.remove()
    else:
        measure(model, [{"input_ids": tokens}], mode)
    assert [(a, id(b), c) for a, b, c in before[0]] == [(a, id(b), c) for a, b, c in state_of(model)[0]]
    assert before[1] == state_of(model)[1]
    assert model.is_activation_checkpointing
    assert forwards == [module.__dict__.get("forward") for module in model.modules()]
    assert not any(p._post_accumulate_grad_hooks for p in parameters)
    assert torch.equal(parameters[4].grad, torch.ones_like(parameters[4]))


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_a_loss_that_is_not_finite_raises(model_named, tokens):
    model = model_named("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    for mode in MODES:
        with pytest.raises(ValueError, match="the loss of sequence 0 is nan"):
            measure(model, [{"input_ids": tokens}], mode)


@pytest.mark.parametrize("mode", MODES)
def test_what_gets_no_gradient_has_no_norm(model_named, tokens, mode):
    model = model_named("llama")
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: layer.down_proj(x[..., :1].expand(*x.shape[:-1], 48))
    targets, statistics = measure(model, [{"input_ids": tokens}], mode)
    names = ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert statistics.info.unreached == names
    for target in targets.found:
        assert (statistics.norm(target) is None) == (target.name in names)


def test_models_that_block_mode_cannot_take(model_named, tokens):
    model = model_named("llama")
    layers = model.model.layers
    data = [{"input_ids": tokens}]
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(BlocksNotChainedError, match=r"is shared with model\.layers\.2\.mlp\.up_proj\.weight"):
        measure(model, data, "block")
    targets = find_targets(model)
    shared = measure(model, data, None)[1]
    assert shared.info.mode == "whole"
    assert_close(shared, targets, norms_by_autograd(model, tokens, targets))  # the sum of both uses, then squared

    model = model_named("llama")
    with pytest.raises(BlocksNotChainedError, match=r"lm_head\.weight is outside the blocks"):
        gradient_norms(model, find_targets(model, include="lm_head"), data, mode="block")

    model = model_named("llama")
    norm, first = model.model.norm, model.model.layers[0]
    kept = {}
    first.register_forward_hook(lambda m, args, out: kept.update(out=out))
    plain = norm.forward
    norm.forward = lambda x: plain(x + kept["out"])
    with pytest.raises(BlocksNotChainedError, match="its loss takes more from the blocks than the last one's output"):
        measure(model, data, "block")
    assert measure(model, data, None)[1].info.mode == "whole"


def test_wrong_arguments(model_named, tokens):
    model = model_named("llama")
    data = [{"input_ids": tokens}]
    with pytest.raises(ValueError, match="mode must be one of whole, block, got 'all'"):
        measure(model, data, "all")
    with pytest.raises(ValueError, match=r"dtype=torch\.bfloat16 needs mode='block'"):
        measure(model, data, "whole", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"):
        measure(model, data, "block", dtype=torch.float16)
    with pytest.raises(ValueError, match="compute_dtype must be None"):
        measure(model, data, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match="batches is empty"):
        gradient_norms(model, find_targets(model), [])
    with pytest.raises(ValueError, match="a sequence of 1 tokens"):
        measure(model, [{"input_ids": tokens[:, :1]}])
    with pytest.raises(ValueError, match="gradients of a float16 model underflow"):
        measure(model.half(), data)
    with pytest.raises(ValueError, match=r"compute_dtype=torch\.float32 on a model in torch\.bfloat16"):
        measure(model.bfloat16(), data)
    with pytest.raises(ValueError, match=r"Linear with a batch of input has no language model loss of its own"):
        measure(nn.Linear(2, 2), [torch.rand(3, 2)])
    with pytest.raises(ValueError, match=r"batches of 3 sequences have bias of shape \[2\]: cannot split"):
        split_batch({"x": torch.rand(3, 2), "bias": torch.rand(2)})


def test_a_batch_splits_into_sequences():
    parts = split_batch({"x": torch.arange(6).view(3, 2), "position": torch.zeros(1, 2), "use_cache": False})
    assert [part["x"].tolist() for part in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(part["position"].shape == (1, 2) and part["use_cache"] is False for part in parts)
