"""The plugin of vLLM by vLLM's protocol: tests/vllm_protocol.py stands in for it."""

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trisparse.sparsity.checkpoint import CheckpointError, save
from trisparse.sparsity.checkpoint.info import Manifest
from trisparse.sparsity.mask import masks
from trisparse.sparsity.sparsify import sparsify

_spec = importlib.util.spec_from_file_location("vllm_protocol", Path(__file__).with_name("vllm_protocol.py"))
protocol = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(protocol)

HIDDEN, HEADS, KV, HEAD, MIDDLE = 64, 4, 2, 16, 96
BLOCK = "model.layers.0"
PATTERNS = ["2:4", "1:4", "50%", "60% layer"]


@pytest.fixture
def vllm(monkeypatch):
    return protocol.install(monkeypatch)


def pruned(pattern, **sparsify_options):
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    if pattern:
        sparsify(model, pattern, "magnitude", progress=False, **sparsify_options)
    return model


def stored(model, folder):
    """The checkpoint's tensors as vLLM iterates over them, and its quantization_config."""
    save(model, folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return load_file(folder / "model.safetensors"), config


def build(quant_config):
    """The linear layers of vLLM's Llama block, by the names that vLLM gives them."""
    model = nn.Module()
    quant_config.packed_modules_mapping.update(protocol.PACKED)
    common = {"quant_config": quant_config}
    attention, mlp = f"{BLOCK}.self_attn", f"{BLOCK}.mlp"
    layers = {
        f"{attention}.qkv_proj": lambda name: protocol.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV, prefix=name, **common
        ),
        f"{attention}.o_proj": lambda name: protocol.RowParallelLinear(HIDDEN, HIDDEN, prefix=name, **common),
        f"{mlp}.gate_up_proj": lambda name: protocol.MergedColumnParallelLinear(
            HIDDEN, [MIDDLE, MIDDLE], bias=False, prefix=name, **common
        ),
        f"{mlp}.down_proj": lambda name: protocol.RowParallelLinear(MIDDLE, HIDDEN, bias=False, prefix=name, **common),
    }
    for name, make in layers.items():
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent.add_module(part, getattr(parent, part, None) or nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, make(name))
    return model


def load(tensors, config, classes, *, order=sorted):
    quant_config = classes.from_config(config)
    model = build(quant_config)
    wanted = [name for name in order(tensors) if "_proj." in name or name.startswith("trisparse_masks")]
    protocol.load_weights(model, ((name, tensors[name].clone()) for name in wanted), quant_config, protocol.STACKED)
    protocol.process_weights_after_loading(model)
    return model


def outputs(model, x, middle):
    block = model.get_submodule(BLOCK)
    attention, mlp = block.self_attn, block.mlp
    return attention.qkv_proj(x), attention.o_proj(x), mlp.gate_up_proj(x), mlp.down_proj(middle)


def expected(model, x, middle):
    """The same of the dense masked model."""
    block = model.get_submodule(BLOCK)
    attention, mlp = block.self_attn, block.mlp
    qkv = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    return qkv, attention.o_proj(x), torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1), mlp.down_proj(middle)


def weights(model):
    """The dense weight of each of vLLM's layers."""
    block = model.get_submodule(BLOCK)
    layers = block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj
    return [layer.sparse.weight if hasattr(layer, "sparse") else layer.weight for layer in layers]


