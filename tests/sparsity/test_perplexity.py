"""Perplexity: hand-computed cases, transformers' own loss, and every wrong input."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from trisparse.sparsity import perplexity as module
from trisparse.sparsity.perplexity import perplexity


class Table(nn.Module):
    """A bigram model: the logits of the next token are a row of a table."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(logits)
        self.inner = nn.Dropout(0.5)
        self.batches: list[int] = []
        self.modes: list[bool] = []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=8))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        assert not torch.is_grad_enabled()
        self.batches.append(len(input_ids))
        self.modes.append(self.training or self.inner.training)
        return SimpleNamespace(logits=self.embedding(input_ids))


def table(*rows: list[float]) -> Any:
    return Table(torch.tensor(rows).log())


def llama(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
            **options,
        )
    )


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            init_std=0.2,
            dropout=0.5,
        )
    )


def test_hand_computed() -> None:
    """Windows [0 1 1] and [1 0 0]: p = 1/2, 1/8; 7/8, 1/2. Perplexity = (1/2 · 1/8 · 7/8 · 1/2) ** (-1/4)."""
    model = table([1 / 2, 1 / 2], [7 / 8, 1 / 8])
    found = perplexity(model, torch.tensor([0, 1, 1, 1, 0, 0, 1]), seq_len=3)
    assert found == pytest.approx((128 / 3.5) ** (1 / 4), rel=1e-6)


def test_uniform_logits_give_the_vocabulary() -> None:
    assert perplexity(Table(torch.zeros(7, 7)), torch.arange(7), seq_len=7) == pytest.approx(7)  # type: ignore


def test_certainty_gives_one_and_impossibility_infinity() -> None:
    assert perplexity(table([0.0, 1.0], [1.0, 0.0]), torch.tensor([0, 1, 0]), seq_len=3) == 1
    assert perplexity(table([0.0, 1.0], [1.0, 0.0]), torch.tensor([0, 0, 1]), seq_len=3) == math.inf
    assert perplexity(Table(torch.tensor([[0.0, 1e4]] * 2)), torch.tensor([0, 0]), seq_len=2) == math.inf  # type: ignore


@pytest.mark.parametrize("make", [llama, opt])
def test_equals_the_loss_of_transformers(make: Any) -> None:
    model = make().eval()
    ids = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss)
    assert expected > 80  # far from the 64 of a model that says nothing
    assert perplexity(model, ids.flatten(), seq_len=16) == pytest.approx(expected, rel=1e-5)


def test_the_model_keeps_its_dtype_and_the_loss_is_fp32() -> None:
    model = llama().eval().bfloat16()
    ids = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    losses = nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    assert perplexity(model, ids, seq_len=32) == pytest.approx(float(losses.exp()), rel=1e-5)


def test_micro_batches_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = table([1 / 2, 1 / 2], [7 / 8, 1 / 8])
    data = torch.randint(2, (5 * 4,), generator=torch.Generator().manual_seed(0))
    whole = perplexity(model, data, seq_len=4)
    assert model.batches == [5]
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_LOGIT_BYTES", 2 * (4 * 4 * 2))  # two windows x seq_len x vocabulary x 4 bytes
    assert perplexity(model, data, seq_len=4, progress=lambda *at: seen.append(at)) == pytest.approx(whole)
    assert model.batches == [5, 2, 2, 1]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    monkeypatch.setattr(module, "_LOGIT_BYTES", 1)
    assert perplexity(model, data, seq_len=4) == pytest.approx(whole)
    assert model.batches[4:] == [1] * 5


def test_max_tokens_takes_whole_windows_from_the_start() -> None:
    model = table([1 / 2, 1 / 2], [7 / 8, 1 / 8])
    assert perplexity(model, torch.tensor([1, 0, 1, 1, 1, 1]), seq_len=2, max_tokens=3) == pytest.approx(8 / 7)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_put_back_also_after_an_error(training: bool) -> None:
    model = table([1 / 2, 1 / 2], [7 / 8, 1 / 8])
    model.train(training)
    model.inner.train(not training)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stop")

    perplexity(model, torch.tensor([0, 1]), seq_len=2)
    with pytest.raises(RuntimeError, match="stop"):
        perplexity(model, torch.tensor([0, 1]), seq_len=2, progress=fail)
    assert model.modes == [False, False]
    assert (model.training, model.inner.training) == (training, not training)


def test_nan_is_refused_with_its_windows() -> None:
    model = Table(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="model gives NaN for windows 0 to 1"):
        perplexity(model, torch.tensor([0, 0, 1, 1]), seq_len=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(9, dtype=torch.int64), {"seq_len": 9}, "seq_len must be at most 8"),
        (torch.zeros(9, dtype=torch.int64), {}, "seq_len must be at most 8"),  # 512 by default
        (torch.zeros(9, dtype=torch.int64), {"seq_len": 4, "max_tokens": 3}, "max_tokens must be at least"),
        (torch.zeros(3, dtype=torch.int64), {"seq_len": 4}, "too short: 3 tokens"),
        (torch.tensor([0, 1, 2, 0]), {"seq_len": 4}, "token id 2, but vocab_size=2"),
        ("text", {"seq_len": 4}, "tokenizer="),
        (None, {"seq_len": 4}, "data must be"),
    ],
)
def test_wrong_input_is_refused_before_the_model_runs(data: Any, options: dict[str, Any], message: str) -> None:
    model = table([1 / 2, 1 / 2], [7 / 8, 1 / 8])
    with pytest.raises(ValueError, match=message):
        perplexity(model, data, **options)
    assert not model.batches


def test_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="meta device"):
        perplexity(model, torch.zeros(4, dtype=torch.int64), seq_len=4)
