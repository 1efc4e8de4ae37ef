"""The forms of the command retrain for language models: cycles and reconstruction."""

import dataclasses
import json
import math

import pytest
import torch
import yaml

from trisparse.cli import retrain_reconstruct
from trisparse.cli.config_file import read_settings, read_yaml, section_of, value_of
from trisparse.cli.retrain_cycles import section
from trisparse.cli.retrain_job import Job
from trisparse.retrain import cycles, plans
from trisparse.retrain.cycles import CyclesConfig, LayerCollapseError, prune_cycles
from trisparse.retrain.perp import PERPConfig
from trisparse.retrain.plans import cycles_plan, reconstruction_plan
from trisparse.retrain.reconstruct import ReconstructConfig
from trisparse.sparsity.checkpoint import load, read_info
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.pattern import Rows


@pytest.fixture(scope="module")
def invoke(trisparse_command):
    return lambda *args: trisparse_command("retrain", *args)


CYCLES = """
form: cycles
sparsity: 60%
cycles: 2
schedule: linear
method: wanda
samples: 4
retraining: {groups: "norms,lora", steps: 4, seq_len: 32, rank: 2, learning_rate: 1e-2, batch_size: 2}
freezing: {mode: unfreeze, start: input, stages: 2}
"""


def test_cycles_by_a_file(tiny_llama, invoke, tmp_path):
    file = tmp_path / "cycles.yaml"
    text = tiny_llama / "text.txt"
    file.write_text(f"{CYCLES}\ndata: {text}\ncalibration: {text}\nvalidation: {text}\nvalidation_windows: 4\n")
    options = ["--steps", 2, "--freezing-start", "output", "--out", tmp_path / "r", "--json"]
    out = json.loads(invoke(tiny_llama / "dense", "--config", file, *options))
    assert [cycle["pattern"] for cycle in out["cycles"]] == ["30%", "60%"]
    assert out["method"] == "wanda"
    assert out["perplexity"] < out["cycles"][-1]["perplexity_pruned"]
    model = load(tmp_path / "r")
    check_masks(model)
    assert len(masks(model)) == 14
    assert all(abs(mask.sparsity - 0.6) < 0.02 for mask in masks(model).values())
    (step,) = read_info(tmp_path / "r")["recipe"]
    assert (step["step"], step["method"], step["patterns"]) == ("cycles", "wanda", ["30%", "60%"])
    assert (step["retraining"]["steps"], step["retraining"]["groups"]) == (2, ["norms", "lora"])
    assert step["freezing"] == {"mode": "unfreeze", "start": "output", "stages": 2}


def test_cycles_by_options(tiny_llama, invoke, tmp_path):
    options = ["--form", "cycles", "--sparsity", "2:4", "--cycles", 2, "--schedule", "linear", "--groups", "only:norms"]
    short = ["--steps", 1, "--seq-len", 16, "--data", tiny_llama / "text.txt", "--out", tmp_path / "r"]
    shown = invoke(tiny_llama / "dense", *options, *short, "--include", "*q_proj*,*k_proj*", "--exclude", "*.0.*")
    assert "magnitude 2:4, linear schedule" in shown
    assert f"saved to {tmp_path / 'r'}" in shown
    found = masks(load(tmp_path / "r"))
    assert sorted(found) == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "kq"]
    assert {str(mask.pattern) for mask in found.values()} == {"2:4"}
    (step,) = read_info(tmp_path / "r")["recipe"]
    assert not {"samples", "rank", "temperature"} & (step.keys() | step["retraining"].keys())


def test_cycles_are_given_each_text_for_its_purpose(tiny_llama, invoke, tmp_path, monkeypatch):
    given = {}

    def watch(model, pattern, data, config, **kwargs):
        given.update(kwargs, data=data)
        return prune_cycles(model, pattern, data, config, **kwargs)

    monkeypatch.setattr(cycles, "prune_cycles", watch)
    for name, text in (("calibration", "list of " * 100), ("validation", "python not " * 100)):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [f"--{name}={tmp_path / name}.txt" for name in ("calibration", "validation")]
    options = ["--form", "cycles", "--sparsity", "50%", "--cycles", 1, "--steps", 1, "--seq-len", 16, "--samples", 3]
    text = tiny_llama / "text.txt"
    invoke(tiny_llama / "dense", *options, *files, "--data", text, "--out", tmp_path / "r", "--validation-windows", 2)
    assert given["data"] == text.read_text()
    assert given["calibration"].shape == (3, 16)
    assert given["validation"].shape == (2, 16)
    assert set(given["calibration"].flatten().tolist()).isdisjoint(given["validation"].flatten().tolist())