def dense_weights(model):
    block = model.get_submodule(BLOCK)
    attention, mlp = block.self_attn, block.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    return [qkv, attention.o_proj.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight]


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, HIDDEN, generator=generator), torch.randn(5, MIDDLE, generator=generator)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)], ids=["sorted", "reversed"])
@torch.no_grad()
def test_fused_layers_equal_the_dense_masked_ones(vllm, tmp_path, pattern, order):
    model = pruned(pattern)
    # A kept weight that is zero stays a kept one.
    kept = masks(model)[f"{BLOCK}.self_attn.k_proj.weight"].dense()
    model.get_submodule(BLOCK).self_attn.k_proj.weight[tuple(kept.nonzero()[0])] = 0
    tensors, config = stored(model, tmp_path / "pruned")
    loaded = load(tensors, config, vllm[1], order=order)
    for weight, dense in zip(weights(loaded), dense_weights(model), strict=True):
        assert torch.equal(weight, dense)
    found, wanted = outputs(loaded, *inputs()), expected(model, *inputs())
    for y, dense in zip(found, wanted, strict=True):
        assert torch.allclose(y, dense, rtol=1e-6, atol=1e-6)  # of one product over more rows
    attention, block = loaded.get_submodule(BLOCK).self_attn, model.get_submodule(BLOCK).self_attn
    bias = torch.cat([block.q_proj.bias, block.k_proj.bias, block.v_proj.bias])
    assert torch.equal(
        attention.qkv_proj(inputs()[0]), nn.functional.linear(inputs()[0], dense_weights(model)[0], bias)
    )
    assert torch.equal(found[3], wanted[3])
    assert not list(attention.qkv_proj.parameters(recurse=False))[1:]  # the bias is left
    sparse = attention.qkv_proj.sparse
    assert int(sparse.mask.kept) == sum(
        masks(model)[f"{BLOCK}.self_attn.{name}_proj.weight"].kept for name in ("q", "k", "v")
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ranks", [2, 4])
@torch.no_grad()
def test_ranks_hold_the_slices_of_the_dense_weights(vllm, tmp_path, pattern, ranks):
    # With 4 ranks there are fewer heads of keys and values than ranks, and the 24 columns of down_proj that a rank has
    # do not fill 2:4's words of 16: they are held as n:m.
    model = pruned(pattern)
    tensors, config = stored(model, tmp_path / "pruned")
    (x, middle), sums = inputs(), [0, 0]
    state, block = vllm[0], model.get_submodule(BLOCK)
    attention, mlp = block.self_attn, block.mlp

    def rows(weight, rank, parts=ranks):
        return weight.chunk(parts)[rank * parts // ranks]

    for rank in range(ranks):
        state.rank, state.ranks = rank, ranks
        loaded = load(tensors, config, vllm[1])
        qkv, o, gate_up, down = weights(loaded)
        q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        assert torch.equal(qkv, torch.cat([rows(q, rank), rows(k, rank, KV), rows(v, rank, KV)]))
        assert torch.equal(gate_up, torch.cat([rows(mlp.gate_proj.weight, rank), rows(mlp.up_proj.weight, rank)]))
        assert torch.equal(o, attention.o_proj.weight.chunk(ranks, 1)[rank])
        assert torch.equal(down, mlp.down_proj.weight.chunk(ranks, 1)[rank])
        mask = masks(model)[f"{BLOCK}.mlp.down_proj.weight"].matrix().chunk(ranks, 1)[rank]
        layer = loaded.get_submodule(BLOCK)
        assert torch.equal(layer.mlp.down_proj.sparse.mask.matrix(), mask)
        sums[0] = sums[0] + layer.mlp.down_proj(middle.chunk(ranks, -1)[rank])
        sums[1] = sums[1] + layer.self_attn.o_proj(x.chunk(ranks, -1)[rank])
    assert torch.allclose(sums[0], mlp.down_proj(middle), atol=1e-5)
    assert torch.allclose(sums[1], attention.o_proj(x), atol=1e-5)


@torch.no_grad()
def test_dense_weights_and_their_masks_are_left_to_vllm(vllm, tmp_path):
    model = pruned(None)
    sparsify(model, "2:4", "magnitude", progress=False, include=["*.mlp.*"])
    tensors, config = stored(model, tmp_path / "pruned")
    tensors["trisparse_masks.0"] = torch.zeros(3, dtype=torch.uint8)  # as of a weight that has no compressed form
    loaded = load(tensors, config, vllm[1])
    attention = loaded.get_submodule(BLOCK).self_attn
    assert isinstance(attention.qkv_proj.quant_method, protocol.UnquantizedLinearMethod)
    for weight, dense in zip(weights(loaded), dense_weights(model), strict=True):
        assert torch.equal(weight, dense)


@torch.no_grad()
def test_weights_that_the_checkpoint_fuses_itself(vllm, tmp_path):
    # GPT-2 stores q, k and v as one transposed weight: no shard ids, one part for three of vLLM's.
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=4, n_positions=16)).eval()
    sparsify(model, "2:4", "magnitude", progress=False)
    tensors, config = stored(model, tmp_path / "pruned")
    state, classes = vllm
    name, conv = "transformer.h.0.attn.c_attn", model.transformer.h[0].attn.c_attn

    def make():
        quant_config = classes.from_config(config)
        holder = nn.Module()
        holder.c_attn = protocol.QKVParallelLinear(64, 16, 4, 4, quant_config=quant_config, prefix=name)
        return quant_config, holder

    quant_config, holder = make()
    found = [(f"c_attn.{part}", tensors[f"{name}.{part}"]) for part in ("values", "meta")]
    protocol.load_weights(holder, found, quant_config)
    holder.c_attn.bias.copy_(conv.bias)
    protocol.process_weights_after_loading(holder)
    x = inputs()[0]
    assert torch.equal(holder.c_attn.sparse.weight, conv.weight.t())
    assert torch.allclose(holder.c_attn(x), conv(x), atol=1e-5)
    state.ranks = 2
    with pytest.raises(ValueError, match=r"c_attn.weight is fused in the checkpoint.*one device only.*--to dense"):
        make()


