"""trisparse-v1: what ``save`` and ``save_pretrained`` of a compressed model write, and every way to load it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaModel

from trisparse.retrain.dense_weights import DenseWeights
from trisparse.sparsity.checkpoint import CheckpointError, TrisparseConfig, is_checkpoint, load, read_info, save
from trisparse.sparsity.checkpoint.headers import read_headers, weight_files
from trisparse.sparsity.compression import compress, decompress
from trisparse.sparsity.foreign.export import load_dense
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def compressed_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.fixture
def pruned(model_named):
    model = model_named("llama")
    sparsify(model, "2:4", progress=False)
    return model


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "50% rows"])
def test_every_language_model_comes_back(language_model, tokens, tmp_path, pattern):
    sparsify(language_model, pattern, progress=False)
    expected = logits(language_model, tokens)
    path = save(language_model, tmp_path / "pruned")
    assert not compressed_layers(language_model)  # it stays as it is
    assert not hasattr(language_model, "hf_quantizer")
    again, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert compressed_layers(again)
    assert masks_sha256(again) == masks_sha256(language_model) == read_info(path)["masks_sha256"]
    torch.testing.assert_close(logits(again, tokens), expected)
    dense = load(path)
    assert not compressed_layers(dense)
    assert masks_sha256(dense) == masks_sha256(language_model)
    own = language_model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in dense.state_dict().items())
    assert torch.equal(logits(dense, tokens), expected)


def test_dense_with_the_option_and_compressed_with_load(pruned, tokens, tmp_path):
    path = save(pruned, tmp_path / "pruned")
    with pytest.warns(UserWarning, match="'dense'"):  # transformers says what it takes from the argument
        dense = AutoModelForCausalLM.from_pretrained(path, quantization_config=TrisparseConfig(dense=True))
    assert not compressed_layers(dense)
    assert torch.equal(logits(dense, tokens), logits(pruned, tokens))
    dense.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert compressed_layers(load(path, form="compressed"))
    with pytest.raises(ValueError, match="form must be 'compressed' or 'dense', got 'small'"):
        load(path, form="small")
    with pytest.raises(ValueError, match="form must be 'compressed' or 'dense', got 'small'"):
        save(pruned, path, form="small")
    with pytest.raises(ValueError, match="is no trisparse checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=TrisparseConfig())


def test_what_stays_dense_keeps_its_mask(model_named, tmp_path):
    model = model_named("resnet")  # convolutions have no compressed form
    sparsify(model, "50% global", progress=False)
    path = save(model, tmp_path / "resnet")
    again = AutoModelForImageClassification.from_pretrained(path)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)
    assert masks(again).keys() == masks(model).keys()
    assert masks_sha256(again) == masks_sha256(model)
    assert not hasattr(again, "trisparse_masks")


def test_a_weight_that_would_be_larger_stays_dense(model_named, tokens, tmp_path):
    model = model_named("llama")
    sparsify(model, "5%", progress=False)
    path = save(model, tmp_path / "pruned")
    assert {entry["format"] for entry in read_info(path)["targets"].values()} == {"dense"}
    again = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert masks_sha256(again) == masks_sha256(model)


def test_a_kept_zero_stays_kept(pruned, tmp_path):
    mask = masks(pruned)["model.layers.0.mlp.up_proj.weight"]
    weight = pruned.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data.zero_()
    again = load(save(pruned, tmp_path / "pruned"))
    assert torch.equal(masks(again)["model.layers.0.mlp.up_proj.weight"].bits, mask.bits)


def test_the_base_model_opens_what_a_model_with_a_head_saved(pruned, tmp_path):
    base = LlamaModel.from_pretrained(save(pruned, tmp_path / "pruned"))
    assert masks(base).keys() == {name.removeprefix("model.") for name in masks(pruned)}
    assert len(compressed_layers(base)) == len(masks(pruned))


def test_save_pretrained_of_a_compressed_model(pruned, tokens, tmp_path):
    expected = logits(pruned, tokens)
    compress(pruned)
    pruned.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    assert len(weight_files(tmp_path / "a")) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="auto")
    torch.testing.assert_close(logits(again, tokens), expected)
    again.save_pretrained(tmp_path / "b")
    third = load(tmp_path / "b")
    assert torch.equal(logits(third, tokens), expected)
    assert masks_sha256(third) == masks_sha256(pruned)
    decompress(pruned)
    pruned.save_pretrained(tmp_path / "c")
    assert not is_checkpoint(tmp_path / "c")


def test_a_compressed_model_is_saved_in_both_forms(pruned, tokens, tmp_path):
    expected = logits(pruned, tokens)
    compress(pruned)
    dense = save(pruned, tmp_path / "dense", form="dense", recipe=[{"step": "prune"}])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(dense), tokens), expected)
    assert torch.equal(logits(load(dense), tokens), expected)
    small = save(pruned, tmp_path / "small", recipe=[{"step": "prune"}])
    assert torch.equal(logits(load(small), tokens), expected)
    assert read_info(small)["recipe"] == read_info(dense)["recipe"] == [{"step": "prune"}]
    load(small, form="compressed").save_pretrained(tmp_path / "again")
    assert read_info(tmp_path / "again")["recipe"] == [{"step": "prune"}]
    assert compressed_layers(pruned)


def test_dtype_and_device_map(pruned, tmp_path):
    path = save(pruned, tmp_path / "pruned")
    for device_map in ("cpu", "auto", {"model": "cpu", "lm_head": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device_map)
        layer = compressed_layers(model)[0]
        assert (model.dtype, layer.values.dtype, layer.meta.dtype) == (torch.bfloat16, torch.bfloat16, torch.int16)
    assert load(path, dtype=torch.float16).dtype == torch.float16
    assert model.float().dtype == torch.float32  # which transformers refuses for quantized models


def test_tied_weights_are_stored_once(model_named, tokens, tmp_path):
    model = model_named("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    sparsify(model, "2:4", progress=False)
    path = save(model, tmp_path / "pruned")
    assert "lm_head.weight" not in read_headers(weight_files(path))
    again = AutoModelForCausalLM.from_pretrained(path)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))


def test_the_size_of_the_file(tmp_path):
    layer = nn.Sequential(nn.Linear(1024, 512, bias=False).bfloat16())
    for pattern in ("2:4", "50%"):
        sparsify(layer, pattern, progress=False)
        path = save(layer, tmp_path / "one")
        assert os.path.getsize(path / "model.safetensors") <= 0.58 * layer[0].weight.nbytes


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_a_plain_module(tmp_path, form):
    def make():
        return nn.Sequential(nn.Linear(16, 16), nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(32, 8)))

    plain = make()
    sparsify(plain, "50%", progress=False)
    path = save(plain, tmp_path / "plain", recipe=[{"step": "prune"}])
    other = load(path, into=make(), form=form)
    assert [type(layer).__name__ for layer in (other[0], other[2][0])] == (
        ["Linear"] * 2 if form == "dense" else ["SparseLinear"] * 2
    )
    assert masks_sha256(other) == masks_sha256(plain)
    assert torch.equal(other[0].weight, plain[0].weight)
    assert torch.equal(other[1].weight, plain[1].weight)
    assert read_info(path)["recipe"] == [{"step": "prune"}]
    with pytest.raises(CheckpointError, match=r"pass an instance of it as load\(path, into=...\)"):
        load(path)
    with pytest.raises(CheckpointError, match=r"damaged at 0\.weight: .*has shape"):
        load(path, into=nn.Sequential(nn.Linear(3, 3)))


def test_a_failed_save_leaves_the_old_folder(pruned, tmp_path, monkeypatch):
    path = save(pruned, tmp_path / "pruned")
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save(pruned, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(tmp_path) == ["pruned"]
    assert not hasattr(pruned, "hf_quantizer")
    assert not hasattr(pruned.config, "quantization_config")


def test_push_to_hub_uploads_the_compressed_form(pruned, tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})()

    def upload(self, working_dir, repo_id, *args, **options):
        uploaded.update({name: os.path.getsize(os.path.join(working_dir, name)) for name in os.listdir(working_dir)})
        uploaded["opens"] = bool(compressed_layers(AutoModelForCausalLM.from_pretrained(working_dir)))

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Api)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    compress(pruned)
    pruned.save_pretrained(tmp_path / "pruned", push_to_hub=True, repo_id="someone/pruned")
    assert uploaded["opens"]
    assert {"model.safetensors", "config.json"} <= uploaded.keys()


def test_the_model_card(pruned, tmp_path):
    steps = [
        {"step": "prune", "pattern": "2:4", "command": "trisparse prune smollm2"},
        {"step": "eval", "data": "wikitext2", "perplexity": 12.3456},
    ]
    card = (save(pruned, tmp_path / "pruned", recipe=steps) / "README.md").read_text()
    for text in ("| 2:4 |", "50.00%", "1. prune, pattern 2:4", "trisparse prune smollm2", "12.346 on wikitext2"):
        assert text in card
    assert f"{type(pruned).__name__}.from_pretrained(FOLDER)" in card
    assert f"torch {torch.__version__}" in card or "torch " in card
    assert "every tool" in (save(pruned, tmp_path / "pruned", form="dense") / "README.md").read_text()


@pytest.mark.parametrize("first", ["trisparse", "trisparse.sparsity.compression"])
def test_the_format_is_known_whatever_is_imported_first(first):
    code = f"import {first}, sys; import trisparse; light = 'torch' not in sys.modules; import transformers.quantizers"
    code += ".auto as table; print(light, 'trisparse' in table.AUTO_QUANTIZER_MAPPING, 'trisparse' in table."
    code += "AUTO_QUANTIZATION_CONFIG_MAPPING)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(first == "trisparse"), "True", "True"]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_folder_that_was_saved_again_in_one_file(model_named, compressed, tmp_path):
    """transformers leaves the index of the shards, which it has removed, and reads the one file."""
    model = model_named("llama")
    if compressed:
        sparsify(model, "2:4", progress=False)
        compress(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not list(tmp_path.glob("model-*"))
    if compressed:
        assert masks_sha256(load(tmp_path)) == masks_sha256(model)
        assert masks_sha256(AutoModelForCausalLM.from_pretrained(tmp_path)) == masks_sha256(model)
    else:
        weight = model.lm_head.weight
        assert torch.equal(load_dense(tmp_path).lm_head.weight, weight)
        cpu = torch.device("cpu")
        assert torch.equal(DenseWeights(tmp_path, model).read(["lm_head.weight"], cpu)["lm_head.weight"], weight)
        assert ModelOnDisk(tmp_path, cpu).files == [tmp_path / "model.safetensors"]


def test_a_model_without_masks_is_an_ordinary_one(model_named, tokens, tmp_path):
    model = model_named("llama")
    path = save(model, tmp_path / "dense", recipe=[{"step": "none"}])
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert "opens them" in (path / "README.md").read_text()
    again, ours = AutoModelForCausalLM.from_pretrained(path), load(path)
    assert not masks(ours)
    for other in (again, ours):
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    save(ours, path, recipe=read_info(path)["recipe"])  # and is replaced as a result of ours


def test_the_dense_form_is_not_decompressed(model_named, tmp_path):
    model = model_named("llama")
    sparsify(model, "2:4", progress=False)
    path = save(model, tmp_path / "dense", form="dense")
    with pytest.raises(ValueError, match=r"the masks beside them: trisparse\.load\(folder\) opens it"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=TrisparseConfig(dense=True))
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    with pytest.raises(ValueError, match="no trisparse checkpoint"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=TrisparseConfig(dense=True))
