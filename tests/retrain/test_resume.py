"""A run that was killed goes on from its last complete checkpoint, and ends where the unbroken run ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trisparse.retrain import loop
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.perp import retrain
from trisparse.retrain.run_folder import RUN_FILE, TRAINED_FILE, checkpoints
from trisparse.sparsity.mask import check_masks

STEPS = {"steps": 8, "save_steps": 2, "save_total_limit": None, "gradient_accumulation": 2}

# dropout, so that the random state matters; more windows than a step takes, so that their order does
KILLED = """
import os, sys, torch
sys.path.insert(0, {folder!r})
import conftest
from transformers import TrainerCallback
from trisparse.retrain.perp import retrain

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), 9)

model = conftest._build("opt-dropout")
tokens = torch.load({tokens!r})
config = conftest._quick(output_dir={out!r}, **{steps!r})
torch.set_num_threads(1)
retrain(model, tokens, config, progress=False, callbacks=[Kill()])
"""


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name2 and torch.equal(a, b) for (name, a), (name2, b) in pairs)


def test_a_killed_run_resumes_to_the_same_bits(build, tokens, tmp_path, run):
    torch.save(tokens, tmp_path / "tokens.pt")
    unbroken = build("opt-dropout")
    whole = run(unbroken, tokens, output_dir=tmp_path / "whole", **STEPS)
    where = {"folder": str(Path(__file__).parent), "tokens": str(tmp_path / "tokens.pt")}
    code = KILLED.format(**where, out=str(tmp_path / "cut"), steps=STEPS)
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-2", "checkpoint-4"]
    resumed = build("opt-dropout")
    report = run(resumed, tokens, output_dir=tmp_path / "cut", resume=True, **STEPS)
    assert same(resumed, unbroken)
    assert report.losses == whole.losses
    assert (report.resumed_at, whole.resumed_at) == (4, 0)
    assert report.tokens == whole.tokens
    assert "after step 4" in str(report)
    assert report.tokens_per_second == pytest.approx(report.tokens / 2 / report.seconds)
    check_masks(resumed)


def test_a_checkpoint_cut_off_while_it_was_written_does_not_count(build, tokens, tmp_path, run):
    unbroken, resumed = build("llama"), build("llama")
    run(unbroken, tokens, output_dir=tmp_path, **STEPS)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    for step in (6, 8):  # as a kill between two of the Trainer's files leaves them
        (tmp_path / f"checkpoint-{step}" / RUN_FILE).unlink()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"half")
    report = run(resumed, tokens, output_dir=tmp_path, resume=True, **STEPS)
    assert report.resumed_at == 4
    assert same(resumed, unbroken)


def test_a_checkpoint_written_halfway_over_another_does_not_count(build, tokens, tmp_path, run, monkeypatch):
    run(build("llama"), tokens, output_dir=tmp_path, **STEPS)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(loop, "save_trained", full)
    with pytest.raises(OSError, match="No space left"):
        run(build("llama"), tokens, output_dir=tmp_path, seed=1, **STEPS)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (4, 6, 8)]


def test_a_finished_run_resumes_to_itself(build, tokens, tmp_path, run):
    first, again = build("llama"), build("llama")
    whole = run(first, tokens, output_dir=tmp_path, **STEPS)
    report = run(again, tokens, output_dir=tmp_path, resume=True, **STEPS)
    assert same(first, again)
    assert report.losses == whole.losses
    assert (report.resumed_at, report.tokens_per_second) == (8, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": "full", "learning_rate": 1e-3},
        {"variant": "scale_lora"},
        {"variant": "lora", "groups": ("norms", "lora"), "merge": False},
    ],
)
def test_every_kind_of_training_resumes(build, tokens, tmp_path, run, changes):
    unbroken, resumed = build("opt-dropout"), build("opt-dropout")
    whole = run(unbroken, tokens, output_dir=tmp_path, **STEPS, **changes)
    shutil.rmtree(tmp_path / "checkpoint-8")
    report = run(resumed, tokens, output_dir=tmp_path, resume=True, **STEPS, **changes)
    assert report.resumed_at == 6
    assert report.losses == whole.losses
    assert same(resumed, unbroken)
    check_masks(resumed)


def test_an_output_folder_alone_has_a_checkpoint_every_tenth_and_at_the_end(build, tokens, tmp_path, run):
    run(build("llama"), tokens, output_dir=tmp_path, steps=11, save_total_limit=None)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 10, 11)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 9}, r"another run.*steps \(was 8, is 9\)"),
        ({"learning_rate": 1e-3}, r"learning_rate \(was 0.01, is 0.001\)"),
        ({"seed": 1}, "data, seed"),
        ({"guard_every": 1, "save_steps": 3}, None),
    ],
)
def test_only_the_same_run_goes_on(build, tokens, tmp_path, run, snapshot, assert_same, changes, match):
    run(build("llama"), tokens, output_dir=tmp_path, **STEPS)
    model = build("llama")
    before = snapshot(model)
    options = {**STEPS, "output_dir": tmp_path, "resume": True, **changes}
    if match is None:
        assert run(model, tokens, **options).resumed_at == 8
        return
    with pytest.raises(ValueError, match=match):
        run(model, tokens, **options)
    assert_same(model, before)


def test_other_masks_and_other_data_are_another_run(build, tokens, tmp_path, run):
    run(build("llama"), tokens, output_dir=tmp_path, **STEPS)
    with pytest.raises(ValueError, match=r"another run, resume needs the same: masks, weights$"):
        run(build("opt"), tokens, output_dir=tmp_path, resume=True, **STEPS)
    with pytest.raises(ValueError, match=r"needs the same: weights$"):
        run(build("qwen3"), tokens, output_dir=tmp_path, resume=True, **STEPS)
    with pytest.raises(ValueError, match=r"needs the same: data$"):
        run(build("llama"), tokens.flip(1), output_dir=tmp_path, resume=True, **STEPS)


def test_nothing_to_resume_from_is_said(build, tokens, tmp_path, run, quick):
    with pytest.raises(ValueError, match="holds no complete checkpoint: leave resume out"):
        run(build("llama"), tokens, output_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume=True needs output_dir"):
        quick(resume=True)


def test_auto_starts_anew_where_there_is_nothing_yet_and_goes_on_where_there_is(build, tokens, tmp_path, run, quick):
    (tmp_path / "checkpoint-2").mkdir()  # cut off while it was written
    first, again, other = build("llama"), build("llama"), build("llama")
    assert run(first, tokens, output_dir=tmp_path, resume="auto", **STEPS).resumed_at == 0
    assert run(again, tokens, output_dir=tmp_path, resume="auto", **STEPS).resumed_at == 8
    assert same(again, first)
    with pytest.raises(ValueError, match=r"another run, resume needs the same: data, seed"):
        run(other, tokens, output_dir=tmp_path, resume="auto", seed=1, **STEPS)
    with pytest.raises(ValueError, match="resume='auto' needs output_dir"):
        quick(resume="auto")


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_a_checkpoint_with_other_parameters_is_refused(build, tokens, tmp_path, run, snapshot, assert_same, spoil):
    run(build("llama"), tokens, output_dir=tmp_path, **STEPS)
    file = tmp_path / "checkpoint-8" / TRAINED_FILE
    trained = load_file(file)
    name = min(trained)
    if spoil == "missing":
        del trained[name]
    else:
        trained[name] = torch.zeros(3)
    save_file(trained, file)
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not fit the parameters that train"):
        run(model, tokens, output_dir=tmp_path, resume=True, **STEPS)
    assert_same(model, before)


def nan_at(step, per_step=2):
    """A forward hook that makes the loss of ``step`` NaN."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) > (step - 1) * per_step:
            output.loss = output.loss * float("nan")

    return hook


