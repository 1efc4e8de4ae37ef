"""Full retraining: everything trains, the masks hold at every step, and a failure gives back the very same bits."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from torch import nn

from trisparse.retrain import loop
from trisparse.retrain import run as run_module
from trisparse.retrain.full import FullWeights
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, masks, masks_sha256
from trisparse.sparsity.pattern import Unstructured


def pruned_of(model):
    """(parameter, where it is pruned) of every mask."""
    return [(model.get_parameter(name), ~mask.dense()) for name, mask in masks(model).items()]


@pytest.fixture
def spy(monkeypatch):
    """``spy(callback)``: add a callback to every Trainer."""

    def add(callback):
        real = loop.trainer_for

        def with_callback(*args, **kwargs):
            trainer = real(*args, **kwargs)
            trainer.add_callback(callback)
            return trainer

        monkeypatch.setattr(run_module, "trainer_for", with_callback)

    return add


class Zeros(transformers.TrainerCallback):
    """Counts pruned weights, gradients and moments that are not zero, at every step."""

    def __init__(self, model):
        self.model = model
        self.seen = {"gradients": 0, "weights": 0, "moments": 0, "steps": 0}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen["gradients"] += sum(int(param.grad[gone].count_nonzero()) for param, gone in pruned_of(self.model))

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        states = getattr(optimizer, "optimizer", optimizer).state
        self.seen["steps"] += 1
        for param, gone in pruned_of(self.model):
            self.seen["weights"] += int(param[gone].count_nonzero())
            moments = [states[param][key] for key in ("exp_avg", "exp_avg_sq")]
            self.seen["moments"] += sum(int(moment[gone].count_nonzero()) for moment in moments)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everything_trains_and_nothing_pruned_moves(build, tokens, kind, dtype, run, snapshot, spy, tmp_path):
    model = build(kind)
    before, digest = snapshot(model), masks_sha256(model)
    callback = Zeros(model)
    spy(callback)
    report = run(model, tokens, groups="full", steps=8, weight_decay=0.1, gradient_accumulation=2, dtype=dtype)
    assert callback.seen == {"gradients": 0, "weights": 0, "moments": 0, "steps": 8}
    assert report.last_loss < 0.95 * report.first_loss
    assert report.trainable == {"full": sum(param.numel() for param in model.parameters())}
    assert report.trainable_share == 1
    assert not report.missing
    assert not report.untied_head
    check_masks(model)
    assert masks_sha256(model) == digest
    after = snapshot(model)
    for key in ("modules", "parameters", "requires_grad", "training", "config", "ties", "hooks", "peft"):
        assert after[key] == before[key], key
    unchanged = [name for name, value in after["state"].items() if torch.equal(value, before["state"][name])]
    assert unchanged == []
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())

    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    gone = {name: ~mask.dense() for name, mask in masks(model).items()}
    assert sum(int(loaded.get_parameter(name)[where].count_nonzero()) for name, where in gone.items()) == 0


def test_it_is_full_fine_tuning_with_the_mask_applied_each_step(build, tokens, run):
    """Without clipping the gradients of pruned weights touch no other weight: the usual code ends in the same place."""
    ours, usual = build("llama"), build("llama")
    run(ours, tokens, groups="full", steps=3, batch_size=8, max_grad_norm=0, warmup_ratio=0, learning_rate=1e-3)
    optimizer = torch.optim.AdamW(usual.parameters(), lr=1e-3, weight_decay=0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - step) / 3
        usual(**loop.with_labels(tokens)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for param, gone in pruned_of(usual):
                param.masked_fill_(gone, 0)
    for (name, mine), theirs in zip(ours.named_parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_a_bf16_model_trains_in_fp32_and_stays_bf16(build, tokens, run, spy):
    model = build("opt").bfloat16()
    dtypes = set()

    class Dtypes(transformers.TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            dtypes.update(param.dtype for param in model.parameters())

    spy(Dtypes())
    report = run(model, tokens, groups="full", dtype="auto", steps=8)
    assert dtypes == {torch.float32}
    assert report.last_loss < report.first_loss
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    check_masks(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failure_gives_the_same_bits_back(
    build, tokens, run, snapshot, assert_same, spy, error, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = build("llama-tied").to(dtype)
    model.model.norm.requires_grad_(False)
    before = snapshot(model)
    pointers = [param.data_ptr() for param in model.parameters()]

    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise error

    spy(Fails())
    with pytest.raises(error):
        run(model, tokens, groups="full", dtype="auto", gradient_checkpointing=True)
    assert_same(model, before)
    assert {param.dtype for param in model.parameters()} == {dtype}
    if dtype == torch.float32:
        assert [param.data_ptr() for param in model.parameters()] == pointers
    assert os.listdir(tmp_path) == []


def test_a_full_disk_changes_nothing(build, snapshot, assert_same, monkeypatch):
    model = build("llama")
    before = snapshot(model)

    class Full:
        def write(self, data):
            raise OSError("no space left")

        def tell(self):
            return 0

        def close(self):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **kwargs: Full())
    with pytest.raises(OSError, match="no space"):
        FullWeights(model)
    assert_same(model, before)


def test_a_mask_that_is_broken_in_training_is_noticed(build, tokens, run, snapshot, assert_same, spy):
    model = build("llama")
    before = snapshot(model)

    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight += 1

    spy(Breaks())
    with pytest.raises(MaskError, match="up_proj"):
        run(model, tokens, groups="full")
    assert_same(model, before)


def test_compressed_layers_are_refused(build, tokens, run, snapshot, assert_same):
    model = build("llama")
    compress(model, prefer="memory")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"groups asks for 'full'.*decompress"):
        run(model, tokens, groups="full")
    assert_same(model, before)


def test_experts_that_are_stored_transposed_keep_their_zeros():
    """A 3-D weight [experts, in, out] and a gradient that is not contiguous."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 6))

    model = Experts()
    keep = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    attach(model, "up", Mask.from_matrix(keep, model.up.shape, Unstructured(0.5), transposed=True))
    gone = model.up == 0
    full = FullWeights(model)
    (model.up.transpose(1, 2) * torch.rand(2, 6, 4)).sum().backward()
    assert torch.equal(model.up.grad == 0, gone)
    full.discard()
    assert model.up.grad is None
