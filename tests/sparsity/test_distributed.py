"""Two processes by torchrun on gloo: on both of them the masks of one process, and one that writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from trisparse.sparsity.checkpoint import load, read_info
from trisparse.sparsity.distributed import ALONE, Processes, launched_processes, own_device, running_processes
from trisparse.sparsity.mask import masks_sha256
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets

TOKENS = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes have pruned, what each one found, and what they printed."""
    spec = importlib.util.spec_from_file_location("conftest_of_sparsity", Path(__file__).with_name("conftest.py"))
    models_of_tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models_of_tests)
    folder = tmp_path_factory.mktemp("launched")
    models_of_tests.make_model("llama").save_pretrained(folder / "llama")
    words = [f"w{i}" for i in range(96)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "llama")
    (folder / "text.txt").write_text(" ".join(words[i * i % 96] for i in range(6000)))
    torch.save(TOKENS, folder / "tokens.pt")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)], done.stdout


def test_both_processes_have_the_masks_of_one(launched, model_named):
    _, (first, second), _ = launched
    assert first == second
    batches = [{"input_ids": part} for part in TOKENS.split(2)]
    for name in ("llama", "mixtral"):
        model = model_named(name)
        report = sparsify(model, "50%", "wanda", batches, progress=False)
        assert first[name] == [masks_sha256(model), report.samples, [row.note for row in report.targets]]
    model = model_named("llama")
    include = ["lm_head", "*.up_proj"]
    sparsify(model, "50% layer", "wanda", batches, include=include, propagate="dense", progress=False)
    assert first["outside"] == masks_sha256(model)


def test_owl_runs_each_batch_once(launched, model_named):
    _, (first, _), _ = launched
    batches = [{"input_ids": part} for part in TOKENS.split(2)]
    model = model_named("llama")
    sparsify(model, "50%", "magnitude", [*batches, batches[0]], allocation="owl", progress=False)
    assert first["owl"] == [masks_sha256(model), 2]


def test_updates_are_those_of_one_up_to_rounding(launched, model_named):
    folder, (first, _), _ = launched
    model = model_named("llama")
    sparsify(model, "2:4", "sparsegpt", [{"input_ids": part} for part in TOKENS.split(2)], progress=False)
    assert first["llama updated"] == masks_sha256(model)
    found = torch.load(folder / "llama-updated-0.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


def test_processes_agree_on_updates_of_experts(launched):
    folder, _, _ = launched  # each process saw the tokens of some experts alone
    ranks = [torch.load(folder / f"mixtral-updated-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[1][key], value) for key, value in ranks[0].items())


def test_streaming_writes_what_one_process_writes(launched, model_named):
    folder, (first, _), _ = launched
    model = model_named("llama")
    report = sparsify(model, "50%", "wanda", [{"input_ids": part} for part in TOKENS.split(2)], progress=False)
    for mode in ("memory", "disk"):
        found = load(folder / f"streamed-{mode}")
        assert masks_sha256(found) == masks_sha256(model)
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
        assert first[mode] == [[row.name, row.kept] for row in report.targets]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_shared_is_refused_on_all(launched):
    _, (first, second), _ = launched
    assert first["refused"] == second["refused"]
    for found, expected in zip(
        first["refused"],
        ("which processes cannot share", "do not measure gradients", "1 micro-batches for 2 processes",
         "the calibration data differ between the processes", "is not a trisparse checkpoint"),
        strict=True,
    ):  # fmt: skip
        assert expected in found


def test_the_command_prints_and_writes_once(launched):
    folder, _, printed = launched
    decoder, found = json.JSONDecoder(), []
    while printed := printed.strip():
        content, end = decoder.raw_decode(printed)
        found.append(content["out"])
        printed = printed[end:]
    assert found == [str(folder / "stream"), str(folder / "plain")]
    assert read_info(folder / "stream")["masks_sha256"] == read_info(folder / "plain")["masks_sha256"]


def test_sums_do_not_depend_on_who_saw_what(monkeypatch):
    """Two shares, added up, are to the bit what one process has; a layer that one of them never saw, too."""
    layers = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(5, 2)])
    targets = find_targets(layers).found
    inputs = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def measured(share):
        statistics = InputStatistics(targets)
        with torch.no_grad(), statistics.observing():
            for index in share:
                with statistics.call():
                    layers[0](inputs[index])
                    if index == 3:
                        layers[1](inputs[index])
        return statistics

    alone = measured([0, 1, 2, 3])
    sent = []
    monkeypatch.setattr(Processes, "add_up", lambda self, tensor: sent.append(tensor))
    second = measured([1, 3])
    second.add_up(Processes(1, 2))
    monkeypatch.setattr(Processes, "add_up", lambda self, tensor: tensor.add_(sent[0]))
    first = measured([0, 2])
    first.add_up(Processes(0, 2))
    for target in targets[:2]:
        assert torch.equal(first.rms(target), alone.rms(target))
    assert first.rms(targets[2]) is None


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with launched_processes() as processes:
        assert processes is ALONE
    assert processes.from_first(lambda: 3) == 3
    processes.check_equal("nothing", 1)
    with pytest.raises(ValueError, match="needs a process group"):
        running_processes()
    if not torch.cuda.is_available():
        assert own_device() == torch.device("cpu")