@pytest.mark.parametrize(
    ("step", "kept"), [(4, "the last good checkpoint is .*checkpoint-2$"), (2, "no checkpoint was")]
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(build, tokens, tmp_path, run, step, kept):
    model, unbroken = build("llama"), build("llama")
    hook = model.register_forward_hook(nan_at(step))
    with pytest.raises(RetrainError, match=f"loss is nan at step {step} of 8.*{kept}"):
        run(model, tokens, output_dir=tmp_path, **STEPS)
    hook.remove()
    assert len(checkpoints(tmp_path)) == step // 2 - 1
    if step == 4:
        report = run(model, tokens, output_dir=tmp_path, resume=True, **STEPS)
        run(unbroken, tokens, **{**STEPS, "save_steps": None})
        assert report.resumed_at == 2
        assert same(model, unbroken)


def test_broken_parameters_are_never_saved(build, tokens, tmp_path, run, snapshot, assert_same):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    model = build("llama")
    before = snapshot(model)
    config = {"output_dir": tmp_path, "rank": 4, "alpha": 8, "seq_len": 16, "batch_size": 2, **STEPS}
    with pytest.raises(RetrainError, match="not finite after step 4: no checkpoint was written"):
        retrain(model, tokens, loop_config(config), progress=False, callbacks=[Breaks()])
    assert_same(model, before)
    assert not (tmp_path / "checkpoint-4").exists()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def loop_config(options):
    from trisparse.retrain.perp import PERPConfig

    return PERPConfig(dtype="fp32", **options)


def test_the_grid_is_not_tried_again(build, tokens, tmp_path, quick, monkeypatch):
    rates = {"learning_rate": "grid", "learning_rates": (1e-4, 1e-2), "grid_steps": 2}
    config = quick(output_dir=tmp_path, **rates, **STEPS)
    first, again = build("llama"), build("llama")
    whole = retrain(first, tokens, config, validation=tokens, progress=False)
    shutil.rmtree(tmp_path / "checkpoint-8")
    steps = []
    real = loop.Windows.__init__
    monkeypatch.setattr(
        loop.Windows, "__init__", lambda self, w, count, seed: steps.append(count) or real(self, w, count, seed)
    )
    resume = quick(output_dir=tmp_path, resume=True, **rates, **STEPS)
    report = retrain(again, tokens, resume, validation=tokens, progress=False)
    assert steps == [8 * 4]  # one run, of all its steps
    assert (report.learning_rate, report.grid) == (whole.learning_rate, whole.grid)
    assert same(first, again)
    assert json.loads((tmp_path / "checkpoint-8" / RUN_FILE).read_text())["chosen"]["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    "what",
    [{"groups": "full"}, {"variant": "lora_prune"}, {"variant": "scale_lora"}, {"variant": "lora", "merge": False}],
    ids=str,
)
def test_full_retraining_and_every_variant_resume_to_the_same_bits(build, tokens, tmp_path, quick, what):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    unbroken, resumed = build("opt-dropout"), build("opt-dropout")
    retrain(unbroken, tokens, quick(output_dir=tmp_path / "whole", **what, **STEPS), progress=False)
    options = {"output_dir": tmp_path / "cut", **what, **STEPS}
    with pytest.raises(KeyboardInterrupt):
        retrain(resumed, tokens, quick(**options), progress=False, callbacks=[Stop()])
    report = retrain(resumed, tokens, quick(resume=True, **options), progress=False)
    assert report.resumed_at == 4
    assert same(resumed, unbroken)
    check_masks(resumed)


def test_a_grid_that_chose_by_other_data_is_another_run(build, tokens, tmp_path, quick):
    def retrained(validation, **changes):
        config = quick(output_dir=tmp_path, **STEPS, **changes)
        return retrain(build("llama"), tokens, config, validation=validation, progress=False)

    grid = {"learning_rate": "grid", "learning_rates": (1e-4, 1e-2), "grid_steps": 1}
    retrained(tokens[:4], **grid)
    with pytest.raises(ValueError, match=r"another run, resume needs the same: validation$"):
        retrained(tokens[1:5], resume=True, **grid)
    assert retrained(tokens[:4], resume=True, **grid).resumed_at == 8
    shutil.rmtree(tmp_path)
    retrained(tokens[:4])
    assert retrained(None, resume=True).resumed_at == 8  # it is measured, and decides nothing
