"""The benchmark of training speed on a tiny model: it runs, and its contestants do what they are called."""

from __future__ import annotations

import pytest
import torch
import transformers

from trisparse.bench.registry import Options
from trisparse.bench.studies.train_speed import peak_of_steps, seconds_of_steps, train_speed
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


def test_seconds_and_memory(model, windows):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = seconds_of_steps(model, list(CONTESTANTS), windows, 2)
    assert list(found) == list(CONTESTANTS)
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    weights = sum(param.numel() * 4 for param in model.parameters())
    full = peak_of_steps(model, "full", windows)
    assert full > 3 * weights  # gradients and two moments
    assert peak_of_steps(model, "norms only", windows) < full
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_rows(tiny_llama):
    options = Options(quick=True, repeats=1, model=str(tiny_llama / "dense"))
    speed, memory = train_speed(options)
    assert (speed.baseline, set(speed.seconds)) == ("full", set(CONTESTANTS))
    assert speed.metrics["lora"]["tokens_per_s"] == pytest.approx(256 / speed.seconds["lora"][0])
    assert memory.metrics["full"]["peak_ratio_to_full"] == 1
    assert memory.metrics["norms only"]["peak_ratio_to_full"] < 1
    assert speed.parameters["model"] == "dense"  # the last part of the path, and no more
    assert [row.name for row in train_speed(Options(quick=True, repeats=1, only="speed", model=options.model))] == [
        "speed"
    ]
