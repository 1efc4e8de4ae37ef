"""Processes that ``accelerate launch`` starts, on gloo: two have the losses of one, and one of them saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trisparse.retrain.run_folder import checkpoints
from trisparse.sparsity.checkpoint import load
from trisparse.sparsity.mask import check_masks, masks_sha256


def launch(script, folder, *options):
    """Run a script with ``accelerate launch``; what its processes print."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_as_one_and_one_saves(build, run, tmp_path):
    tokens = torch.randint(0, 48, (16, 16), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    script = Path(__file__).with_name("launched.py")
    launch(script, tmp_path, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    one = run(build("opt"), tokens, steps=4, batch_size=4)
    assert [report["batch"] for report in reports] == [[2, 1, 2]] * 2
    for report in reports:
        assert report["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert report["masks"] == masks_sha256(build("opt"))
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # the processes have folders of their own here, so that a second writer would show
    assert [path.name for path in checkpoints(tmp_path / "run-of-0")] == ["checkpoint-2", "checkpoint-4"]
    assert checkpoints(tmp_path / "run-of-1") == []
    assert not list((tmp_path / "run-of-1").rglob("*.safetensors"))
    assert [path.name for path in tmp_path.glob("saved-by-*")] == ["saved-by-0"]
    saved = load(tmp_path / "saved-by-0")
    check_masks(saved)
    assert all(torch.equal(value, first[name]) for name, value in saved.state_dict().items())


def test_cpu_alone_starts_one_process(tmp_path):
    """accelerate starts several on the CPU through MPI only, whatever --num_processes says."""
    script = tmp_path / "script.py"
    script.write_text("import os; print('LOCAL_RANK' in os.environ)")
    assert launch(script, tmp_path, "--cpu", "--num_processes", "2") == "False\n"
