"""Retraining end to end on tiny models: what changes, what does not, and what a failure leaves behind."""

from __future__ import annotations

import copy
import json
import random
import warnings

import numpy as np
import pytest
import torch
import transformers

from trisparse.retrain import loop
from trisparse.retrain import run as run_module
from trisparse.retrain.adapters import Adapted
from trisparse.retrain.groups import parameter_groups
from trisparse.retrain.loop import Windows, mean_loss, with_labels
from trisparse.retrain.perp import retrain
from trisparse.retrain.run_folder import load_trained
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import check_masks, masks, masks_sha256


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_overfits_keeps_zeros_and_reloads(build, tokens, tmp_path, kind, dtype, run, snapshot):
    model = build(kind)
    before, digest = snapshot(model), masks_sha256(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie")  # PEFT's, about what retrain does itself
        report = run(model, tokens, steps=30, learning_rate=5e-2, dtype=dtype)
    assert report.last_loss < 0.92 * report.first_loss
    check_masks(model)
    assert masks_sha256(model) == digest

    after = snapshot(model)
    for key in ("modules", "training", "peft", "hooks", "forward", "checkpointing"):
        assert after[key] == before[key], key
    assert all(param.requires_grad for param in model.parameters())

    tied = before["ties"] != {}
    assert report.untied_head == tied
    assert report.added_parameters == (48 * 16 if tied else 0)
    assert after["ties"] == {}
    assert model.config.tie_word_embeddings is False
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is False
    config = {**after["config"], "tie_word_embeddings": before["config"]["tie_word_embeddings"]}
    assert config == before["config"]

    # what is frozen is the same, bit for bit; the input embedding of a tied head too
    groups = parameter_groups(model)
    changed = {name for name, value in after["state"].items() if not torch.equal(value, before["state"][name])}
    expected = {f"{name}.weight" for name in (*groups.lora, *groups.head)} | set(groups.biases)
    expected |= {f"{name}.{p}" for name in groups.norms for p, _ in model.get_submodule(name).named_parameters()}
    assert changed <= expected
    assert {f"{name}.weight" for name in (*groups.lora, *groups.head, *groups.norms)} <= changed

    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.eval()
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_the_head_changes_only_itself(build, tokens, run):
    model = build("llama-tied")
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    report = run(model, tokens, groups=("head",))
    assert report.trainable == {"head": 4 * (16 + 48)}
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)
    model.tie_weights()  # must not tie again
    assert model.get_output_embeddings().weight is not embedding


def test_a_head_that_does_not_train_stays_tied(build, tokens, run):
    model = build("llama-tied")
    ties = dict(model.all_tied_weights_keys)
    report = run(model, tokens, groups=("norms", "lora"))
    assert not report.untied_head
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys == ties


@pytest.mark.parametrize("group", ["biases", "norms", "head", "lora"])
def test_each_group_alone(build, tokens, group, run, snapshot):
    model = build("opt")
    before = snapshot(model)["state"]
    report = run(model, tokens, groups=(group,))
    groups = parameter_groups(model)
    expected = {
        "biases": set(groups.biases),
        "norms": {f"{name}.{p}" for name in groups.norms for p in ("weight", "bias")},
        "head": {"lm_head.weight"},
        "lora": {f"{name}.weight" for name in groups.lora},
    }[group]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # the softmax does not see the keys' bias: its gradient is rounding
    assert changed | {n for n in expected if "k_proj.bias" in n} == expected
    assert list(report.trainable) == [group]


def test_merged_model_is_the_trained_one(build, tokens):
    model = build("llama-tied")
    adapted = Adapted(model, parameter_groups(model), ("biases", "norms", "head", "lora"), 4, 8)
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.data += 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        trained = adapted.peft(tokens).logits
        adapted.merge()
        torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-4, atol=1e-5)


