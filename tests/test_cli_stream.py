"""``trisparse prune --stream`` beside ``trisparse prune``, and what the other commands make of its folder."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trisparse.cli.options import locate_model
from trisparse.sparsity.checkpoint import load, read_info, save
from trisparse.sparsity.mask import masks


@pytest.fixture(scope="module")
def dense(tiny_llama, tmp_path_factory):
    """The tiny Llama and its tokenizer, in shards."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    AutoModelForCausalLM.from_pretrained(tiny_llama / "dense").save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_llama / "dense").save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def text(tiny_llama):
    return tiny_llama / "text.txt"


@pytest.fixture(scope="module")
def invoke(trisparse_command):
    return trisparse_command


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_stream_writes_what_prune_writes_and_every_command_takes_it(dense, text, invoke, tmp_path, dtype):
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
    with pytest.raises(ValueError, match="holds compressed weights, and streaming reads dense ones"):
        invoke("prune", tmp_path / "r", "--stream", "--sparsity", "1:4", "--out", tmp_path / "again")
    save(load(tmp_path / "r"), tmp_path / "r", form="dense", recipe=read_info(tmp_path / "r")["recipe"])
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "r")
    invoke("prune", tmp_path / "r", "--stream", "--sparsity", "1:4", "--out", tmp_path / "again")
    assert {str(mask.pattern) for mask in masks(load(tmp_path / "again")).values()} == {"1:4"}
    assert [entry["step"] for entry in read_info(tmp_path / "again")["recipe"]] == ["prune", "retrain", "prune"]


def test_hidden_states_are_an_option_of_streaming(dense, invoke, tmp_path):
    with pytest.raises(ValueError, match="--hidden-states needs --stream"):
        invoke("prune", dense, "--out", tmp_path / "out", "--hidden-states", "disk")


def test_a_model_id_is_downloaded(dense, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(dense))
    folder, tokenizer = locate_model("someone/llama")
    assert (asked, folder) == (["someone/llama"], dense)
    assert tokenizer("python")["input_ids"] == [8]
