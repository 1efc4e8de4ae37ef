"""The config of LoRA on compressed layers: which layer gets what, adapters in a folder, wrong input."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from trisparse.retrain.lora import MaskLoraLinear, mask_lora_modules
from trisparse.retrain.lora_layer import VARIANTS
from trisparse.retrain.masked_product import masked_product
from trisparse.retrain.sparse_lora import SparseLoraLinear
from trisparse.retrain.sparse_lora_config import SparseLoraConfig, load_adapters, sparse_lora_modules
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.pattern import NM


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_come_back_from_peft_s_own_format(lora, variant, tmp_path):
    x = torch.randn(5, 32)
    _, peft, _ = lora.wrapped(variant, dtype=torch.float32)
    want = peft(x)
    peft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["variant"] == variant

    def fresh():
        return nn.Sequential(lora.sparse(dtype=torch.float32))

    loaded = load_adapters(fresh(), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(x), want)
    assert not any(param.requires_grad for param in loaded.parameters())
    by_peft = PeftModel.from_pretrained(fresh(), tmp_path, config=SparseLoraConfig.from_pretrained(tmp_path))
    assert torch.equal(by_peft(x), want)
    # after `import trisparse`, PEFT reads the variant by itself
    assert torch.equal(PeftModel.from_pretrained(fresh(), tmp_path)(x), want)

    load_adapters(loaded, tmp_path, "second", is_trainable=True)
    loaded.set_adapter("second")
    assert torch.equal(loaded(x), want)
    assert all(param.requires_grad for param in lora.factors(loaded.base_model.model[0], "second"))
    with pytest.raises(ValueError, match="already"):
        load_adapters(loaded, tmp_path, "second")
    loaded.load_adapter(tmp_path, "third")
    loaded.set_adapter("third")
    assert torch.equal(loaded(x), want)
    other = next(name for name in VARIANTS if name != variant)
    with pytest.raises(ValueError, match=f"{other}.*{variant}"):
        load_adapters(fresh(), tmp_path, variant=other)


def test_an_adapter_of_peft_s_own_lora_runs_on_the_compressed_model(lora, tmp_path):
    dense = lora.dense(NM(2, 4), dtype=torch.float32)
    trained = get_peft_model(nn.Sequential(dense), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 32)
    want = trained(x)
    trained.save_pretrained(tmp_path)
    compressed = nn.Sequential(lora.sparse(dtype=torch.float32))
    with pytest.raises(ValueError, match="names no variant"):
        load_adapters(compressed, tmp_path)
    torch.testing.assert_close(load_adapters(compressed, tmp_path, variant="lora")(x), want)


def test_wrapping_does_not_decompress(lora, monkeypatch):
    def refuse(self):
        raise AssertionError("decompressed")

    base = lora.sparse()
    monkeypatch.setattr(SparseLinear, "weight", property(refuse))
    get_peft_model(nn.Sequential(base), lora.config("mask_lora"))


def test_layers_that_stay_dense(lora):
    def model():
        return nn.Sequential(lora.sparse(), lora.dense(NM(2, 4), cols=24), nn.Linear(24, 8).double())

    peft = get_peft_model(model(), lora.config("mask_lora", targets=["0", "1", "2"]))
    kinds = [type(layer) for layer in peft.base_model.model]
    assert kinds == [SparseLoraLinear, MaskLoraLinear, MaskLoraLinear]
    peft.merge_and_unload()
    peft = get_peft_model(model(), lora.config("scale_lora", targets=["0", "1", "2"]))
    layers = peft.base_model.model
    assert [type(layer) for layer in layers] == kinds
    # nothing is pruned in the last one, where every variant is plain LoRA
    assert [layer.variant["default"] for layer in layers] == ["scale_lora", "scale_lora", "lora"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"start": "pissa"}, "init_lora_weights"),
        ({"start": "orthogonal"}, "init_lora_weights"),
    ],
)
def test_unsupported_options_are_refused(lora, options, match):
    start = options.pop("start", False)
    with pytest.raises(ValueError, match=f"lora_prune does not implement {match}"):
        lora.wrapped("lora_prune", start=start, options=options)


def test_wrong_input(lora):
    with pytest.raises(ValueError, match=r"variant must be one of lora, .* got 'mask'"):
        sparse_lora_modules(LoraConfig(), "mask")
    with pytest.raises(ValueError, match="all-linear"):
        sparse_lora_modules(LoraConfig(target_modules="all-linear"))
    plain = LoraConfig(r=2, target_modules=["0"])
    plain._register_custom_module({SparseLinear: SparseLoraLinear})
    with pytest.raises(ValueError, match="sparse_lora_modules"):
        get_peft_model(nn.Sequential(lora.sparse()), plain)
    with pytest.raises(ValueError, match="must be a SparseLinear"):
        SparseLoraLinear(nn.Linear(2, 2), "default", config=lora.config("lora"), r=2)
    with pytest.raises(ValueError, match="positive"):
        lora.wrapped("lora", options={"rank_pattern": {"0": 0}})
    base, peft, wrapper = lora.wrapped("mask_lora")
    x = torch.randn(5, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="adapter_names"):
        wrapper(x, adapter_names=["default"])
    peft.add_adapter("other", lora.config("lora"))
    peft.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one variant at a time"):
        peft(x)
    a, b = torch.randn(2, 32, dtype=torch.float64), torch.randn(24, 2, dtype=torch.float64)
    for arguments, match in (
        ((x[:, :16], base, a, b), "x has shape"),
        ((x, base, a[:, :16], b), "a has shape"),
        ((x, base, a[:0], b[:, :0]), "a has shape"),
        ((x, base, a, b[:8]), "b has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            masked_product(*arguments)


def test_dense_and_compressed_layers_agree(lora):
    """mask_lora of PERP's dense layer and of the compressed one, from the same factors."""
    layer = lora.dense(NM(2, 4), dtype=torch.float32)
    ours = get_peft_model(nn.Sequential(SparseLinear.from_dense(layer)), lora.config("mask_lora"))
    theirs = get_peft_model(
        nn.Sequential(layer),
        mask_lora_modules(
            LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=["0"], init_lora_weights=False)
        ),
    )
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" in k}, strict=False)
    x = torch.randn(5, 32)
    assert torch.equal(ours(x), theirs(x))
