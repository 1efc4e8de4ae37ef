"""Layer-wise reconstruction on tiny models: the errors fall, the zeros stay, one block trains at a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from trisparse.kernels.bitmask import unpack_bits
from trisparse.retrain.block_training import relative_errors
from trisparse.retrain.dense_weights import DenseWeights
from trisparse.retrain.layer_adapters import LayerAdapters
from trisparse.sparsity.mask import check_masks, detach, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify


def test_relative_errors_by_hand():
    output = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    target = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert torch.equal(relative_errors(output, target), torch.tensor([[16 / 9, 1 / 4]]))
    assert torch.equal(relative_errors(output.mT, target.mT, 1), torch.tensor([[16 / 9, 1 / 4]]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("targets", ["dense", "sparse"])
def test_every_block_comes_nearer_to_the_dense_one(pair, run, state, tokens, kind, targets):
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
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    assert all(torch.equal(value, dense_before[name]) for name, value in dense.state_dict().items())
    # what is outside the blocks is the same
    outside = [name for name in before if not any(name.startswith(f"{block.name}.") for block in report.blocks)]
    assert outside
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in outside)


def test_the_reported_errors_are_those_of_the_whole_models(pair, run, tokens):
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


def test_targets_of_the_sparse_input_are_the_dense_blocks_outputs_for_it(pair, run, tokens):
    dense, model = pair()
    report = run(model, dense, tokens)  # the default is the paper's objective
    assert report.targets == "sparse"
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
def test_only_the_groups_asked_for_change(pair, run, state, tokens, groups, changes):
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


def test_a_group_that_all_blocks_have_is_not_missing(pair, run, tokens):
    dense, model = pair("opt")
    report = run(model, dense, tokens, steps=1)
    assert report.missing == []
    assert "missing" not in str(report)


def test_trainable_is_counted(pair, run, tokens):
    dense, model = pair()
    report = run(model, dense, tokens, steps=1, groups=("norms", "lora"))
    lora = 4 * (4 * (16 + 16) + 3 * (16 + 24))  # rank · (in + out): four projections of 16x16, three of 24x16
    assert [block.trainable for block in report.blocks] == [2 * 16 + lora] * 3
    assert report.trainable == 3 * (2 * 16 + lora)


def test_of_whole_rows_the_kept_ones_alone_train(pair, run, tokens):
    dense, model = pair(pattern="50% rows")
    report = run(model, dense, tokens, groups=("lora",))
    lora = 4 * (4 * (16 + 8) + 2 * (16 + 12) + (24 + 8))  # rank · (in + kept rows)
    assert [block.trainable for block in report.blocks] == [lora] * 3
    assert all(block.kept and block.error_after < block.error_before for block in report.blocks)
    check_masks(model)


@pytest.fixture
def convolutional():
    """A dense and a pruned ConvNeXt of two stages, its blocks, and images; its convolutions have a filter a channel."""
    torch.manual_seed(0)
    settings = transformers.ConvNextConfig(
        num_channels=3, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=1.0
    )
    dense = transformers.ConvNextModel(settings)
    for param in dense.parameters():
        param.data.mul_(4) if param.ndim > 1 else None
    model = copy.deepcopy(dense)
    sparsify(model, "50%", "magnitude", include="*", progress=False)
    generator = torch.Generator().manual_seed(1)
    return dense, model, [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]


def test_convolutions_are_reconstructed_by_lora(convolutional, run, state):
    dense, model, images = convolutional
    before, digest = state(model), masks_sha256(model)
    report = run(model, dense, images, groups=("lora",), targets="sparse")
    # rank · (columns + filters) of each convolution, rank · (in + out) of the two linears; the second stage downsamples
    first, second = (4 * (49 + size + 2 * (size + 4 * size)) for size in (8, 16))
    assert [block.trainable for block in report.blocks] == [first, second + 4 * (8 * 4 + 16)]
    assert all(block.kept and block.error_after < 0.9 * block.error_before for block in report.blocks)
    check_masks(model)
    assert masks_sha256(model) == digest
    changed = {name for name in before if not torch.equal(model.state_dict()[name], before[name])}
    assert changed == {name for name in masks(model) if ".stages." in name}
    assert any("dwconv" in name for name in changed)


def test_a_token_of_an_image_is_a_position(convolutional, run, state):
    dense, model, images = convolutional
    report = run(model, dense, images, steps=1, targets="dense")
    outputs = [torch.cat([which.eval().embeddings(x) for x in images]) for which in (model, dense)]
    with torch.no_grad():
        for index in range(2):
            outputs = [which.encoder.stages[index](x) for which, x in zip((model, dense), outputs, strict=True)]
            error = (outputs[0] - outputs[1]).square().sum(1) / outputs[1].square().sum(1)
            assert report.blocks[index].error_after == pytest.approx(float(error.mean()), rel=1e-4)


def test_dense_from_a_folder_gives_the_same_as_the_model(pair, run, tokens, tmp_path):
    dense, model = pair()
    again = copy.deepcopy(model)
    dense.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    from_model, from_folder = run(model, dense, tokens), run(again, tmp_path, tokens)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [b.error_after for b in from_model.blocks] == [b.error_after for b in from_folder.blocks]


def test_dense_from_the_folder_of_a_bare_model(pair, run, tokens, tmp_path):
    dense, model = pair("gpt2")
    dense.transformer.save_pretrained(tmp_path)
    report = run(model, str(tmp_path), tokens)
    assert all(block.error_after < block.error_before for block in report.blocks)


def test_dense_embeddings_that_differ_are_the_dense_models(pair, run, tokens):
    dense, model = pair()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    own = model.get_input_embeddings().weight.clone()
    report = run(model, dense, tokens, steps=1, targets="dense")
    with torch.no_grad():
        target = dense.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        output = model.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    assert report.blocks[0].error_after == pytest.approx(float(relative_errors(output, target).mean()), rel=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, own)


def test_same_seed_same_weights_and_the_global_random_state_is_not_used(pair, run, state, tokens):
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
def test_half_precision_models_stay_in_it(pair, run, tokens, dtype, groups):
    dense, model = pair()
    dense, model = dense.to(dtype), model.to(dtype)
    report = run(model, dense, tokens, dtype="auto", groups=groups)
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert all(block.error_after < block.error_before for block in report.blocks)
    check_masks(model)


def test_an_unpruned_block_is_passed_through(pair, run, state, tokens):
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


def test_report_serialises(pair, run, tokens):
    dense, model = pair()
    report = run(model, dense, tokens, steps=2)
    read = json.loads(report.to_json())
    assert read["blocks"][0]["error_before"] == report.blocks[0].error_before
    assert read["error_after"] == pytest.approx(sum(b.error_after for b in report.blocks) / 3)
    assert read["samples"] == 8
    assert "model.layers.2" in str(report)
    assert read["missing"] == ["biases"]
    assert "missing: the blocks have no biases" in str(report)
    assert report.peak_memory_bytes > 0


def test_the_update_of_a_lora_is_of_its_rank_under_the_mask(pair, run, state, tokens):
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


def test_the_first_step_of_a_lora_by_hand(pair, run, tokens):
    """AdamW's first step moves every number of B by the rate, so W moves by ± s·rate·A; one step has no warm-up."""
    dense, model = pair()
    block = model.model.layers[0]
    before = block.self_attn.q_proj.weight.detach().clone()
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        a = LayerAdapters(copy.deepcopy(block), names, "mask_lora", 2, 6).parameters["self_attn.q_proj.lora_A"].detach()
    assert a.abs().max() <= 1 / 16**0.5  # PEFT's start, uniform
    report = run(model, dense, tokens, groups=("lora",), rank=2, alpha=6, steps=1, learning_rate=1e-3, seed=7)
    assert report.blocks[0].kept
    update = (block.self_attn.q_proj.weight.detach() - before).abs()
    keep = masks(model)["model.layers.0.self_attn.q_proj.weight"].dense()
    candidates = 3 * 1e-3 * torch.stack([a[0] + a[1], a[0] - a[1]]).abs()
    for row, kept in zip(update, keep, strict=True):
        error = (candidates[:, kept] - row[kept]).abs().amax(1)
        assert float(error.min()) < 2e-6


def test_one_block_at_a_time_is_read_and_trains(pair, run, tokens, tmp_path, monkeypatch):
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