def test_what_cannot_be_one_layer_is_refused(vllm, tmp_path):
    model = pruned(None)
    sparsify(model, "2:4", "magnitude", progress=False, include=["*.q_proj", "*.k_proj", "*.o_proj"])
    tensors, config = stored(model, tmp_path / "half")
    with pytest.raises(ValueError, match=r"v_proj.weight is not compressed as the rest is.*export FOLDER --to dense"):
        load(tensors, config, vllm[1])
    other = pruned(None)
    sparsify(other, "2:4", "magnitude", progress=False, include=["*.q_proj", "*.k_proj"])
    sparsify(other, "1:4", "magnitude", progress=False, include=["*.v_proj"])
    tensors, config = stored(other, tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"different forms cannot be one layer.*q_proj.*2:4.*v_proj.*1:4.*--to dense"):
        load(tensors, config, vllm[1])


def test_layers_that_cannot_be_compressed_in_vllm_are_refused(vllm, tmp_path):
    _, config = stored(pruned("2:4"), tmp_path / "pruned")
    targets = Manifest.parse(config, "config.json").targets
    quant_config = vllm[1]({"lm_head.weight": next(iter(targets.values()))})
    assert quant_config.get_quant_method(protocol.VocabParallelEmbedding(), "model.embed_tokens") is None
    assert quant_config.get_quant_method(nn.Module(), "lm_head") is None
    experts = vllm[1]({f"{BLOCK}.mlp.experts.0.w1.weight": next(iter(targets.values()))})
    with pytest.raises(ValueError, match=r"experts.0.w1.weight is compressed, and vLLM's RoutedExperts cannot be"):
        experts.get_quant_method(protocol.RoutedExperts(), f"{BLOCK}.mlp.experts")
    with pytest.raises(ValueError, match=r"lm_head.weight is compressed, and vLLM's ParallelLMHead cannot be"):
        quant_config.get_quant_method(protocol.ParallelLMHead(), "lm_head")


