"""The comparison of reconstruction, retraining and cycles on a tiny model, and its command line."""

from __future__ import annotations

import json

import pytest

from trisparse.bench import reconstruction
from trisparse.bench.reconstruction import as_line


@pytest.fixture
def small(tiny_llama, tmp_path, monkeypatch):
    text = (tiny_llama / "text.txt").read_text()
    monkeypatch.setattr(reconstruction, "pydoc_text", lambda split: [text])
    monkeypatch.setattr(reconstruction, "RESULTS", tmp_path / "reconstruction.json")
    return [
        *["--model", str(tiny_llama / "dense"), "--steps", "6", "--block-steps", "20", "--cycles", "2", "--samples"],
        *["8", "--seq-len", "16", "--test", "8", "--rank", "2", "--learning-rate", "2e-2", "--sparsity", "75%"],
    ]


def test_every_way_is_measured_and_written(small, tmp_path, capsys):
    reconstruction.main([*small, "--json"])
    result = json.loads((tmp_path / "reconstruction.json").read_text())
    rows = {row["what"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "pruned", "reconstructed", "retrained", "2 cycles"]
    assert rows["reconstructed"]["error_after"] < rows["reconstructed"]["error_before"]
    assert rows["retrained"]["perplexity"] < rows["pruned"]["perplexity"]
    assert rows["2 cycles"]["perplexity"] < rows["pruned"]["perplexity"]
    assert (rows["retrained"]["steps"], rows["2 cycles"]["steps"]) == (6, 6)
    assert rows["2 cycles"]["patterns"] == ["50%", "75%"]
    assert result["settings"]["block_steps"] == 20
    assert "--block-steps 20" in result["how"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == [as_line(row) for row in result["rows"]]


def test_nothing_is_written_unasked(small, tmp_path, capsys):
    reconstruction.main([*small[:2], "--steps", "1", "--block-steps", "1", *small[6:]])
    assert not (tmp_path / "reconstruction.json").exists()
    assert len(capsys.readouterr().out.splitlines()) == 5
