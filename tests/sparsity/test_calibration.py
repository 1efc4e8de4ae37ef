"""Statistics and propagation against a plain implementation that runs the whole model for every block."""

import pytest
import torch
from torch import nn

from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.capture import BlocksNotChainedError
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets


def rms_by_hooks(model, tokens, targets):
    """X of Linear and Conv1D targets: plain hooks over the whole model, in fp64."""
    seen = {target.name: [] for target in targets}
    handles = [
        t.module.register_forward_pre_hook(lambda m, args, name=t.name: seen[name].append(args[0].flatten(0, -2)))
        for t in targets
        if t.weight.ndim == 2
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x).double().square().mean(0).sqrt() for name, x in seen.items() if x}


def prune_2_of_4(weight, x):
    """Wanda 2:4 by a loop over groups, ties to the lower index."""
    score = weight.detach().abs().float() * x.float()
    keep = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], 4):
            order = sorted(range(4), key=lambda i: (-score[row, start + i].item(), i))
            keep[row, [start + i for i in order[:2]]] = True
    return keep


DENSE_ONLY = ["opt", "llama", "mistral", "gpt2", "gpt-neox", "qwen3", "gemma3"]


@pytest.mark.parametrize("propagate", ["block", "dense", "linear"])
@pytest.mark.parametrize("name", DENSE_ONLY)
def test_masks_equal_a_plain_implementation(model_named, tokens, name, propagate):
    model, plain = model_named(name), model_named(name)
    report = sparsify(
        model, "2:4", "wanda", tokens, samples=8, seq_len=16, propagate=propagate, dtype=torch.float32, progress=False
    )
    assert report.samples == 8
    targets = find_targets(plain)
    dense = rms_by_hooks(plain, tokens, targets.found)
    calls = in_calling_order(plain, tokens, targets.found)
    for block in range(len(targets.blocks)):
        group = [t for t in calls if t.block == block]
        measured = rms_by_hooks(plain, tokens, group)
        for target in group:
            if propagate == "dense":
                x = dense[target.name]
            elif propagate == "block":
                x = measured[target.name]
            else:  # what reaches it now that the linears before it are pruned
                x = rms_by_hooks(plain, tokens, [target])[target.name]
            keep = prune_2_of_4(target.matrix(), x)
            with torch.no_grad():
                target.weight.masked_fill_(~(keep.t() if target.transposed else keep), 0)
    for target in targets.found:
        pruned = model.get_parameter(target.name)
        assert torch.equal(pruned != 0, target.weight != 0), target.name


def in_calling_order(model, tokens, targets):
    order = []
    handles = [t.module.register_forward_pre_hook(lambda m, args, t=t: order.append(t)) for t in targets]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_each_expert_is_measured_on_the_tokens_routed_to_it(model_named, tokens, name):
    model = model_named(name)
    routed = {}
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(
        lambda m, args, kwargs: routed.update(x=args[0], index=args[1] if len(args) > 1 else kwargs["router_indices"]),
        with_kwargs=True,
    )
    statistics = next(
        iter(walk(model, find_targets(model), calibration_batches(model, [{"input_ids": tokens}]), propagate="dense"))
    )[1]
    x, index = routed["x"].reshape(-1, 32).float(), routed["index"].reshape(-1, 2)
    target = next(t for t in find_targets(model).found if t.name.endswith("gate_up_proj"))
    rms = statistics.rms(target)
    assert rms.shape == (4, 32)
    for expert in range(4):
        mine = x[(index == expert).any(1)]
        expected = mine.square().mean(0).sqrt() if len(mine) else torch.ones(32)
        torch.testing.assert_close(rms[expert], expected, rtol=1e-5, atol=0)


def test_experts_without_tokens_are_ranked_by_magnitude_and_named(model_named, tokens):
    model = model_named("mixtral")
    experts = model.model.layers[1].mlp.experts
    model.model.layers[1].mlp.gate.forward = lambda x: (  # every token goes to experts 0 and 1
        None,
        torch.full((x.shape[0], 2), 0.5, dtype=x.dtype),
        torch.tensor([[0, 1]]).expand(x.shape[0], 2),
    )
    weight = experts.gate_up_proj.detach().clone()
    report = sparsify(model, "50%", "wanda", tokens, samples=8, seq_len=16, progress=False)
    notes = {row.name: row.note for row in report.targets if row.note}
    expected = "2 of 4 experts saw no calibration token: their X is 1"
    assert notes["model.layers.1.mlp.experts.gate_up_proj"] == expected
    assert expected in str(report)
    smallest = weight[3].abs().argsort(dim=1)[:, :16]
    assert (experts.gate_up_proj.detach()[3].gather(1, smallest) == 0).all()
    assert (experts.gate_up_proj == 0).sum() == weight.numel() // 2


def test_rms_of_a_hand_computed_input():
    layer = nn.Linear(2, 1)
    target = find_targets(layer).found[0]
    statistics = InputStatistics([target])
    with statistics.observing(), statistics.call():
        layer(torch.tensor([[3.0, 0.0]]))
    with statistics.observing(), statistics.call():
        layer(torch.tensor([[4.0, 1.0]]))
    assert statistics.rms(target).tolist() == [[pytest.approx((25 / 2) ** 0.5), pytest.approx(0.5**0.5)]]


