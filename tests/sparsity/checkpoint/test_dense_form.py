import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from trisparse.sparsity import checkpoint
from trisparse.sparsity.checkpoint import CheckpointError, check_output, load, save, writer
from trisparse.sparsity.mask import MaskError, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture
def saved(model_named, tmp_path):
    model = model_named("llama")
    sparsify(model, "2:4", progress=False)
    return model, save(model, tmp_path / "pruned", form="dense", recipe=[{"step": "prune"}])


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_every_language_model_comes_back(language_model, tokens, tmp_path):
    sparsify(language_model, "50%", progress=False)
    save(language_model, tmp_path / "pruned", form="dense")
    again = load(tmp_path / "pruned")
    assert masks_sha256(again) == masks_sha256(language_model)
    assert torch.equal(logits(again, tokens), logits(language_model, tokens))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(logits(plain, tokens), logits(language_model, tokens))


def test_vision_model_and_plain_module_come_back(model_named, tmp_path):
    resnet = model_named("resnet")
    sparsify(resnet, "50% global", progress=False)
    save(resnet, tmp_path / "resnet", form="dense")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "resnet")(x).logits, resnet(x).logits)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path / "resnet")(x).logits, resnet(x).logits)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain[1].weight = plain[0].weight
    sparsify(plain, "2:4", progress=False)
    save(plain, tmp_path / "plain", form="dense")
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other[1].weight = other[0].weight
    assert load(tmp_path / "plain", into=other) is other
    assert torch.equal(other[0].weight, plain[0].weight)
    assert masks_sha256(other) == masks_sha256(plain)
    with pytest.raises(CheckpointError, match="does not fit into the given Linear"):
        load(tmp_path / "plain", into=nn.Linear(3, 3))


def test_patterns_and_recipe_come_back(saved):
    _, path = saved
    assert {str(mask.pattern) for mask in masks(load(path)).values()} == {"2:4"}
    assert checkpoint.read_info(path)["recipe"] == [{"step": "prune"}]


def test_dtype_can_be_chosen(saved):
    assert load(saved[1], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pruned_weight_that_came_back_is_not_saved(saved, tmp_path):
    model, _ = saved
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    with pytest.raises(MaskError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        save(model, tmp_path / "other", form="dense")
    assert not (tmp_path / "other").exists()
    assert os.listdir(tmp_path) == ["pruned"]


def test_only_our_own_folder_is_replaced(saved, tmp_path):
    model, path = saved
    sparsify(model, "1:4", progress=False)
    save(model, path, form="dense")
    assert {str(mask.pattern) for mask in masks(load(path)).values()} == {"1:4"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    check_output(foreign)  # an empty folder is free
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a trisparse checkpoint"):
        save(model, foreign, form="dense")
    assert (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="exists and is not"):
        check_output(foreign / "thesis.txt")
    assert sorted(os.listdir(tmp_path)) == ["foreign", "pruned"]


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch, tmp_path):
    model, path = saved
    before = sorted(os.listdir(path))

    def full(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save(model, path, form="dense")
    assert sorted(os.listdir(path)) == before
    assert os.listdir(tmp_path) == ["pruned"]
    load(path)


@pytest.mark.parametrize("broken", [{"new"}, {"new", "old"}])
def test_a_failed_rename_loses_nothing(saved, monkeypatch, tmp_path, broken):
    model, path = saved
    before = (path / "model.safetensors").read_bytes()
    rename = Path.rename

    def refused(self, target):
        if self.name in broken:
            raise OSError(f"{self.name} may not move")
        return rename(self, target)

    sparsify(model, "1:4", progress=False)
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="new may not move") as raised:
        save(model, path, form="dense")
    if broken == {"new"}:
        assert os.listdir(tmp_path) == ["pruned"]
        assert (path / "model.safetensors").read_bytes() == before
        return
    (work,) = tmp_path.iterdir()
    assert f"the earlier folder is {work / 'old'}, the new one {work / 'new'}" in str(raised.value)
    assert (work / "old" / "model.safetensors").read_bytes() == before
    assert {str(mask.pattern) for mask in masks(load(work / "new")).values()} == {"1:4"}


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o022, 0o755)])
def test_the_folder_has_the_permissions_of_the_umask(saved, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(saved[0], tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == mode


def test_behind_a_symbolic_link_its_folder_is_replaced(saved, tmp_path):
    model, path = saved
    (tmp_path / "link").symlink_to(path)
    sparsify(model, "1:4", progress=False)
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {str(mask.pattern) for mask in masks(load(path)).values()} == {"1:4"}
    assert sorted(os.listdir(tmp_path)) == ["link", "pruned"]


def edit_info(path, change):
    file = path / checkpoint.INFO_FILE
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / checkpoint.INFO_FILE).unlink(), "not a trisparse checkpoint"),
        (lambda p: (p / checkpoint.INFO_FILE).write_text("{"), "damaged"),
        (lambda p: (p / checkpoint.INFO_FILE).write_text("[]"), "lists no targets"),
        (lambda p: (p / checkpoint.MASKS_FILE).unlink(), "cannot be read"),
        (lambda p: (p / checkpoint.MASKS_FILE).write_bytes(b"\xff" * 20), "cannot be read"),
        (lambda p: edit_info(p, lambda i: i.update(version=3)), "version 3"),
        (lambda p: edit_info(p, lambda i: i["targets"].pop(NAME)), "list different weights"),
        (lambda p: edit_info(p, lambda i: i["targets"][NAME].pop("cols")), f"damaged at {NAME}"),
        (lambda p: edit_info(p, lambda i: i["targets"][NAME].update(pattern="9:4")), f"damaged at {NAME}"),
        (lambda p: edit_info(p, lambda i: i["targets"][NAME].update(cols=16)), f"damaged at {NAME}"),
        (lambda p: edit_info(p, lambda i: i.update(masks_sha256="0")), "do not match their hash"),
    ],
)
def test_damage_is_noticed(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_flipped_mask_bit_is_noticed(saved):
    _, path = saved
    bits = load_file(path / checkpoint.MASKS_FILE)
    group = int(bits[NAME][0, 0]) & 0xF
    bits[NAME][0, 0] ^= 0xF  # the other two of the group: 2:4 still
    assert group.bit_count() == 2
    save_file(bits, path / checkpoint.MASKS_FILE)
    with pytest.raises(CheckpointError, match=r"do not match their hash|are not 2:4"):
        load(path)
    bits[NAME][0, 0] ^= 1
    save_file(bits, path / checkpoint.MASKS_FILE)
    with pytest.raises(CheckpointError, match="weights are not 2:4"):
        load(path)


def test_a_weight_that_is_not_zero_in_the_file_is_noticed(saved):
    _, path = saved
    weights = load_file(path / "model.safetensors")
    weights[NAME][:] = 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MaskError, match="pruned weights are not zero"):
        load(path)
