"""Layer-wise reconstruction on tiny models: the errors fall, the zeros stay, and failures leave whole blocks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from trisparse.kernels.bitmask import unpack_bits
from trisparse.retrain import block_training
from trisparse.retrain.block_training import relative_errors
from trisparse.retrain.dense_weights import DenseWeights
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
from trisparse.sparsity.capture import BlocksNotChainedError
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import MaskError, check_masks, detach, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

QUICK = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-2, "steps": 20, "batch_size": 2, "samples": 8, "seq_len": 16,
    "dtype": "fp32",
}  # fmt: skip
_SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def config(**changes):
    return ReconstructConfig(**{**QUICK, **changes})


def pair(kind="llama", pattern="50%"):
    """A dense model and the same one pruned."""
    torch.manual_seed(0)
    if kind == "llama":
        settings = transformers.LlamaConfig(**_SMALL, intermediate_size=24, max_position_embeddings=32)
    elif kind == "gpt2":
        settings = transformers.GPT2Config(
            vocab_size=48, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    else:
        settings = transformers.OPTConfig(
            **_SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.1
        )
    dense = transformers.AutoModelForCausalLM.from_config(settings)
    for param in dense.parameters():  # weights that matter: at their start, the residual is nearly all of a block
        param.data.mul_(4) if param.ndim > 1 else None
    model = copy.deepcopy(dense).train()
    sparsify(model, pattern, "magnitude", progress=False)
    return dense, model


def run(model, dense, data, **changes):
    return reconstruct(model, dense, data, config(**changes), progress=False)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_relative_errors_by_hand():
    output = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    target = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert torch.equal(relative_errors(output, target), torch.tensor([[16 / 9, 1 / 4]]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("targets", ["dense", "sparse"])
def test_every_block_comes_nearer_to_the_dense_one(tokens, kind, targets):
    dense, model = pair(kind)
    before, digest, dense_before = state(model), masks_sha256(model), state(dense)
    modes = [module.training for module in model.modules()]
    report = run(model, dense, tokens, targets=targets)
    assert [block.name.rpartition(".")[2] for block in report.blocks] == ["0", "1", "2"]
    for block in report.blocks:
        assert block.kept
        assert block.error_after < 0.9 * block.error_before, block
    check_masks(model)
    assert masks_sha256(model) == digest
    assert [module.training for module in model.modules()] == modes
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, dense_before[name]) for name, value in dense.state_dict().items())
    # what is outside the blocks is the same
    outside = [name for name in before if not any(name.startswith(f"{block.name}.") for block in report.blocks)]
    assert outside
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in outside)


def test_the_reported_errors_are_those_of_the_whole_models(tokens):
    dense, model = pair()
    sparse_before = copy.deepcopy(model)
    report = run(model, dense, tokens, targets="dense")

    @torch.no_grad()
    def hidden(which):
        return which.eval()(input_ids=tokens, output_hidden_states=True).hidden_states

    def error(which, block):
        return float(relative_errors(hidden(which)[block + 1], hidden(dense)[block + 1]).mean())

    assert report.blocks[0].error_before == pytest.approx(error(sparse_before, 0), rel=1e-4)
    assert report.blocks[0].error_after == pytest.approx(error(model, 0), rel=1e-4)
    assert report.blocks[1].error_after == pytest.approx(error(model, 1), rel=1e-4)
    assert error(model, 1) < error(sparse_before, 1)


def test_targets_of_the_sparse_input_are_the_dense_blocks_outputs_for_it(tokens):
    dense, model = pair()
    report = run(model, dense, tokens, targets="sparse")
    with torch.no_grad():
        entering = model.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        position = model.model.rotary_emb(entering, torch.arange(16)[None])
        mask = torch.full((16, 16), -1e30).triu(1)[None, None]
        outputs = [
            which.model.layers[1](entering, position_embeddings=position, attention_mask=mask)
            for which in (model, dense.eval())
        ]
    assert report.blocks[1].error_after == pytest.approx(float(relative_errors(*outputs).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("groups", "changes"),
    [
        (("biases",), lambda name: name.endswith("bias") and "layer_norm" not in name),
        (("norms",), lambda name: "layer_norm" in name),
        (("lora",), lambda name: name.endswith("weight") and "layer_norm" not in name),
        (("full",), lambda name: True),
    ],
)
def test_only_the_groups_asked_for_change(tokens, groups, changes):
    dense, model = pair("opt")
    before, digest = state(model), masks_sha256(model)
    report = run(model, dense, tokens, groups=groups)
    assert all(block.kept for block in report.blocks)
    inside = {name for name in before if ".layers." in name}
    changed = {name for name in before if not torch.equal(model.state_dict()[name], before[name])}
    # the bias of the keys shifts a whole row of attention scores, which softmax takes out
    assert changed | {name for name in inside if "k_proj.bias" in name} >= {name for name in inside if changes(name)}
    assert changed <= {name for name in inside if changes(name)}
    check_masks(model)
    assert masks_sha256(model) == digest
    assert all(not torch.signbit(model.get_parameter(n)[~m.dense()]).any() for n, m in masks(model).items())


def test_trainable_is_counted(tokens):
    dense, model = pair()
    report = run(model, dense, tokens, steps=1, groups=("norms", "lora"))
    lora = 4 * (4 * (16 + 16) + 3 * (16 + 24))  # rank · (in + out): four projections of 16x16, three of 24x16
    assert [block.trainable for block in report.blocks] == [2 * 16 + lora] * 3
    assert report.trainable == 3 * (2 * 16 + lora)


def test_dense_from_a_folder_gives_the_same_as_the_model(tokens, tmp_path):
    dense, model = pair()
    again = copy.deepcopy(model)
    dense.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    from_model, from_folder = run(model, dense, tokens), run(again, tmp_path, tokens)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [b.error_after for b in from_model.blocks] == [b.error_after for b in from_folder.blocks]


def test_dense_from_the_folder_of_a_bare_model(tokens, tmp_path):
    dense, model = pair("gpt2")
    dense.transformer.save_pretrained(tmp_path)
    report = run(model, str(tmp_path), tokens)
    assert all(block.error_after < block.error_before for block in report.blocks)


def test_dense_embeddings_that_differ_are_the_dense_models(tokens):
    dense, model = pair()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    own = model.get_input_embeddings().weight.clone()
    report = run(model, dense, tokens, steps=1)
    with torch.no_grad():
        target = dense.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        output = model.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    assert report.blocks[0].error_after == pytest.approx(float(relative_errors(output, target).mean()), rel=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, own)


def test_same_seed_same_weights_and_the_global_random_state_is_not_used(tokens):
    weights = []
    for global_seed in (1, 2):
        dense, model = pair()
        torch.manual_seed(global_seed)
        expected = torch.random.get_rng_state()
        run(model, dense, tokens, seed=3)
        assert torch.equal(torch.random.get_rng_state(), expected)
        weights.append(state(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [("norms", "lora"), ("full",)])
def test_half_precision_models_stay_in_it(tokens, dtype, groups):
    dense, model = pair()
    dense, model = dense.to(dtype), model.to(dtype)
    report = run(model, dense, tokens, dtype="auto", groups=groups)
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert all(block.error_after < block.error_before for block in report.blocks)
    check_masks(model)


def test_a_block_that_gets_worse_is_left_as_it_was(tokens):
    dense, model = pair()
    before = state(model)
    report = run(model, dense, tokens, learning_rate=50.0, steps=2, groups=("norms",))
    assert not any(block.kept for block in report.blocks)
    assert all(block.error_after == block.error_before for block in report.blocks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "left as it was" in str(report)


def test_an_unpruned_block_is_passed_through(tokens):
    dense, model = pair()
    model.load_state_dict(dense.state_dict())
    for module in model.modules():
        detach(module)
    sparsify(model, "50%", "magnitude", include="model.layers.1.*", progress=False)
    before = state(model)
    report = run(model, dense, tokens, targets="sparse")
    assert [block.kept for block in report.blocks] == [False, True, False]
    assert [block.trainable > 0 for block in report.blocks] == [False, True, False]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_report_serialises(tokens):
    dense, model = pair()
    report = run(model, dense, tokens, steps=2)
    read = json.loads(report.to_json())
    assert read["blocks"][0]["error_before"] == report.blocks[0].error_before
    assert read["error_after"] == pytest.approx(sum(b.error_after for b in report.blocks) / 3)
    assert read["samples"] == 8
    assert "model.layers.2" in str(report)
    assert report.peak_memory_bytes > 0


@pytest.mark.parametrize("failure", [RetrainError, KeyboardInterrupt])
def test_a_failure_leaves_whole_blocks(tokens, monkeypatch, failure):
    dense, model = pair()
    whole = copy.deepcopy(model)
    run(whole, dense, tokens)
    before = state(model)
    real, calls = block_training.relative_errors, 0

    def fail(output, target):
        nonlocal calls
        calls += 1
        if calls == 30:  # 20 steps a block: in the second one's
            if failure is RetrainError:
                return real(output, target) * torch.nan
            raise failure
        return real(output, target)

    monkeypatch.setattr(block_training, "relative_errors", fail)
    with pytest.raises(failure) as caught:
        run(model, dense, tokens)
    assert "reconstruct stopped; the model is reconstructed up to model.layers.0" in caught.value.__notes__[0]
    for name, value in model.state_dict().items():
        expected = whole.state_dict()[name] if name.startswith("model.layers.0.") else before[name]
        assert torch.equal(value, expected), name
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_another_architecture_is_refused(tokens, tmp_path):
    _, model = pair()
    before = state(model)
    settings = transformers.LlamaConfig(**{**_SMALL, "num_hidden_layers": 2}, intermediate_size=20)
    other = transformers.AutoModelForCausalLM.from_config(settings)
    message = (
        r"dense is not of the model's architecture: model.layers.0.mlp.gate_proj.weight is \(24, 16\) .*\(20, 16\)"
    )
    with pytest.raises(ValueError, match=message):
        run(model, other, tokens)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path, tokens)
    fewer = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**_SMALL, "num_hidden_layers": 2}, intermediate_size=24)
    )
    with pytest.raises(ValueError, match=r"model.layers.2.self_attn.q_proj.weight is \(16, 16\) .* missing in dense"):
        run(model, fewer, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_models_and_data_are_named(tokens, tmp_path):
    dense, model = pair()
    with pytest.raises(ValueError, match="dense is the pruned model itself"):
        run(model, model, tokens)
    with pytest.raises(ValueError, match="dense is on the meta device"):
        run(model, copy.deepcopy(dense).to("meta"), tokens)
    with pytest.raises(ValueError, match="dense must be a model or a checkpoint folder, got int"):
        run(model, 3, tokens)
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        run(model, tmp_path, tokens)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        run(model, tmp_path, tokens)
    with pytest.raises(ValueError, match=r"data is shorter than one batch: 1 windows of seq_len=16 .* batch_size=2"):
        run(model, dense, tokens[:1])
    padded = {"input_ids": tokens, "attention_mask": (torch.arange(16) > 3).expand(8, 16).long()}
    with pytest.raises(ValueError, match="data is padded"):
        run(model, dense, [padded])
    with pytest.raises(ValueError, match="model has no masks: prune it first"):
        run(dense, copy.deepcopy(dense), tokens)
    with pytest.raises(ValueError, match=r"nothing to train in groups=\('biases',\)"):
        run(model, dense, tokens, groups=("biases",))
    compressed = copy.deepcopy(model)
    compress(compressed)
    with pytest.raises(ValueError, match="holds compressed layers"):
        run(compressed, dense, tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    with pytest.raises(MaskError):
        run(model, dense, tokens)


def test_dense_weights_that_are_not_finite_are_named(tokens):
    dense, model = pair()
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(RetrainError, match=r"the error of model.layers.1 is nan before it trains"):
        run(model, dense, tokens)


def test_blocks_that_are_not_chained_are_refused(tokens):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(48, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.blocks[0](x) + self.blocks[1](x)

    dense = Branches()
    model = copy.deepcopy(dense)
    sparsify(model, "50%", "magnitude", progress=False)
    with pytest.raises(BlocksNotChainedError, match=r"at blocks.1\), so they cannot be reconstructed"):
        run(model, dense, [tokens[:2], tokens[2:4]], groups=("full",))


def test_shared_blocks_are_refused(tokens):
    dense, model = pair()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"is shared with model.layers.0.mlp"):
        run(model, dense, tokens)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"groups": ("head",)}, "groups must be one or more of biases, norms, lora, full"),
        ({"groups": ()}, "groups must be one or more"),
        ({"groups": "lora"}, "groups must be one or more"),
        ({"groups": ("full", "norms")}, "groups 'full' trains everything"),
        ({"targets": "both"}, "targets must be one of dense, sparse, got 'both'"),
        ({"dtype": "fp16"}, "dtype must be one of auto, fp32, bf16"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"samples": 1}, "samples must be at least batch_size=2, got 1"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
    ],
)
def test_wrong_fields_are_named(field, message):
    with pytest.raises(ValueError, match=message):
        config(**field)


def test_the_update_of_a_lora_is_of_its_rank_under_the_mask(tokens):
    dense, model = pair(pattern="2:4")
    before = state(model)
    run(model, dense, tokens, groups=("lora",), rank=1, alpha=1)
    for name, mask in masks(model).items():
        update = model.get_parameter(name).detach() - before[name]
        keep = unpack_bits(mask.bits, mask.cols)
        assert not update[~keep].any()
        # of rank one: any two kept columns of two rows are proportional where all four are kept
        rows = (keep[0] & keep[1]).nonzero().flatten()[:2]
        if len(rows) == 2:
            minor = update[:2, rows]
            assert abs(float(torch.linalg.det(minor.double()))) < 1e-5 * float(minor.square().sum()) + 1e-9


def test_the_first_step_of_a_lora_by_hand(tokens):
    """AdamW's first step moves every number of B by the rate, half the peak here, so W moves by ± s·rate/2·A."""
    dense, model = pair()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    report = run(model, dense, tokens, groups=("lora",), rank=2, alpha=6, steps=1, learning_rate=1e-3)
    assert report.blocks[0].kept
    a = torch.empty(2, 16)
    nn.init.kaiming_uniform_(a, a=5**0.5, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0].self_attn.q_proj
    update = (layer.weight.detach() - before).abs()
    keep = masks(model)["model.layers.0.self_attn.q_proj.weight"].dense()
    candidates = 3 * 0.5e-3 * torch.stack([a[0] + a[1], a[0] - a[1]]).abs()
    for row, kept in zip(update, keep, strict=True):
        error = (candidates[:, kept] - row[kept]).abs().amax(1)
        assert float(error.min()) < 2e-6


def test_one_block_at_a_time_is_read_and_trains(tokens, tmp_path, monkeypatch):
    dense, model = pair()
    dense.save_pretrained(tmp_path)
    reads, gradients = [], []
    real_read, real_step = DenseWeights.read, torch.optim.AdamW.step

    def read(self, names, device):
        names = list(names)
        reads.append({name.split(".")[2] for name in names if ".layers." in name})
        return real_read(self, names, device)

    def step(self, *args, **options):
        with_gradient = {name for name, param in model.named_parameters() if param.grad is not None}
        gradients.append({name.split(".")[2] for name in with_gradient if ".layers." in name})
        assert all(".layers." in name for name in with_gradient)
        return real_step(self, *args, **options)

    monkeypatch.setattr(DenseWeights, "read", read)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(model, tmp_path, tokens, groups=("full",), steps=2)
    assert [blocks for blocks in reads if blocks] == [{"0"}, {"1"}, {"2"}]
    assert gradients == [{"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"2"}]
