"""The benchmark of training speed on a tiny model: it runs, and its contestants do what they are called."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from trisparse.bench import train_speed
from trisparse.bench.train_speed import memory, speeds
from trisparse.bench.training_steps import CONTESTANTS, step_of
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    sparsify(model, "50%", "magnitude", progress=False)
    return model


@pytest.fixture
def windows():
    return torch.randint(0, 48, (2, 2, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_step_trains_what_its_name_says_and_keeps_the_zeros(model, windows, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = step_of(name, model)
    for batch in windows:
        step(batch)
    check_masks(model)
    state = model.state_dict()
    trained = {key for key, param in model.named_parameters() if param.requires_grad}
    if name == "full":
        assert trained == set(before)
        assert all(not torch.equal(state[key], before[key]) for key in before)
    else:
        groups = CONTESTANTS[name][0]
        assert any(".lora_A." in key for key in trained) == ("lora" in groups or "head" in groups)
        assert any("norm" in key for key in trained) == ("norms" in groups)
        assert any("lm_head" in key for key in trained) == ("head" in groups)
        frozen = [key.replace("base_layer.", "") for key in state if "base_layer" in key]
        assert all(torch.equal(state[k.replace("weight", "base_layer.weight")], before[k]) for k in frozen)


def test_speeds_and_memory(model, windows):
    rounds = []
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = speeds(model, list(CONTESTANTS), windows, 2, rounds.append)
    assert rounds == [0, 1, 2]
    assert list(found) == list(CONTESTANTS)
    assert found["full"]["ratio"] == 1
    assert all(row["tokens_per_second"] > 0 for row in found.values())
    held = memory(model, list(CONTESTANTS), windows)
    weights = sum(param.numel() * 4 for param in model.parameters())
    assert held["full"]["peak_bytes"] > 3 * weights  # gradients and two moments
    assert held["norms only"]["peak_bytes"] < held["full"]["peak_bytes"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--rounds", "1", "--seq-len", "32", "--only", "lora"]
    train_speed.main(arguments)
    out = capsys.readouterr().out
    assert "1.00x of full" in out
    assert "MiB above the weights" in out
    train_speed.main([*arguments, "--json", "--no-memory"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["speed"]) == ["full", "lora"]
    assert "memory" not in result
    assert str(tmp_path) not in json.dumps(result)