def test_one_command_starts_cycles_and_goes_on_with_them(tiny_llama, invoke, tmp_path):
    options = [
        "--form",
        "cycles",
        "--sparsity",
        "50%",
        "--cycles",
        2,
        "--steps",
        2,
        "--seq-len",
        16,
        "--groups",
        "norms",
    ]
    run = [
        "--data",
        tiny_llama / "text.txt",
        "--output-dir",
        tmp_path / "run",
        "--resume",
        "--teacher",
        tiny_llama / "dense",
    ]
    first = json.loads(invoke(tiny_llama / "dense", *options, *run, "--out", tmp_path / "r", "--json"))
    again = json.loads(invoke(tiny_llama / "dense", *options, *run, "--out", tmp_path / "again", "--json"))
    assert again["cycles"] == first["cycles"]  # read from the journal, times included
    (step,) = read_info(tmp_path / "again")["recipe"]
    assert (step["teacher"], step["retraining"]["temperature"]) == (str(tiny_llama / "dense"), 2.0)


def test_dry_run_of_cycles_leaves_the_model_alone(tiny_llama, invoke):
    command = ["--form", "cycles", "--sparsity", "75%", "--cycles", 2, "--steps", 3, "--seq-len", 16, "--dry-run"]
    out = json.loads(invoke(tiny_llama / "pruned", *command, "--json"))
    assert out["patterns"] == ["64.6447%", "75%"]  # 1 - sqrt(0.5 * 0.25)
    assert out["retraining"]["steps"] == 3
    assert "2 cycles: 64.6447% -> 75%" in invoke(tiny_llama / "pruned", *command)
    model = load(tiny_llama / "pruned")
    before, weights = masks_sha256(model), {name: value.clone() for name, value in model.state_dict().items()}
    config = CyclesConfig(cycles=2, retraining=PERPConfig(seq_len=16))
    with pytest.raises(ValueError, match="must be above the present sparsity"):
        cycles_plan(model, "25%", config)
    # what the run itself refuses before it starts
    with pytest.raises(ValueError, match="has no room for all that is pruned already"):
        cycles_plan(model, Rows(0.6), config)
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        cycles_plan(model, "75%", dataclasses.replace(config, method="magnitud"))
    with pytest.raises(LayerCollapseError, match="would prune"):
        cycles_plan(model, "99.99% layer", config)
    assert cycles_plan(model, "99.99% layer", dataclasses.replace(config, allow_collapse=True))
    assert masks_sha256(model) == before
    for name, module in model.named_modules():
        if name.endswith("mlp.up_proj"):
            module.__dict__.pop("_trisparse_masks")  # a model of which only a part is pruned
    before = masks_sha256(model)
    plan = cycles_plan(model, "75%", config)
    assert plan.retraining.trainable["lora"] > 0
    assert masks_sha256(model) == before
    assert all((weights[name] == value).all() for name, value in model.state_dict().items())


def test_cycles_are_split_as_the_launcher_says(tiny_llama, trisparse_error, monkeypatch):
    command = ["--form", "cycles", "--sparsity", "75%", "--seq-len", 16, "--dry-run"]
    fsdp = [*command, "--sharding", "fsdp"]
    assert "and this is one" in trisparse_error("retrain", tiny_llama / "pruned", *fsdp)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    shown = trisparse_error("retrain", tiny_llama / "pruned", *fsdp, "--device", "cpu")
    assert "device=cpu has no effect with sharding='fsdp'" in shown
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--fsdp_version 2" in trisparse_error("retrain", tiny_llama / "pruned", *command)
    monkeypatch.setenv("FSDP_VERSION", "2")
    shown = trisparse_error("retrain", tiny_llama / "pruned", *command, "--device", "cpu")
    assert "device=cpu has no effect with sharding='fsdp'" in shown


