"""Damaged, truncated and hostile checkpoints: a CheckpointError that names the file and the tensor, never a model."""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trisparse.sparsity.checkpoint import CheckpointError, files, load, save
from trisparse.sparsity.mask import MaskError, bits_sha256
from trisparse.sparsity.sparsify import sparsify

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(model_named, tmp_path):
    """Layers of each form: 2:4, 4:8, bitmask and one that is stored dense."""
    model = model_named("llama")
    sparsify(model, "2:4", include=UP, progress=False)
    sparsify(model, "4:8", include=DOWN, progress=False)
    sparsify(model, "50% layer", include=Q, progress=False)
    sparsify(model, "3%", include="model.layers.1.mlp.up_proj", progress=False)
    return save(model, tmp_path / "pruned")


def tensors(change):
    def damage(path):
        content = load_file(path / "model.safetensors")
        change(content)
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(change):
    def damage(path):
        content = json.loads((path / "config.json").read_text())
        change(content["quantization_config"])
        (path / "config.json").write_text(json.dumps(content))

    return damage


def entry(name, **values):
    return config(lambda content: content["targets"][f"{name}.weight"].update(values))


def set_to(name, value):
    return tensors(lambda content: content.update({name: value(content[name])}))


def with_(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def header(change):
    """Rewrite the JSON header of the weights, as text."""

    def damage(path):
        data = (path / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + length].decode().rstrip()).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def replace_offsets(text):
    content = json.loads(text)
    content[f"{UP}.meta"]["data_offsets"][0] += 2
    content[f"{UP}.meta"]["data_offsets"][1] += 2
    return json.dumps(content)


CASES = {
    "places that do not ascend": (set_to(f"{UP}.meta", lambda m: with_(m, (0, 0), 0x0044)), f"{UP}.weight: meta has"),
    "descending places": (set_to(f"{UP}.meta", lambda m: with_(m, (0, 0), 0x1444)), "do not ascend"),
    "another 2:4 mask": (set_to(f"{UP}.meta", lambda m: m.fill_(0x4444)), f"{UP}.weight: the mask does not match"),
    "not 4:8": (set_to(f"{DOWN}.bitmask", lambda b: with_(b, (0, 0), 1)), "the bitmask is not 4:8"),
    "a row moved": (set_to(f"{DOWN}.bitmask", lambda b: b.flip(0).contiguous()), "does not match its hash"),
    "bits without values": (set_to(f"{Q}.bitmask", lambda b: b.fill_(255)), "row_offsets do not fit the bitmask"),
    "offsets that fall": (set_to(f"{Q}.row_offsets", lambda o: with_(o, 1, 10**9)), "row_offsets do not fit"),
    "negative offsets": (set_to(f"{Q}.row_offsets", lambda o: with_(o, 0, -5)), "row_offsets do not fit"),
    "values of another shape": (set_to(f"{UP}.values", lambda v: v[:, 1:].contiguous()), rf"{UP}\.values: it is"),
    "fewer values": (set_to(f"{Q}.values", lambda v: v[1:].contiguous()), rf"{Q}\.values: it is"),
    "indices of another dtype": (set_to(f"{UP}.meta", lambda m: m.to(torch.int32)), rf"{UP}\.meta: it is torch.int32"),
    "indices that are floats": (set_to(f"{Q}.row_offsets", lambda o: o.double()), r"row_offsets: it is torch.float64"),
    "values that are integers": (set_to(f"{UP}.values", lambda v: v.to(torch.int32)), r"values: it is torch.int32"),
    "a tensor is gone": (tensors(lambda c: c.pop(f"{UP}.meta")), rf"has no {UP}\.meta"),
    "a tensor too many": (tensors(lambda c: c.update({"x.meta": torch.zeros(1)})), r"x\.meta: no weight is listed"),
    "a dense mask flipped": (set_to("trisparse_masks.0", lambda b: b ^ 1), "mask keeps|does not match its hash"),
    "a pruned dense weight": (
        set_to("model.layers.1.mlp.up_proj.weight", lambda w: w.fill_(1)),
        r"layers\.1\.mlp\.up_proj\.weight: \d+ pruned weights are not zero",
    ),
    "truncated": (
        lambda p: os.truncate(p / "model.safetensors", os.path.getsize(p / "model.safetensors") - 8),
        "bytes",
    ),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "cannot be read"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "cannot be read"),
    "a huge header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64), "does not fit the file"),
    "no JSON": (header(lambda t: "x" + t[1:]), "no JSON object"),
    "a tensor twice": (header(lambda t: t[:-1] + f', "{UP}.meta": ' + "{}}"), "is there twice"),
    "a huge shape": (header(lambda t: t.replace('"shape":[', '"shape":[4611686018427387904,', 1)), "does not fit its"),
    "overlapping tensors": (header(replace_offsets), "bytes begin at"),
    "a newer version": (config(lambda c: c.update(version=2)), "has version 2, this trisparse reads 1"),
    "no targets": (config(lambda c: c.update(targets=[])), "lists no targets"),
    "another hash": (config(lambda c: c.update(masks_sha256="0")), "do not match their hash"),
    "another mask's hash": (entry(UP, sha256="0"), "do not match their hash"),
    "an unknown format": (entry(UP, format="zip"), rf"{UP}\.weight: format 'zip'"),
    "an unknown key": (entry(UP, code="1"), "unknown 'code'"),
    "a shape that is huge": (entry(UP, shape=[2**40, 2**40]), "cannot be"),
    "a shape that is no list": (entry(UP, shape="8"), "no list of integers"),
    "kept of a float": (entry(UP, kept=0.5), "must be integers"),
    "another pattern": (entry(UP, pattern="50%"), "is not stored as '2:4'"),
    "another shape": (entry(UP, shape=[16, 16], kept=128), "do not match|has shape|it is torch"),
    "a recipe that is none": (config(lambda c: c.update(recipe=3)), "recipe is no list"),
    "a duplicate key": (
        lambda p: (p / "config.json").write_text('{"a": 1, "a": 2, "quantization_config": {}}'),
        "'a' is there twice",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_noticed(saved, name):
    damage, message = CASES[name]
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)
    if name not in ("a duplicate key", "no weights"):  # transformers reads config.json and looks for files by itself
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(saved)