def test_frozen_weights_have_no_gradient_and_no_state(build, tokens, monkeypatch, run):
    seen = {}

    class Spy(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen["grads"] = {name for name, param in model.named_parameters() if param.grad is not None}
            seen["trains"] = {name for name, param in model.named_parameters() if param.requires_grad}

        def on_step_end(self, args, state, control, optimizer, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            seen["state"] = sum(
                value.numel() for state in inner.state.values() for key, value in state.items() if key != "step"
            )

    real = loop.trainer_for

    def with_spy(*args, **kwargs):
        trainer = real(*args, **kwargs)
        trainer.add_callback(Spy())
        return trainer

    monkeypatch.setattr(run_module, "trainer_for", with_spy)
    report = run(build("opt"), tokens)
    assert seen["grads"] == seen["trains"]
    assert not any("base_layer.weight" in name or "original_module" in name for name in seen["grads"])
    assert seen["state"] == 2 * sum(report.trainable.values())


def test_same_seed_same_weights_and_the_callers_randomness_stays(build, tokens, run):
    finals = []
    for seed in (0, 0, 1):
        model = build("llama")
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        run(model, tokens, seed=seed)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
        finals.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradient_checkpointing_gives_the_same_gradients(build, tokens, dtype):
    grads = []
    for checkpointing in (False, True):
        model = build("llama")
        torch.manual_seed(0)
        adapted = Adapted(model, parameter_groups(model), ("norms", "head", "lora"), 4, 8)
        adapted.switch_cache_off()
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with loop.autocast(torch.device("cpu"), dtype):
            adapted.peft(**with_labels(tokens)).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_gradient_checkpointing_run_equals_the_plain_one_and_is_switched_off(build, tokens, run, snapshot):
    plain, checkpointed = build("llama"), build("llama")
    run(plain, tokens)
    before = snapshot(checkpointed)
    run(checkpointed, tokens, gradient_checkpointing=True)
    after = snapshot(checkpointed)
    for key in ("hooks", "forward", "checkpointing", "config"):
        assert after[key] == before[key]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True))


def test_bf16_model_trains_in_fp32_and_stays_bf16(build, tokens, run):
    model = build("opt").bfloat16()
    report = run(model, tokens, dtype="auto", steps=10)
    assert report.last_loss < report.first_loss
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    check_masks(model)


def test_report(build, tokens, quick):
    model = build("llama-tied")
    total = sum(param.numel() for param in model.parameters())
    report = retrain(model, tokens, quick(gradient_accumulation=2), validation=tokens[:3], progress=False)
    lora = sum(sum(mask.shape) for mask in masks(model).values()) * 4
    assert report.trainable == {"biases": 0, "norms": 5 * 16, "head": 4 * (48 + 16), "lora": lora}
    assert report.trainable_share == sum(report.trainable.values()) / total
    assert (report.steps, report.tokens) == (3, 3 * 2 * 2 * 16)
    assert report.tokens_per_second == report.tokens / report.seconds > 0
    assert len(report.losses) == 3
    assert (report.first_loss, report.last_loss) == (report.losses[0], report.losses[2])
    assert report.peak_memory_bytes > 10 * 2**20
    assert report.validation_loss[1] < report.validation_loss[0]
    assert report.validation_loss[1] == pytest.approx(mean_loss(model, tokens[:3], 2, None), rel=1e-5)
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert values["last_loss"] == report.last_loss
    assert values["not_covered"] == []
    assert "untied from the input embedding, +768 parameters" in str(report)
    assert "biases 0, norms 80" in str(report)


def test_loss_is_the_models_mean_over_the_accumulated_batch(build, tokens, run):
    model = build("llama")
    want = mean_loss(model, tokens[:4], 4, None)
    with torch.no_grad():
        assert want == pytest.approx(float(model(tokens[:4], labels=tokens[:4]).loss), rel=1e-6)
    report = run(model, tokens[:4], steps=1, gradient_accumulation=2)  # one step over all four windows
    assert report.first_loss == pytest.approx(want, rel=1e-6)


def test_windows_come_in_whole_permutations():
    windows = torch.arange(6).view(3, 2)
    data = Windows(windows, 8, seed=0)
    order = [int(data[i]["input_ids"][0]) // 2 for i in range(len(data))]
    assert len(order) == 8
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]
    assert data[0]["labels"][0] == -100
    assert Windows(windows, 8, seed=1).order.tolist() != Windows(windows, 8, seed=2).order.tolist()


@pytest.mark.parametrize("compressed", [False, True])
def test_checkpoints_hold_all_that_trains(build, tokens, tmp_path, run, compressed):
    model = build("opt")
    if compressed:
        compress(model, prefer="memory")
    fresh = copy.deepcopy(model)
    wanted = ("biases", "norms", "lora")
    run(model, tokens, output_dir=tmp_path, save_steps=3, groups=wanted)
    # what the checkpoint holds, on an untrained copy
    adapted = Adapted(fresh, parameter_groups(fresh), wanted, rank=4, alpha=8)
    trained = [name for name, param in adapted.module.named_parameters() if param.requires_grad]
    load_trained(adapted.module, trained, tmp_path / "checkpoint-3")
    adapted.merge()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert not (tmp_path / "checkpoint-2").exists()


def test_nothing_is_written_without_an_output_folder(build, tokens, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    run(build("llama"), tokens)
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_shows_the_loss(build, tokens, capfd, monkeypatch, quick):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    report = retrain(build("llama"), tokens, quick(), progress=True)
    captured = capfd.readouterr()
    assert f"loss {report.last_loss:.4f}" in captured.err
    assert captured.out == ""
