"""Adapters that were not merged, in a folder of their own: written whole, and put on their own model alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from trisparse.retrain.adapter_folder import load_adapted_model, save_adapters
from trisparse.retrain.perp import retrain
from trisparse.sparsity.checkpoint import ADAPTERS_FILE, CheckpointError, load, read_info, save
from trisparse.sparsity.mask import detach, masks
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture
def folders(build, tokens, quick, tmp_path):
    """``base`` and ``adapters`` in tmp_path, and the model under its adapters."""
    save(build("llama"), tmp_path / "base")
    model = load(tmp_path / "base")
    report = retrain(model, tokens, quick(merge=False, variant="lora_prune"), progress=False)
    save_adapters(report.peft_model, tmp_path / "adapters", base=tmp_path / "base", recipe=[{"step": "retrain"}])
    return tmp_path, report.peft_model


def test_the_folder_gives_the_same_model_back(folders, tokens):
    folder, model = folders
    loaded, recipe = load_adapted_model(folder / "adapters")
    assert isinstance(loaded, PeftModel)
    assert recipe == [{"step": "retrain"}]
    assert len(masks(loaded)) == 14
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
        assert not torch.equal(loaded(tokens).logits, load(folder / "base")(tokens).logits)
    with safe_open(folder / "adapters" / "adapter_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "base_layer" in name or "embed_tokens" in name]  # noqa: SIM118


def test_an_earlier_result_is_replaced_and_nothing_else(folders, tmp_path):
    folder, model = folders
    (folder / "adapters" / "stale").touch()
    save_adapters(model, folder / "adapters", base=folder / "base")
    assert not (folder / "adapters" / "stale").exists()
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is not a trisparse checkpoint"):
        save_adapters(model, folder / "other", base=folder / "base")
    for path in (folder / "base", folder):
        with pytest.raises(ValueError, match="holds the pruned model that the adapters belong to"):
            save_adapters(model, path, base=folder / "base")
    with pytest.raises(CheckpointError, match="is not a trisparse checkpoint"):
        save_adapters(model, folder / "new", base=folder / "other")
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "base", "other"]


def test_adapters_of_other_masks_or_of_a_model_that_is_gone_are_refused(folders):
    folder, _ = folders
    model = load(folder / "base")
    for module in model.modules():
        detach(module)
    sparsify(model, "1:4", "magnitude", progress=False)
    save(model, folder / "base")
    with pytest.raises(CheckpointError, match="were trained for other masks than those of"):
        load_adapted_model(folder / "adapters")
    shutil.rmtree(folder / "base")
    with pytest.raises(CheckpointError, match=r"which is not there; trisparse_adapters\.json names it"):
        load_adapted_model(folder / "adapters")


def test_adapters_of_other_weights_are_refused(folders):
    folder, _ = folders
    model = load(folder / "base")
    save(model, folder / "base")
    load_adapted_model(folder / "adapters")  # the same once more
    with torch.no_grad():
        model.model.embed_tokens.weight[-1, -1] += 1
    save(model, folder / "base")
    with pytest.raises(CheckpointError, match="were trained for other weights than those of"):
        load_adapted_model(folder / "adapters")


def test_a_damaged_folder_is_named(folders):
    folder, _ = folders
    with pytest.raises(CheckpointError, match=r"it has no trisparse_adapters\.json"):
        load_adapted_model(folder / "base")
    with pytest.raises(CheckpointError, match="holds adapters and not a whole model"):
        read_info(folder / "adapters")
    file = folder / "adapters" / ADAPTERS_FILE
    for text in ("{", "[]", json.dumps({"base": str(folder / "base")})):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"trisparse_adapters\.json is damaged"):
            load_adapted_model(folder / "adapters")
