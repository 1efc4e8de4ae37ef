"""The batch by model size, the grid of learning rates, the mask guard, and fp16."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from trisparse.retrain import loop
from trisparse.retrain.batch_settings import BatchSettings, batch_settings, paper_batch
from trisparse.retrain.cycles import CyclesConfig
from trisparse.retrain.freezing import GradualFreezing
from trisparse.retrain.loop import RetrainError, Watch, autocast, trainer_for
from trisparse.retrain.lr_grid import choose_learning_rate
from trisparse.retrain.perp import PERPConfig, autocast_dtype, retrain
from trisparse.sparsity.mask import MaskError, masks


@pytest.mark.parametrize(
    ("parameters", "batch"),
    [
        (1, (2, 4)),
        (135_000_000, (2, 4)),
        (12_853_473_280, (2, 4)),  # OPT-13B
        (29_974_540_288, (1, 2)),  # OPT-30B
        (68_976_648_192, (1, 2)),  # Llama-2-70B
    ],
)
def test_batch_of_the_paper(parameters, batch):
    assert paper_batch(parameters) == batch
    assert batch_settings(PERPConfig(), parameters) == batch
    assert batch_settings(PERPConfig(batch_size=3), parameters) == (3, batch[1])
    assert batch_settings(PERPConfig(gradient_accumulation=5), parameters) == (batch[0], 5)
    assert BatchSettings(3, 5).windows == 15


def test_batch_of_no_model():
    with pytest.raises(ValueError, match="parameters must be at least 1, got 0"):
        paper_batch(0)


def test_a_run_takes_the_batch_of_the_paper(build, tokens, run):
    report = run(build("llama"), tokens, steps=1, batch_size=None, gradient_accumulation=None)
    assert report.batch == (2, 4, 1)
    assert report.tokens == 2 * 4 * 16


def test_choice_of_the_lowest_loss():
    losses = {1e-4: 2.0, 1e-3: 1.5, 1e-2: 1.5, 1e-1: math.nan}

    def attempt(rate):
        if rate == 1:
            raise RetrainError("loss is nan")
        return losses[rate]

    assert choose_learning_rate((1e-1, 1e-2, 1e-3, 1e-4, 1), attempt) == (
        1e-3,
        {1e-1: None, 1e-2: 1.5, 1e-3: 1.5, 1e-4: 2.0, 1: None},
    )
    with pytest.raises(RetrainError, match=r"no learning rate of 1, 0.1 gave a finite"):
        choose_learning_rate((1, 1e-1), attempt)
    with pytest.raises(
        RetrainError, match=r"rates 0.01, 0.001 all gave the validation loss 1.5, so none can be chosen"
    ):
        choose_learning_rate((1e-2, 1e-3, 1e-1), attempt)
    assert choose_learning_rate((1e-2, 1e-1), attempt) == (1e-2, {1e-2: 1.5, 1e-1: None})


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup"), [(1, 0.1, 0), (1, 0.99, 0), (9, 0.1, 0), (30, 0.1, 3), (4, 0.9, 3)]
)
def test_the_warm_up_leaves_a_step_that_changes_the_weights(build, tokens, run, monkeypatch, steps, ratio, warmup):
    seen = []
    real = loop.TrainingArguments
    monkeypatch.setattr(
        loop, "TrainingArguments", lambda **options: seen.append(options["warmup_steps"]) or real(**options)
    )
    model = build("opt")
    before = {name: model.get_parameter(name).detach().clone() for name in masks(model)}
    run(model, tokens, steps=steps, warmup_ratio=ratio)
    assert seen == [warmup]
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_a_grid_of_single_steps_chooses(build, tokens, quick):
    config = quick(learning_rate="grid", learning_rates=(1e-5, 1e-2), grid_steps=1)
    report = retrain(build("opt"), tokens, config, validation=tokens, progress=False)
    assert report.learning_rate == 1e-2
    assert report.grid[1e-2] < report.grid[1e-5]


def test_grid_tries_each_rate_from_the_same_start_and_reports_all(build, tokens, quick):
    rates = (1e-5, 1e-2, 1e30)  # the last one diverges
    gridded, plain = build("llama"), build("llama")
    config = quick(learning_rate="grid", learning_rates=rates, grid_steps=3)
    report = retrain(gridded, tokens, config, validation=tokens, progress=False)
    assert report.learning_rate == 1e-2
    assert list(report.grid) == list(rates)
    assert report.grid[1e30] is None
    for rate in rates[:2]:  # as if it had been the only one
        alone = retrain(build("llama"), tokens, quick(learning_rate=rate), validation=tokens, progress=False)
        assert report.grid[rate] == alone.validation_loss[1]
    retrain(plain, tokens, quick(learning_rate=1e-2), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(gridded.parameters(), plain.parameters(), strict=True))
    assert "tried 0.01" in str(report)
    assert ", chosen" in str(report)
    assert "diverged" in str(report)
    assert report.to_dict()["grid"]["1e-05"] == report.grid[1e-5]


def test_grid_of_rates_that_all_diverge_leaves_the_model(build, tokens, quick, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    config = quick(learning_rate="grid", learning_rates=(1e30, 1e31), grid_steps=2)
    with pytest.raises(RetrainError, match="no learning rate of"):
        retrain(model, tokens, config, validation=tokens, progress=False)
    assert_same(model, before)


def test_grid_needs_validation(build, tokens, run, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"learning_rate='grid' .* pass validation"):
        run(model, tokens, learning_rate="grid")
    assert_same(model, before)


def test_the_guard_names_the_step_and_the_layer(build, tokens, quick, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    (pruned,) = (~masks(model)["model.layers.1.mlp.up_proj.weight"].dense()).nonzero()[:1].tolist()

    config = quick(steps=6, guard_every=2)
    with pytest.raises(MaskError, match=r"after step 4 of 6 .*mlp.up_proj.weight: 1 pruned"):
        retrain(model, tokens, config, progress=False, callbacks=[BreaksAt(weight, tuple(pruned), 3)])
    weight.data[tuple(pruned)] = 0
    assert_same(model, before)
    retrain(model, tokens, config, progress=False)


class BreaksAt(transformers.TrainerCallback):
    """Makes a pruned weight 1 after a step."""

    def __init__(self, weight, index, step):
        self.weight, self.index, self.step = weight, index, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.weight.data[self.index] = 1.0


def test_the_last_step_is_always_checked(build, tokens, quick):
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    (pruned,) = (~masks(model)["model.layers.0.mlp.up_proj.weight"].dense()).nonzero()[:1].tolist()
    with pytest.raises(MaskError, match=r"after step 3 of 3 .*up_proj.weight: 1 pruned"):
        retrain(model, tokens, quick(), progress=False, callbacks=[BreaksAt(weight, tuple(pruned), 1)])


def logged(watch, step, **logs):
    args, state = SimpleNamespace(learning_rate=1e-3), SimpleNamespace(global_step=step, max_steps=100)
    watch.on_log(args, state, None, logs=logs)


def test_fp16_skips_a_step_whose_gradients_overflow_and_stops_at_too_many():
    with Watch(100, progress=False, scaled=True) as watch:
        logged(watch, 1, loss=2.0, grad_norm=math.inf)
        logged(watch, 2, loss=1.9, grad_norm=1.0)
        assert (watch.skipped, watch.losses) == (1, [2.0, 1.9])
        for step in range(3, 26):
            logged(watch, step, loss=1.9, grad_norm=math.nan)
        with pytest.raises(RetrainError, match="grad_norm is nan at step 26"):
            logged(watch, 26, loss=1.9, grad_norm=math.nan)
    with Watch(100, progress=False, scaled=True) as watch, pytest.raises(RetrainError, match="loss is nan"):
        logged(watch, 1, loss=math.nan, grad_norm=1.0)
    with Watch(100, progress=False) as watch, pytest.raises(RetrainError, match="grad_norm is inf at step 1"):
        logged(watch, 1, loss=2.0, grad_norm=math.inf)


def test_fp16_is_refused_where_it_cannot_work(build, tokens, run, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="dtype='fp16' needs a model on CUDA, this one is on cpu"):
        run(model, tokens, dtype="fp16")
    assert_same(model, before)
    with pytest.raises(ValueError, match="dtype='fp16' needs a model in fp32, this one is in bf16"):
        autocast_dtype(model.bfloat16(), PERPConfig(dtype="fp16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a CUDA device")
def test_fp16_trains_on_cuda(build, tokens, run):
    model = build("llama").cuda()
    report = run(model, tokens, dtype="fp16", steps=30, learning_rate=5e-2)
    assert report.last_loss < report.first_loss
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_fp16_asks_the_trainer_for_the_scaler(build, tokens, quick, monkeypatch):
    seen = {}

    def arguments(**options):
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr("trisparse.retrain.loop.TrainingArguments", arguments)
    for dtype, fp16 in ((torch.float16, True), (torch.bfloat16, False), (None, False)):
        with pytest.raises(InterruptedError):
            trainer_for(
                build("llama"), tokens, quick(), Watch(3, progress=False), batch=BatchSettings(2, 1),
                learning_rate=1e-3, folder="unused", dtype=dtype,
            )  # fmt: skip
        assert seen["fp16"] is fp16
    assert seen["learning_rate"] == 1e-3
    with autocast(torch.device("cpu"), None):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learning_rate": "Grid"}, "learning_rate must be a number above 0 or 'grid', got 'Grid'"),
        ({"learning_rate": True}, "learning_rate"),
        ({"learning_rates": ()}, "learning_rates must be one or more different numbers above 0"),
        ({"learning_rates": (1e-3, 0)}, "learning_rates"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates"),
        ({"learning_rates": "1e-3"}, "learning_rates"),
        ({"learning_rates": 1e-3}, "learning_rates"),
        ({"grid_steps": 0}, "grid_steps must be an integer of at least 1"),
        ({"guard_every": 0}, "guard_every must be an integer of at least 1 or None, got 0"),
        ({"guard_every": True}, "guard_every"),
        ({"resume": 1.5}, "resume must be"),
        ({"resume": "yes"}, "resume must be True, False or 'auto', got 'yes'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be True or False"),
        (
            {"save_total_limit": 0, "output_dir": "x"},
            "save_total_limit must be an integer of at least 1 or None, got 0",
        ),
        ({"report_to": ("wandb", "tensorboard")}, "report_to=tensorboard needs output_dir: its files lie there"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"distillation_weight": 0}, r"distillation_weight must be a number in \(0, 1\]"),
        ({"distillation_weight": 1.5}, "distillation_weight"),
    ],
)
def test_wrong_options_are_refused(changes, match, quick):
    with pytest.raises(ValueError, match=match):
        quick(**changes)


def test_what_logs_elsewhere_needs_no_output_folder(quick, tmp_path):
    assert quick(report_to=("wandb",)).report_to == ("wandb",)
    assert quick(report_to=["tensorboard"], output_dir=tmp_path).report_to == ("tensorboard",)


def test_cycles_refuse_what_is_for_one_retraining(monkeypatch):
    with pytest.raises(ValueError, match=r"retraining.merge must be True, got False"):
        CyclesConfig(retraining=PERPConfig(merge=False))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="freezing must be None with 2 processes"):
        CyclesConfig(freezing=GradualFreezing())
