"""Texts by name. The hub is played by local data of the same form: no test touches the network."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

from trisparse.sparsity.data import load_text, pydoc_text

SPLITS = ("train", "calibration", "validation", "test")


def paragraphs(text: str) -> set[str]:
    joined = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in joined if len(paragraph) > 60}


def test_pydoc_shares_are_as_documented() -> None:
    sizes = {split: sum(map(len, pydoc_text(split))) for split in SPLITS}
    whole = sum(sizes.values())
    assert whole > 350_000
    for split, share in {"train": 0.55, "calibration": 0.19, "validation": 0.10, "test": 0.16}.items():
        assert abs(sizes[split] / whole - share) < 0.03, split


def test_no_paragraph_stands_in_two_pydoc_splits() -> None:
    seen: dict[str, str] = {}
    for split in SPLITS:
        for paragraph in set().union(*map(paragraphs, pydoc_text(split))):
            assert seen.setdefault(paragraph, split) == split, paragraph


def test_pydoc_leaves_out_only_what_is_printed_elsewhere() -> None:
    used = [text for split in SPLITS for text in pydoc_text(split)]
    assert len(used) == len(set(used))
    there = set().union(*map(paragraphs, used))
    everything = set().union(*map(paragraphs, topics.values()))
    assert len(everything - there) < 0.03 * len(everything)


def test_pydoc_splits_mix_topics_and_have_no_trailing_white_space() -> None:
    for split in SPLITS:
        texts = pydoc_text(split)
        assert len(texts) >= 10
        assert len({text[:1].lower() for text in texts}) > 2
        assert not any(line != line.rstrip() for text in texts for line in text.splitlines())
    assert pydoc_text("test")[1].startswith("Comparisons\n*****")  # a known topic stays where it is


def test_pydoc_by_name() -> None:
    assert load_text("pydoc") == pydoc_text("train")
    assert load_text("pydoc", "calibration") == pydoc_text("calibration")
    assert load_text("pydoc:test", "calibration") == pydoc_text("test")


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_text_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("Zwölf\n\nBoxkämpfer", encoding="utf-8")
    assert load_text(str(tmp_path / name), "test") == "Zwölf\n\nBoxkämpfer"


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["one", "two", "three"]})


@pytest.mark.parametrize(("suffix", "write"), [("json", "json"), ("jsonl", "json"), ("parquet",) * 2, ("csv",) * 2])
def test_table_file(tmp_path: Path, rows: datasets.Dataset, suffix: str, write: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    getattr(rows, f"to_{write}")(str(path))
    assert load_text(str(path), "test")["text"][:] == ["one", "two", "three"]


def test_saved_folder(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.save_to_disk(str(tmp_path / "plain"))
    assert load_text(str(tmp_path / "plain"), "test")["text"][:] == ["one", "two", "three"]
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "splits"))
    assert len(load_text(str(tmp_path / "splits"))) == 3
    assert len(load_text(str(tmp_path / "splits"), "calibration")) == 3
    assert len(load_text(str(tmp_path / "splits"), "test")) == 1
    with pytest.raises(ValueError, match=r"one of train, test .* got 'validation'"):
        load_text(str(tmp_path / "splits"), "validation")


Call = tuple[str, dict[str, Any]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, rows: datasets.Dataset) -> list[Call]:
    """Every call of ``load_dataset``, answered with local rows."""
    calls: list[Call] = []

    def load_dataset(path: str, **options: Any) -> Any:
        calls.append((path, options))
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


C4_TRAIN = {"streaming": True, "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}
C4_VALIDATION = {"streaming": True, "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}}


@pytest.mark.parametrize(
    ("spec", "split", "path", "options"),
    [
        ("wikitext2", None, "Salesforce/wikitext", {"split": "train", "name": "wikitext-2-raw-v1"}),
        ("wikitext2", "calibration", "Salesforce/wikitext", {"split": "train", "name": "wikitext-2-raw-v1"}),
        ("wikitext2:test", "train", "Salesforce/wikitext", {"split": "test", "name": "wikitext-2-raw-v1"}),
        ("c4", "calibration", "allenai/c4", {"split": "train", **C4_TRAIN}),
        ("c4", "test", "allenai/c4", {"split": "validation", **C4_VALIDATION}),
        ("owner/name", "calibration", "owner/name", {"split": "train", "streaming": True}),
        ("owner/name:dev", None, "owner/name", {"split": "dev", "streaming": True}),
    ],
)
def test_hub_names(hub: list[Call], spec: str, split: str | None, path: str, options: dict[str, Any]) -> None:
    found = load_text(spec, split)
    assert hub == [(path, options)]
    assert [row["text"] for row in found] == ["one", "two", "three"]


def test_names_go_before_folders(hub: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    load_text("c4")
    assert hub[0][0] == "allenai/c4"
    with pytest.raises(ValueError, match="save_to_disk"):
        load_text("./c4")


@pytest.mark.parametrize(
    "spec", ["", "absent.txt", "./absent", "/absent/folder", "~/absent", "a/b/c", "absent.csv:train"]
)
def test_missing_paths_are_not_looked_up_on_the_hub(hub: list[Call], spec: str) -> None:
    with pytest.raises(ValueError, match=r"no such file .* 'pydoc' .*\.txt .*'wikitext2', 'c4'"):
        load_text(spec)
    assert not hub


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_text(str(tmp_path / "latin.txt"))
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image\.png is of a kind"):
        load_text(str(tmp_path / "image.png"))
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read"):
        load_text(str(tmp_path / "broken.jsonl"))


@pytest.mark.parametrize("spec", ["pydoc:dev", "c4:dev"])
def test_unknown_splits(hub: list[Call], spec: str) -> None:
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        load_text(spec)
    assert not hub


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"'allenai/c4'.*Couldn't reach.*'pydoc'.*save_to_disk"):
        load_text("c4")


def test_an_unknown_dataset_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no dataset 'owner/nam' on the Hugging Face hub"):
        load_text("owner/nam")
