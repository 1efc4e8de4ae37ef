"""Cycles that were killed go on with the cycle that they were in, and end where the unbroken run ends."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trisparse.retrain import cycles as cycles_module
from trisparse.retrain.cycles import CyclesConfig, prune_cycles
from trisparse.retrain.cycles_journal import FINISHED, JOURNAL
from trisparse.retrain.freezing import FreezingCallback, GradualFreezing
from trisparse.retrain.perp import PERPConfig
from trisparse.retrain.run_folder import TRAINED_FILE, checkpoints
from trisparse.sparsity.mask import check_masks, detach, masks_sha256

KILLED = """
import os, sys, torch
sys.path.insert(0, {folder!r})
import conftest, test_cycles_journal
from trisparse.retrain import loop, run

real = run.trainer_for
def trainer_for(model, windows, config, *args, **options):
    trainer = real(model, windows, config, *args, **options)
    class Kill(loop.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if config.seed == 1 and state.global_step == 3:
                os.kill(os.getpid(), 9)
    trainer.add_callback(Kill())
    return trainer
run.trainer_for = trainer_for
torch.set_num_threads(1)
test_cycles_journal.cycles(test_cycles_journal.dense(conftest._build), torch.load({tokens!r}), {out!r})
"""


def dense(build, kind="llama-tied"):
    """A dense model whose head is tied until the first cycle merges its LoRA."""
    model = copy.deepcopy(build(kind))
    for module in model.modules():
        detach(module)
    torch.manual_seed(3)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2) if param.ndim > 1 else None
    return model


def cycles(model, tokens, folder, target="70%", resume=False, **changes):
    """Three cycles of four steps, with a checkpoint after every two."""
    own = {"rank": 4, "learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation": 1, "seq_len": 16}
    own |= {"dtype": "fp32", "steps": 4, "save_steps": 2, "output_dir": folder, "resume": resume}
    validation = changes.pop("validation", tokens[:4])
    retraining = PERPConfig(**own | changes.pop("retraining", {}))
    config = CyclesConfig(cycles=3, retraining=retraining, method="wanda", **changes)
    return prune_cycles(model, target, tokens, config, validation=validation, progress=False)


def results(report):
    """What the cycles reported, but for the times."""
    left = ("pruning_seconds", "retraining_seconds")
    rows = [{k: v for k, v in row.items() if k not in left} for row in report.to_dict()["cycles"]]
    return rows, report.perplexity_before, report.method


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    equal = all(name == name2 and torch.equal(a, b) for (name, a), (name2, b) in pairs)
    return equal and masks_sha256(model) == masks_sha256(other)


@pytest.fixture(scope="module")
def unbroken(build_model, tmp_path_factory):
    """A model after three whole cycles, their report and their folder."""
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("unbroken"), dense(build_model)
    tokens = torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(1))
    return model, cycles(model, tokens, folder), folder


def interrupted(monkeypatch, name, instead, *args, **options):
    """Run ``cycles`` with ``instead`` in the place of what cycles.py calls ``name``, until it interrupts."""
    with monkeypatch.context() as patch:
        patch.setattr(cycles_module, name, instead)
        with pytest.raises(KeyboardInterrupt):
            cycles(*args, **options)


def test_killed_cycles_resume_to_the_same_bits(build, tokens, tmp_path, unbroken):
    torch.save(tokens, tmp_path / "tokens.pt")
    folder = tmp_path / "cut"
    where = {"folder": str(Path(__file__).parent), "tokens": str(tmp_path / "tokens.pt"), "out": str(folder)}
    code = KILLED.format(**where)
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(json.loads((folder / JOURNAL).read_text())["cycles"]) == 1
    first = folder / "cycle-2" / "checkpoint-2" / TRAINED_FILE
    written = first.stat().st_mtime_ns
    assert not (folder / "cycle-2" / "checkpoint-4").exists()
    model = dense(build)
    report = cycles(model, tokens, folder, resume=True)
    assert same(model, unbroken[0])
    assert results(report) == results(unbroken[1])
    check_masks(model)
    assert model.config.tie_word_embeddings is False
    assert [path.parent.name for path in folder.glob(f"*/{FINISHED}")] == ["cycle-3"]
    assert first.stat().st_mtime_ns == written  # the second cycle went on from there


@pytest.mark.parametrize("cycle", [1, 3])
@pytest.mark.parametrize("moment", ["sparsify", "retrain"])
def test_a_failure_in_any_cycle_resumes(build, tokens, tmp_path, unbroken, monkeypatch, cycle, moment):
    real, calls = getattr(cycles_module, moment), []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == cycle:
            raise KeyboardInterrupt
        return real(*args, **options)

    interrupted(monkeypatch, moment, fails, dense(build), tokens, tmp_path / "cut")
    model = dense(build)
    report = cycles(model, tokens, tmp_path / "cut", resume=True)
    assert same(model, unbroken[0])
    assert results(report) == results(unbroken[1])


def test_auto_starts_where_nothing_has_begun_and_goes_on_afterwards(build, tokens, tmp_path, unbroken, monkeypatch):
    folder, model = tmp_path / "cut", dense(build)
    real, cut = cycles_module.retrain, []

    def fails(model, windows, config, **options):
        if config.seed == 1 and not cut:
            cut.append(1)
            raise KeyboardInterrupt
        return real(model, windows, config, **options)

    interrupted(monkeypatch, "retrain", fails, dense(build), tokens, folder, resume="auto")
    assert len(json.loads((folder / JOURNAL).read_text())["cycles"]) == 1
    assert results(cycles(model, tokens, folder, resume="auto")) == results(unbroken[1])
    assert same(model, unbroken[0])


def test_freezing_resumes_in_the_middle_of_a_cycle(build, tokens, tmp_path, monkeypatch):
    changes = {"freezing": GradualFreezing(stages=4), "retraining": {"groups": ("norms", "lora")}}
    whole, model = dense(build), dense(build)
    report = cycles(whole, tokens, tmp_path / "whole", **changes)

    class Interrupts(FreezingCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.seed == 2 and state.global_step == 3:
                raise KeyboardInterrupt

    interrupted(monkeypatch, "FreezingCallback", Interrupts, dense(build), tokens, tmp_path / "cut", **changes)
    assert [path.name for path in checkpoints(tmp_path / "cut" / "cycle-3")] == ["checkpoint-2"]
    assert results(cycles(model, tokens, tmp_path / "cut", resume=True, **changes)) == results(report)
    assert same(model, whole)


def test_finished_cycles_resume_to_themselves(build, tokens, unbroken, monkeypatch):
    monkeypatch.setattr(cycles_module, "retrain", None)  # nothing is left to do
    model = dense(build)
    report = cycles(model, tokens, unbroken[2], resume=True)
    assert same(model, unbroken[0])
    assert results(report) == results(unbroken[1])


def test_cycles_that_start_anew_leave_nothing_of_an_earlier_run(build, tokens, tmp_path, unbroken, monkeypatch):
    folder = Path(shutil.copytree(unbroken[2], tmp_path / "again"))

    def fails(*args, **options):
        raise KeyboardInterrupt

    interrupted(monkeypatch, "retrain", fails, dense(build), tokens, folder, target="60%")
    assert json.loads((folder / JOURNAL).read_text())["cycles"] == []
    assert not any(checkpoints(folder / f"cycle-{number}") for number in (1, 2, 3))
    assert not list(folder.glob(f"*/{FINISHED}"))


def test_only_the_same_run_resumes(build, tokens, tmp_path, unbroken):
    folder = unbroken[2]

    def refused(match, model=None, data=tokens, **changes):
        model = dense(build) if model is None else model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            cycles(model, data, changes.pop("folder", folder), resume=True, **changes)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.config.tie_word_embeddings

    refused("holds no cycles.json: leave resume out to start anew", folder=tmp_path / "empty")
    refused(r"cycles.json is of another run, resume needs the same: target$", target="60%")
    refused(r"needs the same: learning_rate, rank$", retraining={"learning_rate": 1e-3, "rank": 2})
    refused(r"needs the same: schedule$", schedule="linear")
    refused(r"needs the same: data$", data=tokens.flip(0, 1), validation=tokens[:4])
    refused(r"needs the same: validation$", validation=tokens[1:5])
    refused(r"needs the same: validation$", validation=None)
    other = dense(build)
    other.model.norm.weight.data.mul_(2)
    refused(r"needs the same: weights$", model=other)
