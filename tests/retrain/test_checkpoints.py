"""What a checkpoint holds, which of them stay, and what must be the same for a run to go on from one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from trisparse.retrain import run_folder
from trisparse.retrain.perp import retrain
from trisparse.retrain.run_folder import RUN_FILE, TRAINED_FILE, checkpoints, weights_sha256
from trisparse.sparsity.compression import compress
from trisparse.sparsity.linear import SparseLinear

STEPS = {"steps": 4, "save_steps": 2}


def steps_of(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, lambda report: sum(report.trainable.values())),
        ({"merge": False}, lambda report: sum(report.trainable.values())),
        ({"groups": "full", "learning_rate": 1e-3}, lambda report: report.total_parameters),
    ],
    ids=["perp", "adapters", "full"],
)
def test_a_checkpoint_holds_only_what_trains(build, tokens, tmp_path, run, changes, trained):
    report = run(build("opt").bfloat16(), tokens, output_dir=tmp_path, **STEPS, dtype="bf16", **changes)
    folder = tmp_path / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {
        TRAINED_FILE, RUN_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    held = load_file(folder / TRAINED_FILE)
    assert sum(tensor.numel() for tensor in held.values()) == trained(report)
    assert not any("base_layer.weight" in name for name in held)
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == trained(report)


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4, 5]), (1, [5]), (3, [3, 4, 5])])
def test_the_last_checkpoints_of_the_run_stay(build, tokens, tmp_path, run, limit, kept):
    run(build("llama"), tokens, output_dir=tmp_path, steps=5, save_steps=1, save_total_limit=limit)
    assert steps_of(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_two_stay_by_default_and_those_of_other_runs_do_not_count(build, tokens, tmp_path, run):
    run(build("llama"), tokens, output_dir=tmp_path, steps=2, save_steps=1, seed=1)
    other = (tmp_path / "checkpoint-1" / RUN_FILE).read_text()
    run(build("llama"), tokens, output_dir=tmp_path, steps=12, save_steps=3)
    assert steps_of(tmp_path) == [1, 2, 9, 12]
    assert (tmp_path / "checkpoint-1" / RUN_FILE).read_text() == other


def test_an_old_checkpoint_goes_only_when_the_new_one_is_complete(build, tokens, tmp_path, quick):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # before MarkComplete, which comes last
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, config = build("llama"), {"output_dir": tmp_path, "steps": 4, "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        retrain(model, tokens, quick(**config), progress=False, callbacks=[Stop()])
    assert steps_of(tmp_path) == [2]
    assert (tmp_path / "checkpoint-3" / TRAINED_FILE).exists()
    assert retrain(model, tokens, quick(**config, resume=True), progress=False).resumed_at == 2
    assert steps_of(tmp_path) == [4]


def test_another_teacher_is_another_run(build, tokens, tmp_path, quick):
    def retrained(teacher, **changes):
        config = quick(output_dir=tmp_path, **STEPS, **changes)
        return retrain(build("llama"), tokens, config, teacher=teacher, progress=False)

    retrained(build("qwen3"))
    assert retrained(build("qwen3"), resume=True).resumed_at == 4
    other = build("qwen3")
    other.lm_head.weight.data.mul_(2)
    for teacher in (other, build("opt"), None):
        with pytest.raises(ValueError, match=r"another run, resume needs the same: teacher$"):
            retrained(teacher, resume=True)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_other_compressed_weights_are_another_run(build, tokens, tmp_path, run, prefer):
    def compressed():
        model = build("llama")
        compress(model, prefer=prefer)
        return model

    run(compressed(), tokens, output_dir=tmp_path, **STEPS)
    assert run(compressed(), tokens, output_dir=tmp_path, resume=True, **STEPS).resumed_at == 4
    model = compressed()
    layer = next(module for module in model.modules() if isinstance(module, SparseLinear))
    layer.set_weight(2 * layer.weight)
    with pytest.raises(ValueError, match=r"another run, resume needs the same: weights$"):
        run(model, tokens, output_dir=tmp_path, resume=True, **STEPS)


def test_auto_is_the_dtype_that_it_was_on_the_machine_of_the_run(build, tokens, tmp_path, run, monkeypatch):
    options = {"output_dir": tmp_path, "dtype": "auto", **STEPS}
    monkeypatch.setattr("trisparse.retrain.precision.bf16_is_fast", lambda device: False)
    run(build("llama"), tokens, **options)
    assert json.loads((tmp_path / "checkpoint-4" / RUN_FILE).read_text())["identity"]["dtype"] == "fp32"
    assert run(build("llama"), tokens, **options | {"dtype": "fp32"}, resume=True).resumed_at == 4
    monkeypatch.setattr("trisparse.retrain.precision.bf16_is_fast", lambda device: True)
    with pytest.raises(ValueError, match=r"dtype \(was 'fp32', is 'bf16'\)"):
        run(build("llama"), tokens, **options, resume=True)


def test_what_may_differ_are_settings(quick):
    assert set(run_folder._FREE) < set(vars(quick()))


@pytest.mark.parametrize("shape", [(128, 128), (64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_counts_in_the_hash_of_the_weights(shape, dtype, monkeypatch):
    monkeypatch.setattr(run_folder, "_HASHED_AT_ONCE", 1000)  # no multiple of a row
    model = nn.Linear(shape[1], shape[0], dtype=dtype)
    before, weight = weights_sha256(model), model.weight.detach().clone()
    found = {before}
    for part in ((slice(None), slice(1, None)), (slice(None), slice(0, 1)), (shape[0] // 2, 5), (-1, -1)):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.weight[part] += 1
        found.add(weights_sha256(model))
    assert len(found) == 5
    with torch.no_grad():
        model.weight.copy_(weight)
    assert weights_sha256(model) == before
    model.weight = nn.Parameter(weight.t().contiguous().t())  # the layout in memory does not count
    assert weights_sha256(model) == before


def test_the_values_of_compressed_layers_count_in_the_hash(build):
    model = build("llama")
    compress(model)
    before = weights_sha256(model)
    layer = next(module for module in model.modules() if isinstance(module, SparseLinear))
    last = layer.weight.flatten().nonzero()[-1]
    layer.set_weight(layer.weight.flatten().index_add(0, last, torch.ones(1)).view_as(layer.weight))
    assert weights_sha256(model) != before
