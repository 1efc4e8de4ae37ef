"""``trisparse prune --stream`` beside ``trisparse prune``, and what the other commands make of its folder."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from trisparse import cli
from trisparse.cli.options import locate_model
from trisparse.sparsity.checkpoint import load, read_info
from trisparse.sparsity.mask import masks

WORDS = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama and a tokenizer of eleven words, in shards."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(4000)))
    return file


def invoke(*args):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_stream_writes_what_prune_writes_and_every_command_takes_it(dense, text, tmp_path, dtype):
    options = ["--sparsity", "50%", "--method", "wanda", "--data", text, "--samples", 8, "--seq-len", 32, "--json"]
    options += [] if dtype is None else ["--dtype", dtype]
    plain = json.loads(invoke("prune", dense, "--out", tmp_path / "plain", *options))
    for mode in ("memory", "disk"):
        out = tmp_path / mode
        found = json.loads(invoke("prune", dense, "--stream", "--hidden-states", mode, "--out", out, *options))
        assert {
            k: v for k, v in found.items() if k in ("kept", "total", "tokens", "skipped", "method", "parameters")
        } == {k: v for k, v in plain.items() if k in ("kept", "total", "tokens", "skipped", "method", "parameters")}
        assert read_info(out)["masks_sha256"] == read_info(tmp_path / "plain")["masks_sha256"]
        assert [read_info(tmp_path / name)["recipe"][0].get("dtype") for name in (mode, "plain")] == [dtype, dtype]
    streamed, wanted = load(tmp_path / "disk"), load(tmp_path / "plain")
    assert all(torch.equal(value, streamed.state_dict()[name]) for name, value in wanted.state_dict().items())
    shown = json.loads(invoke("inspect", tmp_path / "disk", "--json"))
    assert shown["verified"]
    step = shown["recipe"][0]
    assert (step["step"], step["stream"], step["data"], step["samples"]) == ("prune", True, str(text), 8)
    assert "seconds" not in step  # the same command gives the same bytes
    assert invoke("eval", tmp_path / "disk", "--data", text, "--seq-len", 32).startswith("perplexity ")
    invoke(
        "retrain", tmp_path / "disk", "--data", text, "--out", tmp_path / "r", "--steps", 2, "--seq-len", 16, "--json"
    )
    assert [entry["step"] for entry in read_info(tmp_path / "r")["recipe"]] == ["prune", "retrain"]
    invoke("prune", tmp_path / "r", "--stream", "--sparsity", "1:4", "--out", tmp_path / "again")
    assert {str(mask.pattern) for mask in masks(load(tmp_path / "again")).values()} == {"1:4"}
    assert [entry["step"] for entry in read_info(tmp_path / "again")["recipe"]] == ["prune", "retrain", "prune"]


def test_hidden_states_are_an_option_of_streaming(dense, tmp_path):
    with pytest.raises(ValueError, match="--hidden-states needs --stream"):
        invoke("prune", dense, "--out", tmp_path / "out", "--hidden-states", "disk")


def test_a_model_id_is_downloaded(dense, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(dense))
    folder, tokenizer = locate_model("someone/llama")
    assert (asked, folder) == (["someone/llama"], dense)
    assert tokenizer("python")["input_ids"] == [8]
