import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from trisparse import cli
from trisparse.sparsity.checkpoint import load, read_info
from trisparse.sparsity.mask import masks

WORDS = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not"]
TEXT = " ".join(WORDS[i * i % len(WORDS)] for i in range(4000))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama and a tokenizer of eleven words, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT)
    return file


def invoke(*args):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def pruned(dense, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "pruned"
    invoke("prune", dense, "--sparsity", "2:4", "--data", text, "--samples", 8, "--seq-len", 32, "--out", folder)
    return folder


def test_prune_writes_a_model_that_loads_with_its_masks(pruned):
    found = masks(load(pruned))
    assert len(found) == 14
    assert {str(mask.pattern) for mask in found.values()} == {"2:4"}
    assert {mask.sparsity for mask in found.values()} == {0.5}
    assert (pruned / "tokenizer.json").is_file()


def test_prune_prints_json(dense, tmp_path):
    out = json.loads(invoke("prune", dense, "--sparsity", "50% layer", "--out", tmp_path / "p", "--json"))
    assert (out["method"], out["pattern"], out["sparsity"]) == ("magnitude", "50% layer", 0.5)
    assert out["out"] == str(tmp_path / "p")


def test_prune_takes_an_allocation_with_parameters_and_a_file(dense, text, tmp_path):
    common = ["prune", dense, "--sparsity", "60%", "--out", tmp_path / "p", "--json"]
    measured = ["--data", text, "--samples", 4, "--seq-len", 16]
    out = json.loads(invoke(*common, *measured, "--allocation", "owl:M=3,lambda=0.2"))
    assert (out["allocation"], out["method"]) == ("owl:M=3,lambda=0.2", "wanda")
    assert out["total"] - out["kept"] == round(0.6 * out["total"])
    assert len({row["sparsity"] for row in out["targets"]}) > 1
    assert json.loads(invoke("inspect", tmp_path / "p", "--json"))["recipe"][0]["allocation"] == "owl:M=3,lambda=0.2"
    file = tmp_path / "layers.yaml"
    file.write_text('"*.mlp.*": 2:4\n"*.0.*": dense\n')
    out = json.loads(invoke(*common, "--allocation", file))
    assert out["pattern"] == "mixed"
    assert out["left_dense"] > 0
    patterns = {name: str(mask.pattern) for name, mask in masks(load(tmp_path / "p")).items()}
    assert patterns["model.layers.1.mlp.up_proj.weight"] == "2:4"
    assert patterns["model.layers.1.self_attn.q_proj.weight"] == "60%"
    assert not any(".0." in name for name in patterns)
    assert "allocation per-layer:" in invoke("inspect", tmp_path / "p")


def test_prune_updates_what_it_keeps_and_says_so_in_the_recipe(dense, text, tmp_path):
    data = ["--data", text, "--samples", 8, "--seq-len", 32, "--sparsity", "50%"]
    out = json.loads(invoke("prune", dense, *data, "--method", "sparsegpt", "--out", tmp_path / "s", "--json"))
    assert (out["method"], out["update"], out["targets"][0]["damping"]) == ("sparsegpt", "iterative", 0.01)
    options = ["--method", "wanda", "--update", "sequential", "--damping", 0.1, "--dtype", "fp32"]
    assert "sequential OBS" in invoke("prune", dense, *data, *options, "--out", tmp_path / "w")
    shown = json.loads(invoke("inspect", tmp_path / "w", "--json"))
    assert shown["verified"]
    step = shown["recipe"][0]
    assert (step["update"], step["damping"], step["dtype"]) == ("sequential", 0.1, "fp32")


def test_retrain_presets_and_adapters_that_stay(pruned, text, tmp_path):
    common = ["--steps", "2", "--seq-len", "16", "--json"]
    options = ["--groups", "full", *common]
    full = json.loads(invoke("retrain", pruned, "--data", text, "--out", tmp_path / "full", *options))
    assert full["trainable_share"] == 1
    options = ["--groups", "perp", "--variant", "lora", "--no-merge", "--targets", "q_proj", *common]
    kept = json.loads(invoke("retrain", pruned, "--data", text, "--out", tmp_path / "adapters", *options))
    assert list(kept["trainable"]) == ["biases", "norms", "head", "lora"]
    assert kept["missing"] == ["biases"]
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["variant"] == "lora"
    assert not (tmp_path / "adapters" / "model.safetensors").exists()


def test_retrain_learns_keeps_zeros_and_the_recipe(pruned, text, tmp_path):
    options = ["--steps", 6, "--seq-len", 32, "--learning-rate", 1e-2, "--rank", 2, "--batch-size", 4]
    out = json.loads(invoke("retrain", pruned, "--data", text, "--out", tmp_path / "r", "--json", *options))
    assert out["last_loss"] < out["first_loss"]
    model = load(tmp_path / "r")
    assert all((model.get_parameter(name)[~mask.dense()] == 0).all() for name, mask in masks(model).items())
    shown = json.loads(invoke("inspect", tmp_path / "r", "--json"))
    assert [step["step"] for step in shown["recipe"]] == ["prune", "retrain"]
    assert shown["recipe"][1]["rank"] == 2


def test_eval_measures_any_model(dense, pruned, text):
    for model in (dense, pruned):
        out = json.loads(invoke("eval", model, "--data", text, "--seq-len", 32, "--max-tokens", 320, "--json"))
        assert 5 < out["perplexity"] < 40  # 16 tokens, untrained
        assert out["sparsity"] == (0 if model == dense else pytest.approx(0.5, abs=0.02))
        assert out["masks_sha256"] == (None if model == dense else read_info(model)["masks_sha256"])
        assert out["versions"]["torch"] == version("torch")
    assert invoke("eval", dense, "--data", text, "--seq-len", 32).startswith("perplexity ")


def test_inspect_shows_and_checks(pruned):
    shown = invoke("inspect", pruned)
    assert "model.layers.*.self_attn.q_proj.weight (2)" in shown
    assert "masks verified, sha256" in shown
    assert "step prune" in shown


def test_prune_takes_an_expression_and_a_file(dense, tmp_path):
    (tmp_path / "best.json").write_text('{"data": "sqr", "left": {"data": "W"}}')
    for method in ("sqr(W)", tmp_path / "best.json"):
        options = ["--sparsity", "50%", "--method", method, "--out", tmp_path / "p", "--json"]
        assert json.loads(invoke("prune", dense, *options))["method"] == "sqr(W)"


def test_metrics_lists_the_library_and_the_vocabulary():
    rows = json.loads(invoke("metrics", "--json"))
    assert {row["name"]: row["expression"] for row in rows}["wanda"] == "abs(W) * X"
    assert "pruner-zero" in invoke("metrics")
    assert {row["operation"] for row in json.loads(invoke("metrics", "--operations", "--json"))} >= {
        "mms(x)",
        "div(x, y)",
    }
    assert "extension" in invoke("metrics", "--operations")


def test_env_lists_what_a_bug_report_needs():
    assert json.loads(invoke("env", "--json"))["packages"]["torch"] == torch.__version__
    assert "torch" in invoke("env")


def test_bench_aot_lists_every_kernel():
    pytest.importorskip("triton")
    kernels = json.loads(invoke("bench", "aot", "--cc", 80, "--rows", 64, "--cols", 256, "--json"))["kernels"]
    assert len(kernels) >= 10
    assert {row["cc"] for row in kernels} == {80}
    assert not any(row["spill_bytes"] for row in kernels)


def test_bench_tune_measures_shapes_and_models(pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    options = ["--tokens", 1, "--tokens", 8, "--device", "cpu"]
    printed = invoke("bench", "tune", "--shape", "32x64", "--pattern", "2:4", "--rank", 0, "--rank", 4, *options)
    assert "32x64 bfloat16 2:4 rank 4" in printed
    assert "mma.sp: not here" in printed
    result = json.loads(invoke("bench", "tune", "--model", pruned, *options, "--json"))
    assert len(result["layers"]) == 3  # 32x32, 48x32, 32x48
    for row in result["layers"]:
        assert row["seconds"].keys() == {"1", "8"}
        assert row["chosen"]["1"] in row["seconds"]["1"]
    assert (tmp_path / "tune").is_dir()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "tune", "--shape", "4096"], "shape must be OUTxIN"),
        (["bench", "tune", "--dtype", "int8"], "dtype must be"),
        (["bench", "tune", "--model", "DENSE"], "has no pruned linear layers"),
        (["bench", "tune", "--model", "PRUNED", "--pattern", "2:4"], "leave --shape and --pattern out"),
        (["bench", "aot", "--cc", "70"], "cc must be one of 80"),
        (["bench", "aot", "--cols", "33"], "cols a multiple of 32"),
        (["prune", "DENSE", "--out", "NEW", "--sparsity", "4:2"], "n of an n:m pattern"),
        (["prune", "DENSE", "--out", "DENSE"], "are one inside the other"),
        (["prune", "DENSE", "--out", "NEW", "--data", "missing.txt"], "no such file"),
        (["prune", "DENSE", "--out", "NEW", "--method", "wanda"], "pass data"),
        (["prune", "DENSE", "--out", "NEW", "--allocation", "owl"], "weighs the layers' inputs: pass data"),
        (["prune", "DENSE", "--out", "NEW", "--allocation", "owl:N=5"], "owl has no parameter 'N'"),
        (["prune", "DENSE", "--out", "NEW", "--allocation", "none.yaml"], "none.yaml"),
        (["prune", "DENSE", "--out", "NEW", "--method", "abs(W"], "expected ')'"),
        (["prune", "DENSE", "--out", "NEW", "--method", "sparsegpt"], "pass data"),
        (["prune", "DENSE", "--out", "NEW", "--update", "obs"], "update must be one of sequential, iterative"),
        (["prune", "DENSE", "--out", "NEW", "--dtype", "fp8"], "dtype must be one of auto, fp32, bf16, got 'fp8'"),
        (["retrain", "DENSE", "--data", "TEXT", "--out", "NEW"], "not a trisparse checkpoint"),
        (["retrain", "PRUNED", "--data", "TEXT", "--out", "NEW", "--groups", "lora,heads"], "groups must be"),
        (["inspect", "NEW"], "not a trisparse checkpoint"),
        (["eval", "DENSE", "--data", "TEXT", "--seq-len", "65"], "seq_len must be at most 64"),
    ],
)
def test_errors_are_one_line_on_stderr(dense, pruned, text, tmp_path, args, message, monkeypatch, capsys):
    names = {"DENSE": dense, "PRUNED": pruned, "TEXT": text, "NEW": tmp_path / "new"}
    monkeypatch.setattr(sys, "argv", ["trisparse", *(str(names.get(arg, arg)) for arg in args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert not (tmp_path / "new").exists()


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken():
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cli.main()


def test_help_answers_without_loading_torch():
    code = "import sys, trisparse.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_search_writes_a_metric_that_prune_takes_and_goes_on_where_it_was(dense, text, tmp_path):
    small = ["--population", 3, "--calibration-samples", 2, "--seq-len", 16, "--eval-windows", 2, "--out", tmp_path]
    command = ["search", dense, "--data", text, *small, "--start-from", "wanda, abs(W) * sqrt(X)", "--seed", 3]
    printed = invoke(*command, "--iterations", 1)
    assert "(pruner-zero)" in printed
    assert "4 metrics in" in printed
    found = json.loads(invoke(*command, "--iterations", 2, "--json"))
    assert found["evaluations"] == 5
    assert found["finished"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["simplified"] for record in log[4:6]] == ["abs(W) * X", "abs(W) * sqrt(X)"]
    assert (log[0]["settings"]["seed"], log[0]["settings"]["sparsity"]) == (3, 0.5)
    assert (log[0]["model"]["name"], log[0]["data"]["windows"]) == (str(dense), [2, 16])
    out = tmp_path / "pruned"
    invoke("prune", dense, "--out", out, "--method", tmp_path / "best.json", "--sparsity", "50%", "--data", text,
           "--samples", 2, "--seq-len", 16)  # fmt: skip
    assert load(out) is not None