def test_convolution_channels_and_groups():
    conv = nn.Conv2d(4, 2, 3, groups=2)
    target = find_targets(conv).found[0]
    statistics = InputStatistics([target])
    x = torch.rand(2, 4, 5, 5)
    with statistics.observing(), statistics.call():
        conv(x)
    per_channel = x.square().mean((0, 2, 3)).sqrt()
    expected = per_channel.view(2, 2).repeat_interleave(9, dim=1)
    torch.testing.assert_close(statistics.rms(target), expected)


def test_shared_input_is_measured_once_and_an_overwritten_one_again(monkeypatch):
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)])
    targets = find_targets(model).found
    statistics = InputStatistics(targets)
    from trisparse.sparsity import statistics as module

    calls = []
    real = module._sum_of_squares
    monkeypatch.setattr(module, "_sum_of_squares", lambda rows: calls.append(1) or real(rows))
    x = torch.ones(1, 3)
    with torch.no_grad(), statistics.observing(), statistics.call():
        model[0](x)
        model[1](x)
        x.mul_(2)
        model[2](x)
    assert len(calls) == 2
    assert [statistics.rms(t)[0, 0].item() for t in targets] == [1.0, 1.0, 2.0]


def test_a_freed_address_is_not_taken_for_the_same_input():
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    targets = find_targets(model).found
    statistics = InputStatistics(targets)
    with torch.no_grad(), statistics.observing(), statistics.call():
        for value, layer in enumerate(model, start=1):
            layer(torch.full((1, 3), float(value)))  # freed at once; the next one may get its address
    assert [statistics.rms(t)[0, 0].item() for t in targets] == [1.0, 2.0]


def test_padding_does_not_count(model_named, tokens):
    padded = torch.cat([tokens[:2], torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 16), torch.zeros(2, 4)], dim=1).long()
    found = []
    for batch in ({"input_ids": tokens[:2]}, {"input_ids": padded, "attention_mask": mask}):
        model = model_named("llama")
        targets = find_targets(model)
        steps = walk(model, targets, calibration_batches(model, [batch]), dtype=torch.float32)
        found.append([s.rms(t) for group, s in steps for t in group])
    for plain, with_padding in zip(*found, strict=True):
        torch.testing.assert_close(with_padding, plain, rtol=1e-4, atol=1e-6)


def test_model_is_left_as_it_was(model_named, tokens):
    model = model_named("gemma3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [module.forward for module in model.modules()]
    for _ in walk(model, find_targets(model), calibration_batches(model, [{"input_ids": tokens}])):
        pass
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert forwards == [module.forward for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_stay_on_for_the_caller(model_named, tokens):
    model = model_named("llama")
    for group, _ in walk(model, find_targets(model), calibration_batches(model, [{"input_ids": tokens}])):
        assert torch.is_grad_enabled()
        assert all(target.weight.requires_grad for target in group)
        break  # left in the middle
    assert torch.is_grad_enabled()


def test_micro_batches_do_not_change_the_statistics(model_named, tokens):
    found = []
    for size in (8, 2):
        model = model_named("mistral")
        batches = [{"input_ids": part} for part in tokens.split(size)]
        steps = walk(model, find_targets(model), calibration_batches(model, batches), dtype=torch.float32)
        found.append([s.rms(t) for group, s in steps for t in group])
    for one, four in zip(*found, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-7)


class Skips(nn.Module):
    """Adds something to the hidden states between its blocks, if asked."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.between = between

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + self.between
        return x


def test_blocks_that_do_not_feed_each_other(tokens):
    data = [{"x": torch.rand(5, 4)}]
    with pytest.raises(BlocksNotChainedError, match=r"at layers\.1.*propagate='dense'"):
        sparsify(model := Skips(1.0), "50%", "wanda", data, progress=False)
    assert all((p != 0).all() for p in model.parameters() if p.ndim == 2)
    report = sparsify(model, "50%", "wanda", data, propagate="dense", progress=False)
    assert report.sparsity == 0.5
    assert sparsify(Skips(0.0), "50%", "wanda", data, progress=False).sparsity == 0.5


def test_blocks_may_return_tuples():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, hidden_states, scale):
            return self.inner(hidden_states) * scale, None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(2))

        def forward(self, x):
            for index, block in enumerate(self.blocks):
                x, nothing = block(hidden_states=x, scale=index + 1.0)
                assert nothing is None
            return x

    model = Model()
    data = [{"x": torch.rand(3, 4)} for _ in range(3)]
    seen = [s.rms(t) for group, s in walk(model, find_targets(model), data, propagate="dense") for t in group]
    with torch.no_grad():
        inputs = torch.cat([model.blocks[0].inner(batch["x"]) for batch in data])
    torch.testing.assert_close(seen[1][0], inputs.square().mean(0).sqrt(), rtol=2e-2, atol=1e-3)
