"""The command retrain: its options, its YAML file, and the dry run."""

import dataclasses
import inspect
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from trisparse import cli
from trisparse.cli.config_file import read_settings
from trisparse.cli.retrain import retrain
from trisparse.retrain.perp import PERPConfig
from trisparse.retrain.run_folder import checkpoints
from trisparse.retrain.sparse_lora_config import load_adapters
from trisparse.sparsity.checkpoint import load, read_info, save
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify

WORDS = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``dense``, ``pruned`` (2:4) and ``text.txt``."""
    folder = tmp_path_factory.mktemp("retrain")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    )
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    sparsify(model, "2:4", "magnitude", progress=False)
    save(model, folder / "pruned", tokenizer=tokenizer, recipe=[])
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(4000)))
    return folder


def invoke(*args):
    result = CliRunner().invoke(cli.app, ["retrain", *(str(arg) for arg in args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_file_and_options_that_win_over_it(folder, tmp_path):
    settings = tmp_path / "perp.yaml"
    settings.write_text(
        "# YAML 1.1 reads 1e-2 as a string\nlearning_rate: grid\nlearning_rates: [1e-4, 1e-2]\ngrid_steps: 2\n"
        "groups: [norms, lora]\nsteps: 50\nseq_len: 32\nrank: 2\nguard_every: 2\n"
    )
    data = ["--data", folder / "text.txt", "--validation", folder / "text.txt", "--validation-windows", 4]
    options = ["--steps", 4, "--batch-size", 2, "--teacher", folder / "dense", "--temperature", 3]
    saved = ["--output-dir", tmp_path / "checkpoints", "--save-steps", 2, "--out", tmp_path / "r", "--json"]
    out = json.loads(invoke(folder / "pruned", "--config", settings, *data, *options, *saved))
    assert (out["steps"], out["batch"], list(out["trainable"])) == (4, [2, 4, 1], ["norms", "lora"])
    assert (out["learning_rate"], list(out["grid"])) == (1e-2, ["0.0001", "0.01"])
    assert out["validation_loss"][1] < out["validation_loss"][0]
    assert len(checkpoints(tmp_path / "checkpoints")) == 2
    check_masks(load(tmp_path / "r"))
    (step,) = read_info(tmp_path / "r")["recipe"]
    assert (step["rank"], step["steps"], step["temperature"], step["learning_rate"]) == (2, 4, 3, 1e-2)
    assert step["teacher"] == str(folder / "dense")

    again = ["--resume", "--out", tmp_path / "again", "--json", *saved[:4]]
    resumed = json.loads(invoke(folder / "pruned", "--config", settings, *data, *options, *again))
    assert resumed["losses"] == out["losses"]
    assert resumed["resumed_at"] == 4


def test_dry_run_reads_no_data_and_writes_nothing(folder, tmp_path):
    before = sorted(path.name for path in folder.rglob("*"))
    out = json.loads(invoke(folder / "pruned", "--dry-run", "--json", "--steps", 7, "--seq-len", 32))
    assert out["steps"] == 7
    assert out["tokens"] == 7 * 2 * 4 * 32
    assert set(out["memory"]) == {"weights", "gradients", "optimizer", "activations", "total"}
    assert sum(out["trainable"].values()) / out["total_parameters"] == out["trainable_share"]
    shown = invoke(folder / "pruned", "--dry-run", "--teacher", folder / "dense", "--seq-len", 32)
    assert "on each device, estimated" in shown
    assert "norms" in shown
    full = ["--dry-run", "--groups", "full", "--seq-len", 32, "--output-dir", folder / "run", "--json"]
    assert list(json.loads(invoke(folder / "pruned", *full))["trainable"]) == ["full"]
    grid = ["--dry-run", "--learning-rate", "grid", "--seq-len", 32, "--validation", "no file", "--json"]
    assert json.loads(invoke(folder / "pruned", *grid))["grid_steps"] == 5 * 20
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_preset_and_adapters_that_stay(folder, tmp_path):
    short = ["--steps", 2, "--batch-size", 2, "--seq-len", 32, "--data", folder / "text.txt", "--json"]
    full = json.loads(invoke(folder / "pruned", "--groups", "full", *short, "--out", tmp_path / "full"))
    assert full["trainable"] == {"full": full["total_parameters"]}
    check_masks(load(tmp_path / "full"))
    options = ["--variant", "lora", "--no-merge", "--groups", "lora", "--targets", "q_proj,v_proj", "--rank", 2]
    kept = json.loads(invoke(folder / "pruned", *options, *short, "--out", tmp_path / "adapters"))
    assert kept["trainable"] == {"lora": 2 * 2 * 2 * (32 + 32)}
    head = ["--no-merge", "--groups", "head", "--rank", 2]
    invoke(folder / "pruned", *head, *short, "--out", tmp_path / "head")
    assert {name.rpartition(".lora_")[2] for name in load_file(tmp_path / "head" / "adapter_model.safetensors")} == {
        "A.weight", "B.weight",
    }  # fmt: skip
    adapters = load_adapters(load(folder / "pruned"), tmp_path / "adapters")
    assert sum(p.numel() for name, p in adapters.named_parameters() if ".lora_" in name) == kept["trainable"]["lora"]


def test_every_setting_is_an_option():
    fields = {field.name for field in dataclasses.fields(PERPConfig)}
    assert fields <= set(inspect.signature(retrain).parameters)


def test_settings_of_a_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 5e-4\nlearning_rates: [5e-6, 1.0e-3]\noutput_dir: '1e3'\nsave_steps: 2\n")
    settings = read_settings(file, PERPConfig)
    assert settings == {"learning_rate": 5e-4, "learning_rates": (5e-6, 1e-3), "output_dir": "1e3", "save_steps": 2}
    assert PERPConfig(**settings).learning_rate == 5e-4
    file.write_text("# nothing\n")
    assert read_settings(file, PERPConfig) == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lerning_rate: 1\n", r"'lerning_rate' is no setting, did you mean 'learning_rate'\?"),
        ("zzz: 1\n", r"'zzz' is no setting, there are groups, variant"),
        ("3: 1\n", "3 is no setting"),
        ("- steps\n", "must hold keys and values"),
        ("steps\n", "must hold keys and values"),
        ("steps: [1\n", "is no YAML"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, match):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_settings(file, PERPConfig)


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "missing.yaml", PERPConfig)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no YAML"):
        read_settings(tmp_path / "binary.yaml", PERPConfig)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "retrain needs --data and --out"),
        (["--data", "TEXT"], "retrain needs --data and --out"),
        (["--data", "TEXT", "--out", "NEW", "--learning-rate", "big"], "learning_rate must be a number above 0"),
        (["--data", "TEXT", "--out", "NEW", "--learning-rate", "-1"], "learning_rate must be a number above 0"),
        (["--data", "TEXT", "--out", "NEW", "--learning-rate", "grid"], "pass validation"),
        (["--data", "TEXT", "--out", "NEW", "--dtype", "fp16", "--device", "cpu"], "needs a model on CUDA"),
        (["--data", "TEXT", "--out", "NEW", "--resume"], "resume=True needs output_dir"),
        (["--data", "TEXT", "--out", "NEW", "--config", "YAML"], "did you mean 'steps'?"),
        (["--data", "TEXT", "--out", "NEW", "--config", "missing.yaml"], "missing.yaml"),
        (["--data", "TEXT", "--out", "NEW", "--seq-len", "65"], "maximum of 64 positions"),
        (["--dry-run", "--seq-len", "65"], "maximum of 64 positions"),
        (["--dry-run", "--groups", "biases"], "nothing to train"),
        (["--dry-run", "--learning-rate", "grid"], "pass validation"),
        (["--dry-run", "--report-to", "tensorboard"], "report_to=tensorboard needs output_dir"),
        (["--dry-run", "--save-total-limit", "0"], "save_total_limit must be"),
        (["--dry-run", "--groups", "lora,heads"], "groups must be"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, args, message, monkeypatch, capsys):
    (tmp_path / "wrong.yaml").write_text("step: 3\n")
    names = {"TEXT": folder / "text.txt", "NEW": tmp_path / "new", "YAML": tmp_path / "wrong.yaml"}
    if args[:1] != ["--dry-run"] and "--seq-len" not in args:
        args = [*args, "--seq-len", "32"]
    monkeypatch.setattr(
        sys, "argv", ["trisparse", "retrain", str(folder / "pruned"), *(str(names.get(arg, arg)) for arg in args)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert not (tmp_path / "new").exists()
