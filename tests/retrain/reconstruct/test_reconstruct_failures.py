"""What reconstruction refuses, and what a failure leaves behind: whole blocks."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from trisparse.retrain import block_training
from trisparse.retrain.loop import RetrainError
from trisparse.sparsity.capture import BlocksNotChainedError
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import MaskError
from trisparse.sparsity.sparsify import sparsify

_SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def test_a_block_that_gets_worse_is_left_as_it_was(pair, run, state, tokens):
    dense, model = pair()
    before = state(model)
    report = run(model, dense, tokens, learning_rate=50.0, steps=2, groups=("norms",))
    assert not any(block.kept for block in report.blocks)
    assert all(block.error_after == block.error_before for block in report.blocks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "left as it was" in str(report)


@pytest.mark.parametrize("failure", [RetrainError, KeyboardInterrupt])
def test_a_failure_leaves_whole_blocks(pair, run, state, tokens, monkeypatch, failure):
    dense, model = pair()
    whole = copy.deepcopy(model)
    run(whole, dense, tokens)
    before = state(model)
    real, calls = block_training.relative_errors, 0

    def fail(*tensors):
        nonlocal calls
        calls += 1
        if calls == 30:  # 20 steps a block: in the second one's
            if failure is RetrainError:
                return real(*tensors) * torch.nan
            raise failure
        return real(*tensors)

    monkeypatch.setattr(block_training, "relative_errors", fail)
    with pytest.raises(failure) as caught:
        run(model, dense, tokens)
    assert "reconstruct stopped; the model is reconstructed up to model.layers.0" in caught.value.__notes__[0]
    for name, value in model.state_dict().items():
        expected = whole.state_dict()[name] if name.startswith("model.layers.0.") else before[name]
        assert torch.equal(value, expected), name
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in whole.modules()]


def test_another_architecture_is_refused(pair, run, state, tokens, tmp_path):
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


def test_wrong_models_and_data_are_named(pair, run, tokens, tmp_path):
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


def test_dense_weights_that_are_not_finite_are_named(pair, run, tokens):
    dense, model = pair()
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(RetrainError, match=r"the error of model.layers.1 is nan before it trains"):
        run(model, dense, tokens)


def test_blocks_that_are_not_chained_are_refused(run, tokens):
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


def test_shared_blocks_are_refused(pair, run, tokens):
    dense, model = pair()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"is shared with model.layers.0.mlp"):
        run(model, dense, tokens)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"groups": ("head",)}, "groups must be one or more of biases, norms, lora, full"),
        ({"groups": ()}, "groups must be one or more"),
        ({"groups": "lora"}, "groups must be one of biases, norms, perp, full, or a sequence"),
        ({"groups": "linear-probing"}, "groups must be one of biases, norms, perp, full, or a sequence"),
        ({"groups": ("full", "norms")}, "groups must be 'full' alone"),
        ({"targets": "both"}, "targets must be one of sparse, dense, got 'both'"),
        ({"dtype": "fp16"}, "dtype must be one of auto, fp32, bf16"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"samples": 1}, "samples must be at least batch_size=2, got 1"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
    ],
)
def test_wrong_fields_are_named(config, field, message):
    with pytest.raises(ValueError, match=message):
        config(**field)
