"""The comparison of reconstruction, retraining and cycles on a tiny model."""

from __future__ import annotations

import pytest

from trisparse.bench.models import load_causal_lm
from trisparse.bench.studies import reconstruction
from trisparse.bench.studies.reconstruction import RECORDED, Scale, compare

SMALL = Scale("75%", 6, 20, cycles=2, samples=8, seq_len=16, test=8, learning_rate=2e-2, rank=2)


@pytest.fixture
def rows(tiny_llama, monkeypatch):
    text = (tiny_llama / "text.txt").read_text()
    monkeypatch.setattr(reconstruction, "pydoc_text", lambda split: [text])
    model, tokenizer = load_causal_lm(str(tiny_llama / "dense"))
    return {row.name: row for row in compare(model, tokenizer, "tiny", SMALL)}


def test_every_way_is_measured(rows):
    assert list(rows) == ["dense", "pruned", "reconstructed", "retrained", "2 cycles"]
    found = {name: row.metrics[name] for name, row in rows.items()}
    assert found["reconstructed"]["error_after"] < found["reconstructed"]["error_before"]
    assert found["retrained"]["perplexity"] < found["pruned"]["perplexity"]
    assert found["2 cycles"]["perplexity"] < found["pruned"]["perplexity"]
    assert (found["retrained"]["steps"], found["2 cycles"]["steps"]) == (6, 6)
    assert rows["2 cycles"].parameters["patterns"] == ["50%", "75%"]
    assert rows["dense"].parameters["block_steps"] == 20
    assert rows["retrained"].seconds["retrained"][0] > 0


def test_quick_takes_a_sixth_of_the_steps():
    quick = RECORDED.quick()
    assert (quick.steps, quick.block_steps, quick.samples, quick.test) == (10, 6, 8, 8)
    assert (quick.cycles, quick.seq_len) == (RECORDED.cycles, RECORDED.seq_len)
