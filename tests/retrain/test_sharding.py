"""FSDP2 in two processes by torchrun on gloo: the losses of one process, half the weights on each, whole at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trisparse.retrain.perp import retrain
from trisparse.retrain.run_folder import checkpoints
from trisparse.retrain.sharding import training_device
from trisparse.sparsity.checkpoint import load, read_info, save
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import check_masks, masks_sha256

COMMON = {"steps": 4, "batch_size": 2, "gradient_accumulation": 2, "guard_every": 1, "sharding": "fsdp", "rank": 3}
# what each run is called, the model, and what its config has besides
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "perp": ("llama", {"save_steps": 2}),
    "tied": ("llama-tied", {"gradient_checkpointing": True, "steps": 3}),
    "norms": ("opt", {"groups": ("biases", "norms"), "steps": 2}),
    "full": ("gpt2", {"groups": "full", "learning_rate": 1e-3, "save_steps": 2}),
    "experts": ("mixtral", {"groups": "full", "learning_rate": 1e-3, "steps": 3}),
    "scaled": ("gpt2", {"variant": "scale_lora", "max_grad_norm": 0.0, "steps": 3}),
}

# of the run with a model and a teacher in bf16
HALF: dict[str, Any] = {
    "dtype": "bf16", "learning_rate": "grid", "learning_rates": (1e-4, 1e-2), "steps": 2, "grid_steps": 2,
}  # fmt: skip


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def launch(launcher: tuple[str, ...], folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("sharded_processes.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder), what], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Where the processes read and write."""
    folder = tmp_path_factory.mktemp("sharded")
    build = request.getfixturevalue("build_model")
    torch.save(torch.randint(0, 48, (24, 16), generator=torch.Generator().manual_seed(1)), folder / "tokens.pt")
    words = [f"w{i}" for i in range(48)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(build("opt"), folder / "pruned", tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer), recipe=[])
    (folder / "runs.json").write_text(json.dumps({"common": COMMON, "each": RUNS, "half": HALF}))
    (folder / "text.txt").write_text(" ".join(words[i * i % 48] for i in range(2000)))
    (folder / "retrain.yaml").write_text("steps: 2\nseq_len: 16\nrank: 4\nbatch_size: 2\nlearning_rate: 1e-2\n")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """What two processes printed that have retrained in every way."""
    return launch(TORCHRUN, folder, "all")


@pytest.fixture(scope="module")
def found(folder, done):
    """What each process found."""
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def alike(quick, build, folder):
    """``alike(name)``: the run ``name`` in one process with the same global batch, (report, model)."""
    tokens = torch.load(folder / "tokens.pt")

    def one(name: str):
        kind, changes = RUNS[name]
        model = build(kind)
        options = COMMON | changes | {"batch_size": 4, "sharding": "none", "save_steps": None}
        return retrain(model, tokens, quick(**options), validation=tokens[:2], progress=False), model

    return one


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_of_one_process_with_the_same_global_batch(folder, found, alike, name):
    one, model = alike(name)
    for process in found:
        report = process[name]["report"]
        assert report["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert report["validation_loss"] == pytest.approx(one.validation_loss, rel=1e-5)
        assert (report["batch"], report["tokens"]) == ([2, 2, 2], one.tokens)
        assert (report["trainable"], report["untied_head"]) == (one.trainable, one.untied_head)
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    assert first.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        # a twentieth of a step of AdamW, which divides gradients that are all rounding by their own size
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=5e-4, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_masks_hold_on_every_process_and_the_model_is_the_same_object_again(folder, found, build, name):
    expected = (
        ["parameters", "requires_grad", "dtypes", "config", "ties"] if name in ("tied", "scaled") else []
    )  # the untied head
    model = build(RUNS[name][0])
    for rank, process in enumerate(found):
        assert process[name]["changed"] == expected
        assert process[name]["masks"] == masks_sha256(model)
        model.load_state_dict(torch.load(folder / f"{name}-{rank}.pt"))
        check_masks(model)


@pytest.mark.parametrize("name", RUNS)
def test_each_process_holds_its_part_of_the_weights(found, name):
    first, second = (process[name]["bytes"] for process in found)
    assert len(first) == {**COMMON, **RUNS[name][1]}["steps"]
    for (mine, whole), (theirs, _) in zip(first, second, strict=True):
        assert mine + theirs == whole
        assert theirs <= mine <= 0.53 * whole  # odd numbers of rows: the first process has one more


@pytest.mark.parametrize("name", ["perp", "full"])
def test_a_resumed_run_ends_with_the_same_bits(folder, found, name):
    assert found[0][f"{name}-resumed"] == found[1][f"{name}-resumed"] == found[0][name]["report"]["losses"]
    for rank in (0, 1):
        unbroken, resumed = (torch.load(folder / f"{run}-{rank}.pt") for run in (name, f"{name}-resumed"))
        assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_checkpoints_are_those_of_a_model_that_is_not_sharded(folder, done, alike, run, build, tmp_path):
    assert [path.name for path in checkpoints(folder / "perp")] == ["checkpoint-2", "checkpoint-4"]
    tokens = torch.load(folder / "tokens.pt")
    kind, changes = RUNS["perp"]
    options = COMMON | changes | {"batch_size": 4, "sharding": "none", "output_dir": tmp_path}
    run(build(kind), tokens, **options)
    ours, theirs = folder / "perp" / "checkpoint-4", tmp_path / "checkpoint-4"
    files = (
        {path.name for path in folder.iterdir()} - {f"rng_state_{rank}.pth" for rank in (0, 1)}
        for folder in (ours, theirs)
    )
    assert next(files) == next(files) - {"rng_state.pth"}
    sharded, whole = (load_file(path / "trained.safetensors") for path in (ours, theirs))
    assert sharded.keys() == whole.keys()
    for key, tensor in sharded.items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=1e-4, msg=key)
    sharded, whole = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (ours, theirs))
    assert sharded.keys() == whole.keys()
    for index, moments in whole.items():
        for name, tensor in moments.items():
            torch.testing.assert_close(sharded[index][name], tensor, rtol=1e-2, atol=1e-5, msg=f"{name} of {index}")


