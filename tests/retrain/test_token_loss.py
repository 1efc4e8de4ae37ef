"""The loss that takes the place of transformers' own: the same number and gradients, and only where it may."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from trisparse.retrain.loop import with_labels
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.retrain.token_loss import causal_lm_loss, lean_loss, takes_lean_loss

SMALL = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
POST_PROCESSED = {
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
}


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_transformers(items, shifted):
    labels = torch.randint(0, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    shift = {"shift_labels": labels} if shifted else {}
    leaf = torch.randn(2, 6, 48, dtype=torch.float64, requires_grad=True)
    losses = [
        f(leaf.float() * 3, labels, 48, num_items_in_batch=items, **shift) for f in (causal_lm_loss, ForCausalLMLoss)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in losses))


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen3", "gemma3", "mixtral", *POST_PROCESSED])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_models_get_the_same_gradients(build, tokens, kind, dtype):
    torch.manual_seed(0)
    if kind in POST_PROCESSED:
        model = transformers.AutoModelForCausalLM.from_config(POST_PROCESSED[kind]()).train()
        nn.init.normal_(model.get_output_embeddings().weight)
    else:
        model = build(kind)
    other = copy.deepcopy(model)
    assert takes_lean_loss(model)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        usual = other(**with_labels(tokens)).loss
        with lean_loss(model):
            loss = model(**with_labels(tokens)).loss
    torch.testing.assert_close(loss, usual)
    usual.backward()
    loss.backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is None else {"rtol": 0.05, "atol": 0.005}
    for (name, param), reference in zip(model.named_parameters(), other.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(param.grad, reference.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_there_inside_alone(build):
    model = build("llama")
    assert model.loss_function is ForCausalLMLoss
    inside = []

    def forward():
        inside.append(model.loss_function)
        raise KeyError

    with pytest.raises(KeyError), lean_loss(nn.Sequential(model)):
        forward()
    assert inside == [causal_lm_loss]
    assert "_loss_function" not in model.__dict__
    model.loss_function = ForCausalLMLoss
    with lean_loss(model):
        assert model.loss_function is causal_lm_loss
    assert model.__dict__["_loss_function"] is ForCausalLMLoss


def test_another_loss_stays(build):
    model = build("llama")

    def own(logits, labels, **_):
        return logits.sum()

    model.loss_function = own
    assert not takes_lean_loss(model)
    with lean_loss(model):
        assert model.loss_function is own
    assert not takes_lean_loss(nn.Linear(2, 2))
    with lean_loss(nn.Linear(2, 2)):
        pass


def test_retraining_takes_it(build, tokens, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["num_items_in_batch"])
        return causal_lm_loss(*args, **kwargs)

    monkeypatch.setattr("trisparse.retrain.token_loss.causal_lm_loss", counted)
    config = PERPConfig(steps=2, batch_size=2, gradient_accumulation=3, seq_len=16, dtype="fp32")
    retrain(build("llama"), tokens, config, progress=False)
    assert [int(items) for items in calls] == 6 * [3 * 2 * 15]
