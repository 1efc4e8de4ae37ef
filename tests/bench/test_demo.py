"""The demo on a tiny model: the whole way, with its figures and its verdict."""

import json
import string

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trisparse.bench import demo, perplexity_curve
from trisparse.retrain.perp import PERPConfig
from trisparse.sparsity.checkpoint import load
from trisparse.sparsity.mask import masks

TINY = demo.DemoScale(
    seq_len=32,
    calibration=4,
    test=4,
    retrain=PERPConfig(steps=2, batch_size=2, gradient_accumulation=1, seq_len=32, learning_rate=1e-3),
)


@pytest.fixture
def tiny_smollm2(monkeypatch):
    """A two-block Llama over characters in the place of SmolLM2."""
    characters = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(string.printable, start=3)}
    words = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True)
        return LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(demo, "load_smollm2", make)
    monkeypatch.setattr(perplexity_curve, "load_smollm2", make)
    monkeypatch.setattr(perplexity_curve, "FULL", TINY)


@pytest.mark.usefixtures("tiny_smollm2")
def test_demo_goes_all_the_way(tmp_path, capsys):
    result = demo.run_demo(TINY, out=tmp_path / "kept")
    shown = capsys.readouterr().out
    assert result["same_perplexity"] is True
    assert [row["model"] for row in result["models"]] == ["dense", "magnitude 50%", "wanda 50%", "wanda 2:4"]
    assert [row["sparsity"] for row in result["models"]] == [0, 0.5, 0.5, 0.5]
    assert result["perplexity_reloaded"] == pytest.approx(result["retraining"]["perplexity_after"], rel=1e-6)
    assert "wanda 2:4" in shown
    assert "the same" in shown
    json.dumps(result, default=str)
    kept = load(tmp_path / "kept")
    assert len(masks(kept)) == 14
    assert {str(mask.pattern) for mask in masks(kept).values()} == {"50%"}


@pytest.mark.usefixtures("tiny_smollm2")
def test_demo_notices_a_model_that_comes_back_different(monkeypatch, capsys):
    real = demo.AutoModelForCausalLM.from_pretrained

    def corrupted(folder):
        model = real(folder)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    monkeypatch.setattr(demo.AutoModelForCausalLM, "from_pretrained", corrupted)
    assert demo.run_demo(TINY, quiet=True)["same_perplexity"] is False
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("tiny_smollm2")
def test_curve_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity_curve, "SPARSITIES", ("50%",))
    monkeypatch.setattr(perplexity_curve, "RESULTS", tmp_path / "results" / "curve.json")
    monkeypatch.setattr(perplexity_curve, "PICTURE", tmp_path / "docs" / "curve.png")
    monkeypatch.setattr("sys.argv", ["perplexity_curve"])
    perplexity_curve.main()
    rows = json.loads((tmp_path / "results" / "curve.json").read_text())["rows"]
    assert [(row["method"], row["pattern"]) for row in rows] == [
        (method, pattern) for method in ("magnitude", "wanda") for pattern in ("50%", "2:4", "4:8")
    ]
    assert all(row["sparsity"] == 0.5 for row in rows)
    assert (tmp_path / "docs" / "curve.png").read_bytes().startswith(b"\x89PNG")
