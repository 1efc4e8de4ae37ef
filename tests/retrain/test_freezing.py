"""Gradual freezing: which layers train when, and what the paper's table counts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from trisparse.retrain.freezing import FreezingCallback, GradualFreezing, pruned_layers
from trisparse.retrain.perp import retrain


@pytest.mark.parametrize(
    ("mode", "start", "expected"),
    [
        ("unfreeze", "input", [[0], [0, 1, 2], [0, 1, 2, 3, 4]]),
        ("unfreeze", "output", [[4], [2, 3, 4], [0, 1, 2, 3, 4]]),
        ("freeze", "input", [[1, 2, 3, 4], [3, 4], []]),
        ("freeze", "output", [[0, 1, 2, 3], [0, 1], []]),
    ],
)
def test_five_layers_in_three_stages_by_hand(mode, start, expected):
    freezing = GradualFreezing(mode, start, stages=3)  # ⌊5/3⌋ = 1, ⌊10/3⌋ = 3, 5
    assert [list(freezing.trained(5, stage)) for stage in (1, 2, 3)] == expected
    assert [freezing.stage(step, 7) for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    assert [freezing.steps(stage, 7) for stage in (1, 2, 3)] == [3, 2, 2]
    assert [freezing.steps(stage, 2) for stage in (1, 2, 3)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("mode", "start", "percent"),
    [
        ("unfreeze", "output", 88.83),
        ("freeze", "input", 70.95),
        ("unfreeze", "input", 37.28),
        ("freeze", "output", 19.40),
    ],
)
def test_trainable_shares_of_table_12(mode, start, percent):
    config = transformers.ResNetConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck", num_labels=1000
    )
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(config)
    sizes = _convolutions_in_order(model)
    assert len(sizes) == 53
    total = sum(param.numel() for param in model.parameters())
    assert total == 25_557_032
    always = total - sum(sizes)  # the head and the batch norms
    freezing = GradualFreezing(mode, start)
    shares = [(always + sum(sizes[i] for i in freezing.trained(53, stage))) / total for stage in range(1, 6)]
    assert 100 * sum(shares) / 5 == pytest.approx(percent, abs=0.006)


def _convolutions_in_order(model):
    """Sizes of a ResNet's convolutions from the input on, the projection of a stage behind its first block's."""
    convolutions = [(name, m.weight.numel()) for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    blocks = {}
    for name, size in convolutions:
        blocks.setdefault(name.split(".layer.")[0].split(".shortcut.")[0], []).append((".shortcut." in name, size))
    return [size for members in blocks.values() for _, size in sorted(members, key=lambda member: member[0])]


@pytest.mark.parametrize("field", [{"mode": "thaw"}, {"start": "middle"}, {"stages": 0}, {"stages": 2.0}])
def test_wrong_fields_are_named(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))} must be"):
        GradualFreezing(**field)


def test_layers_are_in_order_and_without_the_head(build):
    layers = pruned_layers(build("llama"))
    assert layers[0] == "model.layers.0.self_attn.q_proj"
    assert layers[-1] == "model.layers.1.mlp.down_proj"
    assert len(layers) == 14


@pytest.mark.parametrize(("mode", "start"), [("unfreeze", "output"), ("freeze", "input"), ("freeze", "output")])
def test_each_step_trains_what_is_its_turn(build, quick, tokens, mode, start):
    model = build("llama")
    freezing = GradualFreezing(mode, start, stages=2)
    callback = FreezingCallback(freezing, model)
    seen = []
    callback_begin = callback.on_step_begin

    def watch(args, state, control, **kwargs):
        callback_begin(args, state, control, **kwargs)
        trains = {n.split(".lora_")[0] for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
        seen.append([index for index, name in enumerate(callback.layers) if name in trains])

    callback.on_step_begin = watch
    before = {name: model.get_submodule(name).weight.clone() for name in callback.layers}
    retrain(model, tokens, quick(groups=("norms", "lora"), steps=4), progress=False, callbacks=[callback])
    assert seen == [list(freezing.trained(14, stage)) for stage in (1, 1, 2, 2)]
    # what was frozen all the time is bitwise the same, all else moved
    for index, name in enumerate(callback.layers):
        moved = not torch.equal(model.get_submodule(name).weight, before[name])
        assert moved == any(index in step for step in seen), name
    assert all(param.requires_grad for param in model.parameters())
    sizes = [sum(4 * n for n in weight.shape) for weight in before.values()]  # rank 4: A [4, in] and B [out, 4]
    norms = 5 * 16
    assert callback.mean_trainable == norms + sum(sizes[i] for step in seen for i in step) / 4


def test_a_run_that_resumes_counts_all_steps_and_the_same_freezing(build, quick, tokens, tmp_path):
    def retrained(freezing, *others, **options):
        model = build("llama")
        callback = FreezingCallback(freezing, model)
        config = quick(groups=("norms", "lora"), steps=5, save_steps=1, output_dir=tmp_path, **options)
        report = retrain(model, tokens, config, progress=False, callbacks=[callback, *others])
        return report, callback, model

    freezing = GradualFreezing(stages=3)
    _, whole, unbroken = retrained(freezing)
    (tmp_path / "checkpoint-5" / "retrain.json").unlink()
    report, resumed, model = retrained(freezing, resume=True)
    assert report.resumed_at == 4
    assert resumed.mean_trainable == whole.mean_trainable
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unbroken.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"another run, resume needs the same: callbacks \(was .*'stages': 3"):
        retrained(GradualFreezing(stages=2), resume=True)
    # what cannot say what it is, is not compared
    assert retrained(freezing, transformers.TrainerCallback(), resume=True)[0].resumed_at == 5


def test_nothing_to_freeze_or_to_train_leaves_the_model(build, quick, tokens, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="freezing has nothing to freeze"):
        retrain(
            model,
            tokens,
            quick(groups=("norms",)),
            progress=False,
            callbacks=[FreezingCallback(GradualFreezing(), model)],
        )
    assert_same(model, before)
    callback = FreezingCallback(GradualFreezing("freeze", "input", stages=2), model)
    with pytest.raises(ValueError, match="freezing leaves nothing to train in stage 2 of 2: add 'norms' or 'head'"):
        retrain(model, tokens, quick(groups=("lora",)), progress=False, callbacks=[callback])
    assert_same(model, before)


def test_a_frozen_layer_keeps_no_gradient_in_the_one_process(build):
    model = build("llama")
    callback = FreezingCallback(GradualFreezing("freeze", "input", stages=1), model)
    with pytest.raises(ValueError, match="freezing changes what trains from step to step: run one process, not 2"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None)
    assert math.isnan(callback.mean_trainable)
    callback.on_train_begin(SimpleNamespace(world_size=1), SimpleNamespace(max_steps=1), None)
    weight = model.get_submodule(callback.layers[0]).weight
    weight.grad = torch.ones_like(weight)
    callback.on_step_begin(None, SimpleNamespace(global_step=0, max_steps=1), None)
    assert weight.grad is None
    assert not weight.requires_grad
    callback.on_train_end(None, None, None)
    assert weight.requires_grad
