"""The comparison of allocations on a tiny model: each case as ``sparsify`` does it, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.bench.registry import Options
from trisparse.bench.studies import allocations
from trisparse.bench.studies.allocations import CASES, AllocatedModel
from trisparse.sparsity.allocation import find_allocation
from trisparse.sparsity.mask import masks, masks_sha256
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=48, max_position_embeddings=32, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("method", "sparsity", "allocation"),
    [
        ("wanda", "60%", "owl"),
        ("wanda", "70%", "global"),
        ("magnitude", "60% layer", "lamp"),
        ("wanda", "4:8", "owl:M=3,lambda=0.3"),
    ],
)
def test_a_case_is_what_sparsify_does(tokens, monkeypatch, method, sparsity, allocation):
    model, other = tiny(), tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    monkeypatch.setattr(
        allocations, "perplexity", lambda m, *a, **k: found.update(sha=masks_sha256(m)) or perplexity(m, *a, **k)
    )
    measured = AllocatedModel(model, None, tokens, tokens, samples=8, seq_len=16, windows=8)
    outcome = measured.measure(method, sparsity, allocation)
    report = sparsify(
        other, sparsity, method, tokens, samples=8, seq_len=16, allocation=allocation, propagate="dense", progress=False
    )
    assert found["sha"] == masks_sha256(other)
    assert outcome.sparsity == pytest.approx(report.allocated_sparsity)
    assert outcome.least < outcome.greatest
    assert outcome.perplexity == pytest.approx(perplexity(other.bfloat16(), tokens, seq_len=16))
    assert not masks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_row_for_the_dense_model_and_each_case_that_is_wanted(tokens, monkeypatch):
    cases = (("wanda", "60%", "uniform"), ("magnitude", "60% layer", "erk"))
    monkeypatch.setattr(allocations, "CASES", cases)
    monkeypatch.setattr(allocations, "load_smollm2", lambda: (tiny(), None))
    monkeypatch.setattr(allocations, "pydoc_text", lambda split: tokens)
    monkeypatch.setattr(allocations, "FULL", type("Small", (), {"calibration": 8, "seq_len": 16, "test": 8}))
    rows = list(allocations.allocations(Options()))
    assert [row.name for row in rows] == ["dense", "wanda 60% uniform", "magnitude 60% layer erk"]
    assert rows[1].parameters["allocation"] == "uniform"
    assert rows[1].metrics["wanda, uniform"]["sparsity"] == pytest.approx(0.6, abs=0.02)
    found = rows[2].metrics["magnitude, erk"]
    assert found["least_sparsity"] < found["greatest_sparsity"]
    assert found["perplexity"] > 1
    assert [row.name for row in allocations.allocations(Options(only="erk"))] == ["magnitude 60% layer erk"]


def test_every_case_names_an_allocation():
    for _, _, allocation in CASES:
        assert str(find_allocation(allocation)) == allocation
