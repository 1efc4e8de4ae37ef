"""The usual implementations choose what ours choose, and the table of their times is put together right."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from trisparse.bench import prune_speed
from trisparse.bench.usual_pruning import SparseGPTLayer, prune_as_usual
from trisparse.sparsity.sparsify import sparsify


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


TOKENS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("pattern", "n_of_m"), [("50%", None), ("2:4", (2, 4)), ("4:8", (4, 8))])
def test_usual_wanda_is_our_wanda_in_blocks(pattern, n_of_m):
    usual, ours = llama(), llama()
    prune_as_usual(usual, TOKENS, "wanda", 0.5, n_of_m)
    sparsify(
        ours, pattern, "wanda", TOKENS, samples=6, seq_len=16, propagate="block", dtype=torch.float32, progress=False
    )
    for name, weight in usual.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_usual_sparsegpt_by_hand():
    # x = [[1, 1], [0, 1]]: H = 2/2 [[1, 1], [1, 2]] + 0.01 · 1.5 I. With w = (1, 3), half of it is pruned: by
    # w² / U_jj² the first goes, and the second takes up (1 / U_00) U_01.
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 3.0]])
    layer = SparseGPTLayer(linear, 0.4, None)
    for row in ([[1.0, 1.0]], [[0.0, 1.0]]):
        layer.add(torch.tensor(row))
    assert torch.allclose(layer.hessian, torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    layer.prune()
    # the best w_1 for w_0 = 0 under the damped H: w_1 + H_01 / H_11
    assert torch.allclose(linear.weight.data, torch.tensor([[0.0, 3.0 + 1 / 2.015]]))


def test_the_usual_sparsegpt_prunes_half():
    model = llama()
    prune_as_usual(model, TOKENS, "sparsegpt", 0.5, (2, 4))
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all()


def test_the_table():
    rounds = [
        {
            "wanda 50% usual": {"seconds": s, "perplexity": 20.0},
            "wanda 50% block": {"seconds": s * r, "perplexity": 22.0},
            "wanda 50% dense": {"seconds": 1.0, "perplexity": 21.0},
        }
        for s, r in ((10.0, 0.5), (20.0, 0.6), (30.0, 0.4))
    ]
    usual, block, dense = prune_speed.summary(rounds)
    assert usual["seconds"] == 20.0
    assert "ratio" not in usual
    assert block["ratio"] == 0.5
    assert block["perplexity_ratio"] == 1.1
    assert dense["ratio"] == 0.05
    assert "0.50x of the usual time (bar 0.65)" in prune_speed.as_line(block)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prune_speed, "load_smollm2", lambda: (llama(), None))
    windows = lambda *_, samples, seq_len, **__: TOKENS[:samples, :seq_len]  # noqa: E731
    monkeypatch.setattr(prune_speed, "token_windows", windows)
    monkeypatch.setattr(prune_speed, "keep_freed_memory", lambda: None)  # it would stay for the other tests
    small = ["--samples", "4", "--seq-len", "16", "--test", "2"]
    prune_speed.main(["--contestant", "wanda", "50%", "dense", *small])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"seconds", "perplexity"}

    def in_this_process(options, method, pattern, propagate):
        return prune_speed.contestant(method, pattern, propagate, options.samples, options.seq_len, options.test)

    monkeypatch.setattr(prune_speed, "_in_a_process", in_this_process)
    prune_speed.main(["--only", "wanda", *small, "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [row["propagate"] for row in content["rows"]] == ["usual", "block", "dense"]
    assert content["settings"]["samples"] == 4