def test_a_model_in_bf16_with_a_teacher_and_a_grid(folder, found, quick, build):
    tokens = torch.load(folder / "tokens.pt")
    options = COMMON | HALF | {"batch_size": 4, "sharding": "none"}
    model, teacher = build("llama").bfloat16(), build("opt-dropout").bfloat16()
    one = retrain(model, tokens, quick(**options), validation=tokens, teacher=teacher, progress=False)
    for process in found:
        assert process["half"]["losses"] == pytest.approx(one.losses, rel=2e-3)
        assert process["half"]["grid"] == found[0]["half"]["grid"]
        assert process["half"]["learning_rate"] == one.learning_rate
    first, second = (torch.load(folder / f"half-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}


def test_a_failure_of_all_leaves_the_model_as_it_was(found):
    for process in found:  # the processes have compared the models themselves
        assert process["differ"] == "the processes differ in data: each must come with the same arguments"
        assert process["failed"] == process["failed full"] == "as asked"
        assert process["infinite"].startswith("loss is nan at step 2 of 4")


def test_accelerate_launch_shards_and_a_process_that_fails_alone_says_what_is_lost(folder):
    launch(ACCELERATE, folder, "alone")
    failed = (folder / "alone-1.txt").read_text()
    assert failed.startswith("as asked\n")
    for rank in (0, 1):
        assert "processes that do not answer: load the model anew" in (folder / f"alone-{rank}.txt").read_text()


def test_one_process_writes_and_prints(folder, done):
    printed = json.loads(done.stdout)  # one report, not two
    assert printed["batch"] == [2, 4, 2]
    check_masks(load(folder / "retrained"))
    assert [(step["step"], step["sharding"]) for step in read_info(folder / "retrained")["recipe"]] == [
        ("retrain", "fsdp")
    ]


@pytest.mark.parametrize(
    ("environment", "sharding", "match"),
    [
        ({}, "fsdp", "several processes, and this is one"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "none", "DeepSpeed .* is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "none", "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp", "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "none", "offloading"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, "none", "several processes, and this is one"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(
    build, tokens, run, snapshot, assert_same, monkeypatch, environment, sharding, match
):
    for variable in ("LOCAL_RANK", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        run(model, tokens, sharding=sharding)
    assert_same(model, before)


def two(monkeypatch):
    """As if torchrun had started two processes; what is refused is so before they talk."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_models_that_cannot_be_sharded_are_refused(build, tokens, run, monkeypatch):
    two(monkeypatch)
    with pytest.raises(ValueError, match="sharding must be one of none, fsdp, got 'zero'"):
        run(build("llama"), tokens, sharding="zero")
    model = build("llama")
    compress(model)
    with pytest.raises(ValueError, match="compressed layers hold buffers: decompress"):
        run(model, tokens, sharding="fsdp")
    with pytest.raises(ValueError, match=r"dtype='fp16' .*take 'bf16'"):
        run(build("llama"), tokens, sharding="fsdp", dtype="fp16")
    model = build("llama")
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="by rows, and scale has no dimension"):
        run(model, tokens, sharding="fsdp")
    for other in (1, None):  # in two blocks, or in one and outside
        model = build("llama")
        shared = model.model.layers[0].mlp.up_proj
        owner = model if other is None else model.model.layers[other].mlp
        owner.up_proj = shared
        with pytest.raises(ValueError, match=r"up_proj\.weight is shared among blocks"):
            run(model, tokens, sharding="fsdp")


def test_a_model_on_the_cpu_trains_on_the_gpu_of_its_process(build, monkeypatch):
    two(monkeypatch)
    model = build("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device(model) == torch.device("cuda", 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_device(model) == torch.device("cpu")