def test_a_dry_run_is_printed_once(tiny_llama, invoke, monkeypatch):
    command = ["--form", "cycles", "--sparsity", "75%", "--seq-len", 16, "--dry-run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert invoke(tiny_llama / "pruned", *command) == ""
    monkeypatch.setenv("RANK", "0")
    assert "3 cycles" in invoke(tiny_llama / "pruned", *command)


def test_reconstruct_by_options_and_by_a_file(tiny_llama, invoke, tmp_path):
    file = tmp_path / "reconstruct.yaml"
    text = tiny_llama / "text.txt"
    file.write_text(
        f"form: reconstruct\ndense: {tiny_llama / 'dense'}\ndata: {text}\ngroups: [norms, lora]\ntargets: sparse\n"
        f"samples: 8\nseq_len: 16\nbatch_size: 4\nsteps: 20\nrank: 4\nout: {tmp_path / 'r'}\n"
    )
    out = json.loads(invoke(tiny_llama / "pruned", "--config", file, "--learning-rate", "1e-2", "--json"))
    assert (out["groups"], out["targets"], out["samples"], len(out["blocks"])) == (["norms", "lora"], "sparse", 8, 2)
    assert out["error_after"] < 0.9 * out["error_before"]
    check_masks(load(tmp_path / "r"))
    (step,) = read_info(tmp_path / "r")["recipe"]
    assert (step["step"], step["targets"], step["rank"], step["learning_rate"]) == ("reconstruct", "sparse", 4, 1e-2)

    options = ["--form", "reconstruct", "--dense", tiny_llama / "dense", "--data", text, "--groups", "only:norms"]
    short = ["--samples", 4, "--seq-len", 16, "--steps", 2, "--out", tmp_path / "r", "--json"]
    out = json.loads(invoke(tiny_llama / "pruned", *options, *short))
    assert (out["groups"], out["samples"]) == (["norms"], 4)
    assert "rank" not in read_info(tmp_path / "r")["recipe"][0]


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ("norms", ("biases", "norms")),
        ("perp", ("biases", "norms", "lora")),
        ("biases", ("biases",)),
        ("only:norms", ("norms",)),
        ("lora", ("lora",)),
        ("norms,lora", ("norms", "lora")),
        ("full", ("full",)),
    ],
)
def test_groups_of_a_reconstruction_are_named_as_elsewhere(tiny_llama, monkeypatch, given, groups):
    seen = []

    def watch(model, config):
        seen.append(config.groups)
        raise ValueError("seen enough")

    monkeypatch.setattr(plans, "reconstruction_plan", watch)
    monkeypatch.setattr(retrain_reconstruct, "load_model", lambda model, recover: (torch.nn.Linear(1, 1), None, []))
    settings = value_of("groups", section_of(ReconstructConfig)["groups"], given)
    job = Job.of(str(tiny_llama / "pruned"), {"groups": settings, "device": "cpu"}, dry_run=True, as_json=False)
    with pytest.raises(ValueError, match="seen enough"):
        retrain_reconstruct.run(job)
    assert seen == [groups]


