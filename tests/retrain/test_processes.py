"""Two processes by torchrun on gloo: the losses of one process, the same weights on both, one that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trisparse.retrain.processes import is_main_process, local_device, process_count
from trisparse.retrain.run_folder import checkpoints
from trisparse.sparsity.checkpoint import load, read_info, save
from trisparse.sparsity.mask import check_masks, masks_sha256

STEPS = {"steps": 6, "gradient_accumulation": 2}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, request):
    """The folder in which two processes have retrained, and what they printed."""
    folder = tmp_path_factory.mktemp("launched")
    build = request.getfixturevalue("build_model")
    tokens = torch.randint(0, 48, (24, 16), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    words = [f"w{i}" for i in range(48)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(build("opt"), folder / "pruned", tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer), recipe=[])
    (folder / "text.txt").write_text(" ".join(words[i * i % 48] for i in range(2000)))
    (folder / "retrain.yaml").write_text("steps: 2\nseq_len: 16\nrank: 4\nbatch_size: 2\nlearning_rate: 1e-2\n")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, tokens, done


@pytest.fixture(scope="module")
def reports(launched):
    folder = launched[0]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_losses_are_those_of_one_process_with_the_same_global_batch(launched, reports, build, run):
    _, tokens, _ = launched
    model = build("opt")
    one = run(model, tokens, batch_size=4, **STEPS)
    for found in reports:
        assert found["report"]["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert found["report"]["batch"] == [2, 2, 2]
        assert found["report"]["tokens"] == one.tokens == 6 * 8 * 16
    assert one.losses[-1] < one.losses[0]
    full = run(build("opt"), tokens, batch_size=4, groups="full", learning_rate=1e-3, **STEPS)
    assert reports[0]["full"] == reports[1]["full"] == pytest.approx(full.losses, rel=1e-5)
    both = torch.load(launched[0] / "rank-0.pt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_every_process_ends_with_the_same_weights_under_the_same_masks(launched, reports, build):
    folder, *_ = launched
    first, second = (torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {found["masks"] for found in reports} == {masks_sha256(build("opt"))}
    assert [found["report"]["validation_loss"] for found in reports] == [reports[0]["report"]["validation_loss"]] * 2
    assert [found["grid"] for found in reports] == [1e-2, 1e-2]


def test_processes_that_came_with_other_data_are_refused(reports):
    for report in reports:
        assert report["differ"] == "the processes differ in data: each must come with the same arguments"


def test_one_process_writes_and_prints(launched):
    folder, _, done = launched
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["checkpoint-3", "checkpoint-6"]
    assert len(list((folder / "checkpoints" / "checkpoint-6").glob("rng_state*"))) == 2
    printed = json.loads(done.stdout)  # one report, not two
    assert printed["batch"] == [2, 4, 2]
    check_masks(load(folder / "retrained"))
    assert [step["step"] for step in read_info(folder / "retrained")["recipe"]] == ["retrain"]


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE"])
def test_a_size_that_a_scheduler_set_is_one_process(build, tokens, run, monkeypatch, variable):
    for name in ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    wanted = run(build("llama"), tokens).losses
    monkeypatch.setenv(variable, "4")
    report = run(build("llama"), tokens)
    assert report.losses == wanted
    assert report.batch == (2, 1, 1)
    assert os.environ[variable] == "4"


def test_a_launcher_is_known_by_its_local_rank(monkeypatch):
    for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert (process_count(), is_main_process()) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a scheduler sets it
    assert (process_count(), is_main_process()) == (1, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert (process_count(), is_main_process()) == (4, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
