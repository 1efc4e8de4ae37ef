"""Write the compressed-tensors checkpoints of ``vectors/``: run it where compressed-tensors 0.14.0.1 is installed.

    python -m venv vectors-venv
    vectors-venv/bin/pip install compressed-tensors==0.14.0.1 transformers==4.57.1 torch accelerate
    vectors-venv/bin/python tests/sparsity/checkpoint/make_foreign_vectors.py

0.14 is the last release that writes and reads these formats, and asks for a transformers older than ours. Every folder
holds a checkpoint as that library writes it and ``expected.safetensors``, which is what the library itself
decompresses it to.
"""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VECTORS = Path(__file__).parent / "vectors"


def tiny_llama(dtype, hidden=16, intermediate=24, vocabulary=12):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def prune_groups(weight, keep, group):
    """Zero all but the ``keep`` largest of every ``group`` neighbours, in memory order."""
    grouped = weight.view(-1, group)
    dropped = grouped.abs().argsort(dim=1, stable=True)[:, : group - keep]
    grouped.scatter_(1, dropped, 0)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def write(name, model, sparsity_config, *, max_shard_size="5GB"):
    folder = VECTORS / name
    shutil.rmtree(folder, ignore_errors=True)
    compressor = ModelCompressor(sparsity_config=sparsity_config)
    state = compressor.compress(model, model.state_dict())
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    compressor.update_config(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = dict(compressor.sparsity_compressor.decompress(str(folder)))
    expected = {key: value.contiguous() for key, value in expected.items()}
    save_file(expected, folder / "expected.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["version"] == __version__ == "0.14.0.1"
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
    print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


def main():
    targets = {"targets": ["Linear"], "ignore": ["lm_head"]}

    model = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        for layer in linears(model).values():
            prune_groups(layer.weight.data, 2, 4)
        model.model.layers[0].mlp.up_proj.weight[:4] = 0  # kept weights that are zero: the bits say which
    write("24-bf16", model, Sparse24BitMaskConfig(**targets))

    model = tiny_llama(torch.float16, intermediate=18)  # 18 inputs of down_proj: groups of 4 span its rows
    with torch.no_grad():
        for layer in linears(model).values():
            prune_groups(layer.weight.data, 2, 4)
    write("24-fp16-odd", model, Sparse24BitMaskConfig(**targets))

    model = tiny_llama(torch.float32, intermediate=27)  # 27 inputs: padded bits
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.6] = 0
    write("bitmask-fp32-odd", model, BitmaskConfig(**targets))

    model = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        for layer in linears(model).values():
            prune_groups(layer.weight.data, 4, 8)
        model.model.layers[0].self_attn.q_proj.weight[3] = 0  # an empty row
        model.model.layers[0].self_attn.k_proj.weight[:] = torch.randn(8, 16)  # left dense, stored as bits all the same
    write("bitmask-bf16-sharded", model, BitmaskConfig(**targets), max_shard_size="2KB")


if __name__ == "__main__":
    main()