def test_hashes_do_not_make_a_wrong_structure_right(saved):
    """Whoever changes the bits can change the hashes too: what kernels rely on is checked by itself."""
    bits = load_file(saved / "model.safetensors")[f"{Q}.bitmask"]
    bits[0, 0] ^= 3 if bits[0, 0] & 1 != bits[0, 0] >> 1 & 1 else 1  # as many bits where they were one of each
    set_to(f"{Q}.bitmask", lambda _: bits)(saved)
    content = json.loads((saved / "config.json").read_text())["quantization_config"]["targets"][f"{Q}.weight"]
    entry(Q, sha256=bits_sha256(bits, tuple(content["shape"]), content["shape"][1], False))(saved)
    with pytest.raises(CheckpointError, match=r"do not match their hash|row_offsets do not fit"):
        load(saved)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, "weights.bin"])
def test_an_index_that_leaves_the_folder_is_refused(saved, shard):
    (saved / "model.safetensors").rename(saved.parent / "model.safetensors")
    names = load_file(saved.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no safetensors file of the folder"):
        load(saved)
    if shard == "../model.safetensors":
        with pytest.raises(CheckpointError, match="outside of it"):
            AutoModelForCausalLM.from_pretrained(saved)


def test_large_json_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="is larger than"):
        load(saved)


def test_save_pretrained_checks_the_masks(saved):
    """A folder that could not be loaded again is not written."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1)
    with pytest.raises(MaskError, match=r"layers\.1\.mlp\.up_proj"):
        model.save_pretrained(saved.parent / "again")
    assert not (saved.parent / "again" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.1.mlp.up_proj", "2:4"),
        ("model.layers.1.mlp.up_proj", "50%"),
        ("model.layers.1.mlp.up_proj", "3% rows"),
        (Q, "90% layer"),
        (Q, "90%"),
        (Q, "90% balanced"),
        (Q, "50% rows"),
    ],
)
@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_a_pattern_that_is_not_the_masks(saved, name, pattern, form):
    """No hash covers the name of the pattern: it is held against the mask."""
    if form == "compressed":
        entry(name, pattern=pattern)(saved)
    else:
        save(load(saved), saved, form="dense")
        content = json.loads((saved / "trisparse.json").read_text())
        content["targets"][f"{name}.weight"]["pattern"] = pattern
        (saved / "trisparse.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"damaged at {re.escape(name)}.weight: .* (is|are) not {pattern}"):
        load(saved)


def test_a_mask_of_as_many_weights_in_other_groups(model_named, tmp_path):
    model = model_named("llama")
    sparsify(model, "50%", include=UP, progress=False)
    path = save(model, tmp_path / "pruned", form="dense")
    content = json.loads((path / "trisparse.json").read_text())
    content["targets"][f"{UP}.weight"]["pattern"] = "2:4"
    (path / "trisparse.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the bitmask is not 2:4"):
        load(path)
