"""A streamed prune against the same call in memory: the same weights, masks, report and files, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from trisparse.sparsity.allocation import PerLayer
from trisparse.sparsity.capture import Chain
from trisparse.sparsity.checkpoint import CheckpointError, load, read_info, save
from trisparse.sparsity.gradient_statistics import GradientInfo, GradientStatistics
from trisparse.sparsity.mask import masks
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.streaming import block_steps
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk
from trisparse.sparsity.streaming.output import join_safetensors, work_folder
from trisparse.sparsity.streaming.stream import stream_sparsify
from trisparse.sparsity.targets import find_targets

CPU = torch.device("cpu")


@pytest.fixture
def folder_of(model_named, tmp_path):
    """Function that saves a model by name, in shards, and returns the folder."""

    def save_it(name, dtype=torch.float32, shard="20KB"):
        folder = tmp_path / "dense"
        model_named(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return save_it


@pytest.fixture
def batches(tokens):
    return [{"input_ids": part} for part in tokens.split(2)]


def compare(folder, tmp_path, *arguments, hidden_states="memory", **options):
    """Prune ``folder`` in both ways; returns the reports."""
    plain = load(folder) if (folder / "trisparse.json").is_file() else None
    if plain is None:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected = sparsify(plain, *arguments, progress=False, **options)
    save(plain, tmp_path / "plain", form="dense")
    report = stream_sparsify(
        folder, tmp_path / "streamed", *arguments, hidden_states=hidden_states, device="cpu", progress=False, **options
    )
    found, wanted = load(tmp_path / "streamed"), load(tmp_path / "plain")
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == value.dtype
    infos = read_info(tmp_path / "streamed"), read_info(tmp_path / "plain")
    assert infos[0]["masks_sha256"] == infos[1]["masks_sha256"]
    assert infos[0]["targets"] == infos[1]["targets"]
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / file).read_text() == (tmp_path / "plain" / file).read_text()
    assert weights_in(tmp_path / "streamed").keys() == weights_in(tmp_path / "plain").keys()
    rows = [[(r.name, r.shape, r.pattern, r.kept, r.note) for r in one.targets] for one in (report, expected)]
    assert sorted(rows[0]) == sorted(rows[1])
    assert report.skipped == expected.skipped
    assert (report.samples, report.tokens, report.parameters) == (
        expected.samples,
        expected.tokens,
        expected.parameters,
    )
    assert not work_folder(tmp_path / "streamed").exists()
    return report, expected


def weights_in(folder):
    found = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
@pytest.mark.parametrize("propagate", ["block", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_equals_sparsify(folder_of, batches, tmp_path, name, propagate, hidden_states):
    compare(folder_of(name), tmp_path, "50%", "wanda", batches, propagate=propagate, hidden_states=hidden_states)


@pytest.mark.parametrize("name", ["llama-tied", "gpt-oss", "gemma3"])
def test_equals_sparsify_for_other_architectures(folder_of, batches, tmp_path, name):
    compare(folder_of(name), tmp_path, "2:4", "wanda", batches)


@pytest.mark.parametrize(
    ("sparsity", "method", "options"),
    [
        ("50%", "sparsegpt", {}),
        ("2:4", "wanda", {"update": "sequential", "propagate": "dense", "damping": 0.1}),
        ("60%", "wanda", {"allocation": "erk"}),
        ("60%", "sparsegpt", {"allocation": PerLayer({"*.mlp.*": "2:4", "*.layers.1.self_attn.*": "dense"})}),
    ],
    ids=["sparsegpt", "update", "erk", "mixed"],
)
def test_updates_and_allocations(folder_of, batches, tmp_path, sparsity, method, options):
    report, expected = compare(folder_of("llama"), tmp_path, sparsity, method, batches, **options)
    for name in ("pattern", "method", "update", "allocation", "left_dense", "sparsity"):
        assert getattr(report, name) == getattr(expected, name)
    (step,) = read_info(tmp_path / "streamed")["recipe"]
    assert (step["update"], step["allocation"], step["pattern"]) == (report.update, report.allocation, report.pattern)
    assert step.get("damping") == (None if report.update is None else options.get("damping", 0.01))


@pytest.mark.parametrize("allocation", ["owl", "lamp", "global"])
def test_allocations_that_weigh_all_layers_are_refused(folder_of, batches, tmp_path, allocation):
    with pytest.raises(ValueError, match="weighs all layers together, and streaming holds one block"):
        stream_sparsify(folder_of("llama"), tmp_path / "out", "60%", "wanda", batches, allocation=allocation)
    assert not (tmp_path / "out").exists()


def test_linear_propagation_in_one_file_of_bf16(folder_of, tokens, tmp_path):
    folder = folder_of("llama", torch.bfloat16, shard="1GB")
    assert (folder / "model.safetensors").is_file()
    compare(folder, tmp_path, "50%", "wanda", tokens, samples=8, seq_len=16, propagate="linear")


def test_without_data_targets_outside_the_blocks_too(folder_of, tmp_path):
    include = ["lm_head", "model.layers.1.*"]
    report, _ = compare(folder_of("llama"), tmp_path, "50% layer", "magnitude", include=include)
    assert {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= {row.name for row in report.targets}
    assert read_info(tmp_path / "streamed")["recipe"][0]["method"] == "magnitude"


def test_random_scores_are_seeded_by_name(folder_of, tmp_path):
    compare(folder_of("gpt2"), tmp_path, "2:4", "random", seed=3)


def test_a_block_that_is_left_out_is_passed_and_written(folder_of, batches, tmp_path):
    report, _ = compare(folder_of("opt"), tmp_path, "50%", "wanda", batches, exclude="*.layers.1.*")
    assert len(report.targets) == 12


def test_a_checkpoint_of_ours_keeps_the_masks_of_what_is_left_out(folder_of, batches, tmp_path):
    folder_of("llama")
    once = load_plain(tmp_path / "dense")
    sparsify(once, "1:4", progress=False)
    save(once, tmp_path / "once", recipe=[{"step": "prune", "pattern": "1:4"}], form="dense")
    compare(tmp_path / "once", tmp_path, "25%", "wanda", batches, exclude="*.layers.0.*")
    patterns = {name: str(mask.pattern) for name, mask in masks(load(tmp_path / "streamed")).items()}
    assert patterns["model.layers.0.mlp.up_proj.weight"] == "1:4"
    assert patterns["model.layers.1.mlp.up_proj.weight"] == "25%"
    assert [step["pattern"] for step in read_info(tmp_path / "streamed")["recipe"]] == ["1:4", "25%"]


@pytest.mark.parametrize(
    ("allocation", "sparsity"), [(PerLayer({"*.layers.0.*": "dense"}), "50%"), ("erk", "10%")], ids=["per-layer", "erk"]
)
def test_a_layer_that_was_pruned_before_cannot_be_left_dense(folder_of, tmp_path, allocation, sparsity):
    once = load_plain(folder_of("llama"))
    sparsify(once, "5%", progress=False)
    save(once, tmp_path / "once", form="dense")
    messages = []
    for prune, arguments in ((sparsify, [load(tmp_path / "once")]), (stream_sparsify, [tmp_path / "once", "out"])):
        arguments = [tmp_path / value if value == "out" else value for value in arguments]
        with pytest.raises(ValueError, match=r"dense, which was pruned before") as error:
            prune(*arguments, sparsity, "magnitude", allocation=allocation, progress=False)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert not (tmp_path / "out").exists()


def load_plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_names_without_the_prefix_of_the_base_model(folder_of, batches, tmp_path):
    folder = folder_of("gpt2", shard="1GB")
    weights = {name.removeprefix("transformer."): value for name, value in weights_in(folder).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a buffer that old files hold, and the model has no more
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compare(folder, tmp_path, "50%", "wanda", batches)


def test_gradients_come_from_a_file(folder_of, tmp_path):
    folder = folder_of("llama")
    generator = torch.Generator().manual_seed(5)
    found = find_targets(load_plain(folder)).found
    norms = {target.name: torch.rand(target.matrix().shape, generator=generator) for target in found}
    shapes = {name: norm.shape for name, norm in norms.items()}
    info = GradientInfo("by hand", 1, 1, "float32", "float32", unreached=())
    file = GradientStatistics(norms, shapes, info).save(tmp_path / "gradients.safetensors")
    compare(folder, tmp_path, "50%", "pruner-zero", gradients=file)


def test_one_block_is_in_memory_at_a_time(folder_of, batches, tmp_path, monkeypatch):
    real, held = ModelOnDisk._load, []

    def watched(self, part, files):
        real(self, part, files)
        held.append({self.part_of(name) for name, value in self.model.named_parameters() if not value.is_meta})

    monkeypatch.setattr(ModelOnDisk, "_load", watched)
    stream_sparsify(folder_of("llama"), tmp_path / "out", "50%", "wanda", batches, progress=False)
    assert held[0] == {0}  # what is outside of the blocks, for the probe and the capture
    assert held[1:4] == [{0, 1}, {0, 2}, {0, 3}]  # the probe, a block on each call
    assert held[4:] == [{1}, {2}, {3}]


def test_buffers_are_those_of_a_loaded_model(language_model, tmp_path):
    language_model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    wanted = dict(load_plain(tmp_path / "model").named_buffers())
    found = dict(ModelOnDisk(tmp_path / "model", CPU).model.named_buffers())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_blocks_that_mix_dtypes_run_in_their_own(folder_of, batches, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    from trisparse.sparsity import calibration

    real = LlamaMLP.forward
    own = nn.Parameter(torch.ones(32, 32))
    monkeypatch.setattr(calibration, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x) + 0 * (x @ own))
    compare(folder_of("llama"), tmp_path, "50%", "wanda", batches)


def test_the_result_is_an_ordinary_checkpoint(folder_of, batches, tokens, tmp_path):
    (tmp_path / "out").mkdir()
    stream_sparsify(folder_of("llama"), tmp_path / "out", "2:4", "wanda", batches, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    assert perplexity(load(tmp_path / "out"), tokens, seq_len=16) > 1
    assert torch.equal(  # and opens without trisparse
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, load(tmp_path / "out").lm_head.weight
    )


def test_joined_files_hold_what_the_parts_held(tmp_path):
    parts = [{"a": torch.arange(5, dtype=torch.uint8), "b": torch.ones(2, 3)}, {"c": torch.zeros(7)}]
    for index, part in enumerate(parts):
        save_file(part, tmp_path / f"{index}.safetensors", metadata={"format": "pt"})
    join_safetensors([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "all.safetensors")
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a", "b", "c"}
        for part in parts:
            for name, value in part.items():
                assert torch.equal(file.get_tensor(name), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "50% global"}, "scope 'global' ranks all layers together"),
        ({"method": "pruner-zero"}, "gradients, which need the whole model in memory"),
        ({"method": "pruner-zero", "gradients": 3}, "gradients must be a file, got int"),
        ({"propagate": "sideways"}, "propagate must be one of"),
        ({"hidden_states": "tape"}, "hidden_states must be one of memory, disk, got 'tape'"),
        ({"include": "lm_head"}, "lm_head.weight is outside of the repeated blocks"),
        ({"distributed": True}, "needs a process group"),
    ],
)
def test_what_cannot_be_streamed(folder_of, batches, tmp_path, options, message):
    arguments = {"sparsity": "50%", "method": "wanda", "data": batches, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        stream_sparsify(folder_of("llama"), tmp_path / "out", **arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense"]


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_index(folder, text):
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text(text)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20), "is damaged"),
        (lambda f: only_index(f, '{"weight_map": {"a": "b"}}'), "lacks b"),
        (lambda f: (f / "config.json").unlink(), "has no config.json of a model that transformers knows"),
        (lambda f: rewrite(f, lambda w: w.pop(NORM)), f"lacks {NORM}"),
        (lambda f: rewrite(f, lambda w: w.pop(UP)), f"lacks {UP}"),
        (lambda f: rewrite(f, lambda w: w.update({UP: torch.ones(3, 3)})), f"has another shape of {UP}"),
        (lambda f: rewrite(f, lambda w: w[UP].fill_(float("nan"))), f"NaN or Inf weights: {UP}"),
    ],
)
def test_damaged_folders(folder_of, batches, tmp_path, damage, message):
    folder = folder_of("llama", shard="1GB")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        stream_sparsify(folder, tmp_path / "out", "50%", "wanda", batches, progress=False)
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()


def test_broken_weights_without_data_are_found_in_their_turn(folder_of, tmp_path):
    folder = folder_of("llama", shard="1GB")
    rewrite(folder, lambda w: w[UP].fill_(float("inf")))
    with pytest.raises(ValueError, match=f"NaN or Inf weights: {UP}") as error:
        stream_sparsify(folder, tmp_path / "out", "50%", "magnitude", progress=False)
    assert "2 of 4 parts are finished" in error.value.__notes__[-1]


def test_architectures_that_are_refused(folder_of, batches, tmp_path):
    folder = folder_of("llama")
    settings = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"architectures": ["LlamaForTelepathy"]}, "transformers has no LlamaForTelepathy"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            ModelOnDisk(folder, CPU)


def test_encoder_and_decoder_are_refused(tokens, tmp_path):
    config = T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    data = [{"input_ids": tokens, "decoder_input_ids": tokens}]
    with pytest.raises(ValueError, match="runs 2 stacks of blocks"):
        stream_sparsify(tmp_path / "t5", tmp_path / "out", "50%", "wanda", data, progress=False)


def test_models_that_cannot_be_passed_through_are_refused(folder_of, batches, tmp_path, monkeypatch):
    folder = folder_of("llama")
    for chains, message in (
        ({0: Chain(broken_at="model.layers.1")}, r"one after the other.*at model\.layers\.1"),
        ({0: Chain(passes_through=False)}, "return more than hidden states"),
        ({}, "data reaches none of the weights"),
    ):
        monkeypatch.setattr(block_steps, "probe", lambda model, stacks, batch, chains=chains: chains)
        with pytest.raises(ValueError, match=message):
            stream_sparsify(folder, tmp_path / "out", "50%", "wanda", batches, progress=False)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["dense"]


def test_masks_that_are_not_those_of_the_checkpoint(folder_of, tmp_path):
    model = load_plain(folder_of("llama"))
    sparsify(model, "2:4", progress=False)
    folder = save(model, tmp_path / "once", form="dense")
    bits = load_file(folder / "trisparse_masks.safetensors")
    next(iter(bits.values()))[0, 0] ^= 1
    save_file(bits, folder / "trisparse_masks.safetensors")
    with pytest.raises(CheckpointError, match="weights are not 2:4"):
        ModelOnDisk(folder, CPU)
    (folder / "trisparse_masks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelOnDisk(folder, CPU)


@pytest.mark.parametrize("place", ["dense", "link", "dense/pruned", "."])
def test_the_source_is_not_replaced(folder_of, tmp_path, place):
    folder = folder_of("llama")
    sparsify(model := load_plain(folder), "1:4", progress=False)
    save(model, folder := tmp_path / "once" / "dense", form="dense")  # a checkpoint of ours, which out might replace
    (tmp_path / "once" / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="are one inside the other"):
        stream_sparsify(folder, tmp_path / "once" / place, "2:4", progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_cannot_be_renamed(folder_of, tmp_path, monkeypatch):
    folder = folder_of("llama")
    (tmp_path / "out" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "inner")
    for out in (".", tmp_path / "out"):
        with pytest.raises(ValueError, match="is the current directory, or holds it"):
            stream_sparsify(folder, out, "2:4", progress=False)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "volume")
    with pytest.raises(ValueError, match="is a mount point"):
        stream_sparsify(folder, tmp_path / "volume", "2:4", progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "out"]


def test_only_our_own_folder_is_replaced(folder_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    folder = folder_of("llama")
    with pytest.raises(ValueError, match="is not a trisparse checkpoint"):
        stream_sparsify(folder, tmp_path / "out", progress=False)
    stream_sparsify(folder, tmp_path / "other", "1:4", progress=False)
    stream_sparsify(folder, tmp_path / "other", "2:4", progress=False)
    assert {str(mask.pattern) for mask in masks(load(tmp_path / "other")).values()} == {"2:4"}
