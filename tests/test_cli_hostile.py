"""Folders with code of their own: no command runs it, and none asks whether it may."""

import json
import shutil

import pytest


@pytest.fixture
def hostile(tiny_llama, tmp_path, monkeypatch):
    """``hostile("dense")``: a copy of that folder whose tokenizer is a Python file of it."""

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(tiny_llama / kind, folder)
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        file = folder / "tokenizer_config.json"
        auto = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto, "tokenizer_class": "Evil"}))
        return folder

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked the user"))
    return make


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_eval_runs_no_tokenizer_of_the_folder(hostile, trisparse_error, tiny_llama, kind):
    shown = trisparse_error("eval", hostile(kind), "--data", tiny_llama / "text.txt")
    assert "the tokenizer of" in shown
    assert "code of its own, which is not run" in shown


def test_streaming_runs_no_tokenizer_of_the_folder(hostile, trisparse_error, tiny_llama, tmp_path):
    options = ["--sparsity", "50%", "--data", tiny_llama / "text.txt", "--out", tmp_path / "out", "--stream"]
    assert "code of its own, which is not run" in trisparse_error("prune", hostile("dense"), *options)
