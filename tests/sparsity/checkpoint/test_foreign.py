"""compressed-tensors' sparse checkpoints, against what compressed-tensors 0.14.0.1 itself makes of them (vectors/)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trisparse
from trisparse.sparsity.checkpoint import CheckpointError, load
from trisparse.sparsity.foreign.compressed_tensors import load_compressed_tensors, sparse_format
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import check_masks, masks, masks_sha256

VECTORS = Path(__file__).parent / "vectors"
NAMES = ["24-bf16", "24-fp16-odd", "bitmask-fp32-odd", "bitmask-bf16-sharded"]
LAYER = "model.layers.0."


def stored_bits(folder):
    """Each weight's bits in the files, unpacked here by numpy."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for name, bits in tensors.items():
        if name.endswith(".bitmask"):
            base = name.removesuffix(".bitmask")
            shape = tensors[f"{base}.shape"].flatten().tolist()
            unpacked = np.unpackbits(bits.numpy(), axis=-1, count=shape[-1], bitorder="little")
            found[f"{base}.weight"] = torch.from_numpy(unpacked).bool()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_library_decompresses(name):
    expected = load_file(VECTORS / name / "expected.safetensors")
    found = load(VECTORS / name).state_dict()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].dtype == weight.dtype
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", ["24-bf16", "24-fp16-odd"])
def test_the_bits_of_two_four_are_the_masks(name):
    model = load(VECTORS / name)
    bits = stored_bits(VECTORS / name)
    found = masks(model)
    assert found.keys() == bits.keys()
    assert all(torch.equal(found[key].matrix(), keep) for key, keep in bits.items())
    odd = LAYER + "mlp.down_proj.weight"
    patterns = {key: str(mask.pattern) for key, mask in found.items()}
    if name == "24-fp16-odd":  # 18 columns: two of every four in memory order, across the rows
        assert patterns.pop(odd) == "50% layer"
    else:  # rows of zeros, of which two in every four are kept all the same
        up = LAYER + "mlp.up_proj.weight"
        assert not model.get_parameter(up)[:4].any()
        assert found[up].matrix()[:4].sum() == 4 * 8
    assert set(patterns.values()) == {"2:4"}
    check_masks(model)


def test_the_bits_of_sparse_bitmask_are_zeros_and_their_pattern_is_found():
    model = load(VECTORS / "bitmask-bf16-sharded")
    patterns = {key.removeprefix(LAYER): str(mask.pattern) for key, mask in masks(model).items()}
    assert patterns == {
        "self_attn.q_proj.weight": "53.125% layer",  # one of its rows is empty
        "self_attn.v_proj.weight": "4:8",
        "self_attn.o_proj.weight": "4:8",
        "mlp.gate_proj.weight": "4:8",
        "mlp.up_proj.weight": "4:8",
        "mlp.down_proj.weight": "4:8",
    }  # and none of k_proj, which is stored as bits and has no zeros
    check_masks(model)
    odd = masks(load(VECTORS / "bitmask-fp32-odd"))
    bits = stored_bits(VECTORS / "bitmask-fp32-odd")
    assert all(torch.equal(odd[key].matrix(), keep) for key, keep in bits.items())
    assert len(odd) == 7


def test_dtype_and_form_can_be_chosen_and_the_result_is_saved_as_ours(tmp_path):
    model = load(VECTORS / "24-bf16", dtype=torch.float32)
    assert model.dtype == torch.float32
    compressed = load(VECTORS / "24-bf16", form="compressed")
    assert any(isinstance(module, SparseLinear) for module in compressed.modules())
    assert masks_sha256(compressed) == masks_sha256(model)
    trisparse.save(model, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert masks_sha256(again) == masks_sha256(model)
    with pytest.raises(ValueError, match="without into and device_map"):
        load(VECTORS / "24-bf16", into=model)


def test_names_of_the_oldest_releases_are_read(tmp_path):
    """compressed-tensors 0.3 wrote NAME.weight.bitmask where later ones write NAME.bitmask."""
    shutil.copytree(VECTORS / "bitmask-fp32-odd", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    parts = ("shape", "bitmask", "compressed", "row_offsets")
    renamed = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        renamed[f"{base}.weight.{part}" if part in parts else name] = tensor
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert sparse_format(tmp_path / "old") == "sparse-bitmask"
    old, new = load(tmp_path / "old"), load(VECTORS / "bitmask-fp32-odd")
    assert all(torch.equal(w, new.state_dict()[n]) for n, w in old.state_dict().items())
    assert masks_sha256(old) == masks_sha256(new)


def test_masks_of_experts_are_stacked_with_their_weights(model_named, tmp_path):
    """transformers holds Mixtral's experts in one parameter, the file one by one and under other names."""
    model = model_named("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored, kept = {}, {}
    for name, weight in tensors.items():
        if ".experts." not in name:
            stored[name] = weight
            continue
        keep = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
        keep.scatter_(1, weight.reshape(-1, 4).abs().topk(2).indices, True)
        keep = keep.reshape(weight.shape)
        base = name.removesuffix(".weight")
        stored[f"{base}.shape"] = torch.tensor(weight.shape).reshape(-1, 1)
        stored[f"{base}.bitmask"] = torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little"))
        stored[f"{base}.compressed"] = weight[keep].reshape(weight.shape[0], -1)
        kept[name] = keep
    assert len(kept) == 3 * 4 * 3
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    found = masks(loaded)
    assert len(found) == 6  # gate_up_proj and down_proj of three blocks
    assert {str(mask.pattern) for mask in found.values()} == {"2:4"}
    block = "model.layers.1.mlp.experts"
    dense = model.get_parameter(f"{block}.down_proj")
    keep = found[f"{block}.down_proj"].dense()
    for expert in range(4):
        (name,) = (n for n in kept if ".layers.1." in n and f"experts.{expert}.w2" in n)
        assert torch.equal(keep[expert], kept[name])
    assert torch.equal(loaded.get_parameter(f"{block}.down_proj"), dense * keep)
    check_masks(loaded)


def test_a_folder_that_is_none_of_these(tmp_path):
    assert sparse_format(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"sparsity_config": {"format": "dense"}}}')
    assert sparse_format(tmp_path) is None
    with pytest.raises(CheckpointError, match="no sparse checkpoint"):
        load_compressed_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="is not a trisparse checkpoint"):
        load(tmp_path)
