"""The demo on a tiny model: the whole way, with its figures and its verdict."""

import json

import pytest
import torch

from trisparse.bench import demo
from trisparse.sparsity.checkpoint import load
from trisparse.sparsity.mask import masks


def test_demo_goes_all_the_way(tiny_smollm2, tmp_path, capsys):
    result = demo.run_demo(tiny_smollm2, out=tmp_path / "kept")
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


def test_demo_notices_a_model_that_comes_back_different(tiny_smollm2, monkeypatch, capsys):
    real = demo.AutoModelForCausalLM.from_pretrained

    def corrupted(folder):
        model = real(folder)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    monkeypatch.setattr(demo.AutoModelForCausalLM, "from_pretrained", corrupted)
    assert demo.run_demo(tiny_smollm2, quiet=True)["same_perplexity"] is False
    assert capsys.readouterr().out == ""
