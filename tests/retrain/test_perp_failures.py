"""What retraining refuses, and what a failure in the middle leaves behind: the model as it was."""

from __future__ import annotations

import math
import os

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from trisparse.retrain import adapters, loop
from trisparse.retrain import run as run_module
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.lora import mask_lora_modules
from trisparse.sparsity.mask import MaskError, check_masks, detach


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_a_failure_leaves_the_model_as_it_was(build, tokens, monkeypatch, error, kind, run, snapshot, assert_same):
    model = build(kind)
    model.model.requires_grad_(False)
    model.eval()
    before = snapshot(model)

    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise error

    real = loop.trainer_for

    def with_failure(*args, **kwargs):
        trainer = real(*args, **kwargs)
        trainer.add_callback(Fails())
        return trainer

    monkeypatch.setattr(run_module, "trainer_for", with_failure)
    with pytest.raises(error):
        run(model, tokens, gradient_checkpointing=True)
    assert_same(model, before)


def test_a_failure_while_wrapping_leaves_the_model_as_it_was(build, tokens, monkeypatch, run, snapshot, assert_same):
    model = build("opt")
    before = snapshot(model)

    def half(model, config):
        get_peft_model(model, config)
        raise MemoryError

    monkeypatch.setattr(adapters, "get_peft_model", half)
    with pytest.raises(MemoryError):
        run(model, tokens)
    assert_same(model, before)


def test_a_loss_that_is_not_finite_names_its_step(build, tokens, monkeypatch, run, snapshot, assert_same):
    model = build("opt")
    before = snapshot(model)
    calls = []

    def sometimes_nan(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            output.loss = output.loss * math.nan

    hook = model.register_forward_hook(sometimes_nan)
    with pytest.raises(RetrainError, match="loss is nan at step 2 of 3"):
        run(model, tokens)
    hook.remove()
    assert_same(model, before)


def test_an_interrupt_while_merging_comes_after_it(build, tokens, monkeypatch, run, snapshot):
    model = build("llama")
    real = PeftModel.__getattr__

    def interrupted(self, name):
        if name == "merge_and_unload":
            os.kill(os.getpid(), 2)
        return real(self, name)

    monkeypatch.setattr(PeftModel, "__getattr__", interrupted)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokens)
    assert snapshot(model)["modules"] == before["modules"]
    check_masks(model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"groups": ("norm",)}, "groups must be one or more of biases, norms, head, lora"),
        ({"groups": ()}, "groups"),
        (
            {"groups": "norm"},
            "groups must be one of biases, norms, linear-probing, perp, full, or a sequence of biases",
        ),
        ({"groups": "bn-recalibrate"}, "is for image classifiers: retrain_vision"),
        ({"groups": ("full", "norms")}, "groups must be 'full' alone"),
        ({"variant": "dora"}, "variant must be one of lora, lora_prune, mask_lora, scale_lora, got 'dora'"),
        ({"merge": 0}, "merge must be True or False, got 0"),
        ({"merge": False, "groups": "full"}, "merge must be True for groups='full'"),
        ({"targets": ()}, "targets must be one or more patterns"),
        ({"targets": (3,)}, "targets must be one or more patterns"),
        ({"targets": "q_proj", "groups": "norms"}, "targets are of the group 'lora'"),
        ({"dtype": "fp64"}, "dtype must be one of auto, fp32, bf16, fp16"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps"),
        ({"batch_size": True}, "batch_size"),
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
        ({"seq_len": 1}, "seq_len"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0 or 'grid', got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight_decay": -1}, "weight_decay must be a number of at least 0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"warmup_ratio": 1}, r"warmup_ratio must be a number in \[0, 1\)"),
        ({"save_steps": 0, "output_dir": "x"}, "save_steps"),
        ({"save_steps": 5}, "output_dir"),
        ({"report_to": "wandb"}, "report_to"),
    ],
)
def test_wrong_options_are_refused(changes, match, quick):
    with pytest.raises(ValueError, match=match):
        quick(**changes)


@pytest.mark.parametrize(
    ("spoil", "data", "changes", "match"),
    [
        (lambda m: [detach(x) for x in m.modules()], None, {}, "no masks"),
        (lambda m: None, torch.zeros(15, dtype=torch.long), {}, "short"),
        (lambda m: None, torch.zeros(16, dtype=torch.long), {}, "shorter than one batch"),
        (lambda m: None, torch.full((8, 16), 48), {}, "token id 48"),
        (lambda m: None, None, {"seq_len": 33}, "maximum of 32 positions"),
        (lambda m: None, None, {"groups": ("biases",)}, r"nothing to train .*it has norms, head, lora"),
        (lambda m: m.bfloat16(), None, {}, "bf16"),
        (lambda m: m.half(), None, {}, "fp16"),
        (lambda m: m.all_tied_weights_keys.update({"a.weight": "b.weight"}), None, {}, "untie a.weight too"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_changes(
    build, tokens, spoil, data, changes, match, run, snapshot, assert_same
):
    model = build("llama-tied")
    spoil(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        run(model, tokens if data is None else data, **changes)
    assert_same(model, before)


def test_other_wrong_models(build, tokens, run, snapshot, assert_same):
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    before = snapshot(model)
    for groups in (("lora",), ("norms",)):
        with pytest.raises(MaskError, match="up_proj"):
            run(model, tokens, groups=groups)
        assert_same(model, before)
    peft = get_peft_model(build("llama"), mask_lora_modules(LoraConfig(target_modules=["up_proj"])))
    for wrapped in (peft, peft.base_model.model):
        with pytest.raises(ValueError, match="PEFT already"):
            run(wrapped, tokens)
    with pytest.raises(ValueError, match="causal language model"):
        run(nn.Linear(4, 4), tokens)
    with torch.device("meta"):
        meta = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="meta"):
        run(meta, tokens)