def test_dry_run_of_a_reconstruction(tiny_llama, invoke):
    command = ["--form", "reconstruct", "--samples", 8, "--seq-len", 16, "--steps", 5, "--rank", 4, "--dry-run"]
    out = json.loads(invoke(tiny_llama / "pruned", *command, "--json"))
    assert (out["blocks"], out["steps"], out["tokens"]) == (2, 10, 128)
    assert out["hidden_states"] == 3 * 128 * 32 * 4
    block = 2 * 32 + 4 * (4 * (32 + 32) + 3 * (32 + 48))  # two norms, a LoRA on each of seven linears
    assert (out["largest"], out["trainable"]) == (block, 2 * block)
    model = load(tiny_llama / "pruned")
    weights = sum(param.numel() for param in model.model.layers[0].parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    memory = 4 * out["total_parameters"] + buffers + 8 * weights + 16 * block + out["hidden_states"]
    assert out["memory"] == pytest.approx(memory, rel=0.01)
    assert "activations of one block" in invoke(tiny_llama / "pruned", *command)
    full = reconstruction_plan(model, ReconstructConfig(groups=("full",)))
    assert full.trainable == 2 * weights
    with pytest.raises(ValueError, match="nothing to train in groups"):
        reconstruction_plan(model, ReconstructConfig(groups=("biases",)))
    for module in model.modules():
        module.__dict__.pop("_trisparse_masks", None)
    with pytest.raises(ValueError, match="no repeated blocks with masks"):
        reconstruction_plan(model, ReconstructConfig())


def test_a_nested_file(tmp_path):
    file = tmp_path / "cycles.yaml"
    file.write_text("freezing: freeze\nretraining: {steps: 1e2, learning_rate: 1e-4}\nsparsity: 0.5\n")
    settings = read_settings(file, section())
    assert settings == {
        "freezing": {"mode": "freeze"},
        "retraining": {"steps": 100, "learning_rate": 1e-4},
        "sparsity": 0.5,
    }
    assert math.isclose(settings["retraining"]["learning_rate"], 1e-4)
    for text, found in (
        ("2:4", "2:4"), ("3:4", "3:4"), ("16:32", "16:32"), ("1:4.5", "1:4.5"), ("50%", "50%"), ("0.5", 0.5)
    ):  # fmt: skip
        file.write_text(f"sparsity: {text}\n")
        assert read_settings(file, section()) == {"sparsity": found}
    file.write_text("numbers: [7, -7, 0, 1_000, 0x10, 0b11, 1., .5, -1.5e+3, -.inf, true, 2001-02-03]\n")
    assert read_yaml(file) == yaml.safe_load(file.read_text())
    file.write_text("freezing:\n")
    assert read_settings(file, section()) == {}
    for text, match in (
        ("retraining: {step: 3}\n", r"'retraining.step' is no setting, did you mean 'steps'\?"),
        ("steps: 3\n", "'steps' is a setting of 'retraining': put it below that key"),
        ("retraining: 3\n", "retraining.groups must be text, got 3"),
        ("cycles: {a: 3}\n", "cycles must be one value"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_settings(file, section())


CYCLE = ["--form", "cycles", "--data", "TEXT", "--out", "NEW", "--seq-len", "16"]
RECONSTRUCT = ["--form", "reconstruct", "--data", "TEXT", "--out", "NEW", "--seq-len", "16"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (CYCLE, "cycles needs --sparsity"),
        ([*CYCLE, "--sparsity", "4:2"], "n of an n:m pattern"),
        ([*CYCLE, "--sparsity", "75%", "--cycles", "0"], "cycles must be an integer of at least 1, got 0"),
        ([*CYCLE, "--sparsity", "75%", "--schedule", "ALLR"], "schedule must be one of linear, cubic, geometric"),
        ([*CYCLE, "--sparsity", "75%", "--freezing", "thaw"], "mode must be one of freeze, unfreeze, got 'thaw'"),
        ([*CYCLE, "--sparsity", "75%", "--freezing-stages", "0"], "stages must be an integer of at least 1, got 0"),
        ([*CYCLE, "--sparsity", "25%"], "must be above the present sparsity"),
        ([*CYCLE, "--sparsity", "75%", "--method", "abs(W"], "expected ')'"),
        ([*CYCLE, "--sparsity", "75%", "--groups", "perpp"], "groups must be one of biases, norms, linear-probing"),
        ([*CYCLE, "--sparsity", "75%", "--output-dir", "NEW"], "must lie apart"),
        ([*CYCLE, "--sparsity", "75%", "--dense", "DENSE"], "--dense is for --form reconstruct or vision"),
        (["--form", "cycles", "--sparsity", "75%"], "retrain needs --data and --out"),
        ([*CYCLE, "--sparsity", "75%", "--no-merge"], "retraining.merge must be True"),
        ([*CYCLE, "--sparsity", "75%", "--learning-rate", "grid", "--dry-run"], "pass validation"),
        ([*CYCLE, "--sparsity", "75%", "--resume"], "needs output_dir"),
        (RECONSTRUCT, "reconstruct needs --dense"),
        ([*RECONSTRUCT, "--dense", "DENSE", "--groups", "head"], "groups must be"),
        ([*RECONSTRUCT, "--dense", "DENSE", "--targets", "q_proj"], "targets must be one of sparse, dense"),
        ([*RECONSTRUCT, "--dense", "DENSE", "--validation", "TEXT"], "--validation is for --form perp or cycles"),
        ([*RECONSTRUCT, "--dense", "NOWHERE"], "no"),
    ],
)
def test_errors_are_short(tiny_llama, tmp_path, args, message, trisparse_error):
    names = {"TEXT": tiny_llama / "text.txt", "NEW": tmp_path / "new", "DENSE": tiny_llama / "dense"}
    names["NOWHERE"] = tmp_path / "nowhere"
    shown = trisparse_error("retrain", tiny_llama / "pruned", *(names.get(arg, arg) for arg in args))
    assert message in shown
    assert shown.startswith("error: ")
    assert not (tmp_path / "new").exists()


def test_a_reconstruction_runs_in_one_process(tiny_llama, tmp_path, trisparse_error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    new = ["--data", tiny_llama / "text.txt", "--out", tmp_path / "new", "--dense", tiny_llama / "dense"]
    assert "runs in one process, got 2" in trisparse_error(
        "retrain", tiny_llama / "pruned", "--form", "reconstruct", *new
    )