def test_damage_and_what_is_missing_are_named(vllm, tmp_path):
    tensors, config = stored(pruned("50%"), tmp_path / "pruned")
    q = f"{BLOCK}.self_attn.q_proj"

    def refused(message, **changes):
        changed = {**tensors, **{f"{q}.{part}": tensor for part, tensor in changes.items()}}
        with pytest.raises(CheckpointError, match=message):
            load({name: tensor for name, tensor in changed.items() if tensor is not None}, config, vllm[1])

    refused("the checkpoint has no values of .*q_proj.weight", values=None)
    refused(r"q_proj.weight: values is torch.float32 \(1,\), not floating point", values=torch.zeros(1))
    refused("q_proj.weight: row_offsets do not fit", row_offsets=tensors[f"{q}.row_offsets"] + 1)
    k = f"{BLOCK}.self_attn.k_proj"
    swapped = {part: tensors[f"{k}.{part}"] for part in ("values", "bitmask", "row_offsets")}
    refused("damaged at .*q_proj.weight", **swapped)
    flipped = tensors[f"{q}.bitmask"].clone()
    flipped[0, 0] = ~flipped[0, 0]
    refused("damaged at .*q_proj.weight", bitmask=flipped)
    with pytest.raises(CheckpointError, match="do not match their hash"):
        vllm[1].from_config({**config, "masks_sha256": "0" * 64})
    loaded = load(tensors, config, vllm[1])
    with pytest.raises(ValueError, match="a compressed layer is loaded once"):
        protocol.process_weights_after_loading(loaded)


def test_shards_that_the_layer_does_not_have(vllm, tmp_path):
    tensors, config = stored(pruned("50%"), tmp_path / "pruned")
    model = build(vllm[1].from_config(config))
    param = model.get_submodule(f"{BLOCK}.self_attn.qkv_proj").values
    values = tensors[f"{BLOCK}.self_attn.q_proj.values"]
    for shard in (None, "index_q", 3, (0, 1)):
        with pytest.raises(CheckpointError, match="which none of them is"):
            param.weight_loader(param, values, shard)
    param.weight_loader(param, values, "q")
    with pytest.raises(CheckpointError, match="came twice"):
        param.weight_loader(param, values, "q")
    state = vllm[0]
    state.ranks = 3
    with pytest.raises(ValueError, match="does not fit vLLM's layer"):
        build(vllm[1].from_config(config))


def test_config_is_what_vllm_asks_for(vllm, tmp_path):
    state, classes = vllm
    _, config = stored(pruned("2:4"), tmp_path / "pruned")
    quant_config = classes.from_config(config)
    from trisparse.vllm_layers import TrisparseLinearMethod

    protocol.check_signatures(classes, TrisparseLinearMethod)
    assert quant_config.get_name() == "trisparse"
    assert torch.bfloat16 in quant_config.get_supported_act_dtypes()
    assert (classes.get_min_capability(), classes.get_config_filenames()) == (80, [])
    # vLLM copies the config and sends it to its workers.
    assert pickle.loads(pickle.dumps(copy.deepcopy(quant_config))).targets == quant_config.targets
    quant_config.apply_vllm_mapper(protocol.WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert f"language_model.{BLOCK}.mlp.down_proj.weight" in quant_config.targets
    state.additional_config = {"trisparse": {"prefer": "memory"}}
    layer = build(classes.from_config(config)).get_submodule(f"{BLOCK}.mlp.down_proj")
    assert layer.quant_method.prefer == "memory"
    for wrong, message in (
        ({"prefer": "size"}, "prefer in additional"),
        ({"tune": 1}, "it may be"),
        ("x", "it may be"),
    ):
        state.additional_config = {"trisparse": wrong}
        with pytest.raises(ValueError, match=message):
            build(classes.from_config(config))


def test_entry_point_and_that_nothing_imports_vllm_before(tmp_path):
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "trisparse"]
    if not found:
        import tomllib

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        assert project["entry-points"]["vllm.general_plugins"] == {"trisparse": "trisparse.vllm_plugin:register"}
    code = (
        "import sys, trisparse, trisparse.vllm_plugin as plugin; assert callable(plugin.register); "
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules); "
        "assert 'trisparse.vllm_layers' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
