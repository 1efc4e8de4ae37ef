"""Token windows that are kept in files, and windows drawn out of single documents as Wanda does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trisparse.sparsity import data as data_module
from trisparse.sparsity import window_cache
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.data import load_text, token_windows

WORDS = [f"w{i}" for i in range(40)]
ROWS = [" ".join(random.Random(i).choices(WORDS, k=5 + 7 * i % 90)) for i in range(60)]


def make_tokenizer(*, begin: bool = False, words: list[str] = WORDS) -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which takes everything, however short."""
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(window_cache, "_LEAST_CHARACTERS", 0)
    monkeypatch.setattr(window_cache, "_LEAST_TOKENS", 0)
    return tmp_path / "cache" / "windows"


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that windows were really cut."""
    done: list[str] = []
    for name in ("_windows", "_documents"):
        real = getattr(data_module, name)

        def counted(*args: Any, real: Any = real, name: str = name) -> Any:
            done.append(name)
            return real(*args)

        monkeypatch.setattr(data_module, name, counted)
    return done


TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("data", [" ".join(ROWS), ROWS, datasets.Dataset.from_dict({"text": ROWS})], ids=type)
@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_the_second_call_reads_a_file(cache: Path, cuts: list[str], data: Any, sampling: Any) -> None:
    if isinstance(data, str) and sampling == "documents":
        pytest.skip("one string is one document")
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8, "samples": 5, "seed": 3, "sampling": sampling}
    first = token_windows(data, **how)
    again = token_windows(data, **how)
    assert torch.equal(first, again)
    assert again.dtype == torch.int64
    assert len(cuts) == 1
    (file,) = cache.iterdir()
    assert load_file(file)["windows"].dtype == torch.int32
    assert torch.equal(token_windows(data, cache=False, **how), first)
    assert len(cuts) == 2


def test_everything_that_decides_is_in_the_key(cache: Path, cuts: list[str]) -> None:
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8, "samples": 5, "seed": 3}
    token_windows(ROWS, **how)
    others = [
        {"seq_len": 7}, {"samples": 4}, {"samples": None}, {"seed": 4}, {"seed": None}, {"sampling": "documents"},
        {"tokenizer": make_tokenizer(begin=True)}, {"tokenizer": make_tokenizer(words=[*WORDS[1:], WORDS[0]])},
    ]  # fmt: skip
    for count, other in enumerate(others, start=2):
        token_windows(ROWS, **{**how, **other})
        assert len(cuts) == count, other
    more = [*ROWS[:-1], ROWS[-1] + " w1"]
    for data in (more, " ".join(ROWS), [ROWS[0] + ROWS[1], *ROWS[2:]], datasets.Dataset.from_dict({"text": more})):
        before = len(cuts)
        token_windows(data, **how)
        assert len(cuts) == before + 1
    TOKENIZER(ROWS[:2], truncation=True, max_length=4)  # leaves its mark in the tokenizer
    before = len(cuts)
    token_windows(ROWS, **how)
    assert len(cuts) == before
    with pytest.raises(ValueError, match="vocab_size=5"):
        token_windows(ROWS, vocab_size=5, **how)
    assert len(cuts) == before


def test_a_file_that_changed_is_read_anew(cache: Path, cuts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8}
    for rows, expected in ((ROWS, 1), (ROWS, 1), (ROWS[::-1], 2)):
        text = "\n".join(json.dumps({"text": row}) for row in rows)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        token_windows(load_text(str(file)), **how)
        assert len(cuts) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x07"),  # another token
        lambda file: file.write_bytes(b"pickle"),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"windows": torch.zeros(5, 8, dtype=torch.int32)}, file),
        lambda file: save_file({"tokens": torch.zeros(5, 8, dtype=torch.int32)}, file),
    ],
    ids=["truncated", "flipped", "no-safetensors", "empty", "no-hash", "other-tensor"],
)
def test_a_damaged_file_is_cut_anew_and_replaced(cache: Path, cuts: list[str], damage: Any) -> None:
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8, "samples": 5, "seed": 0}
    first = token_windows(ROWS, **how)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert torch.equal(token_windows(ROWS, **how), first)
    assert len(cuts) == 2
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]
    token_windows(ROWS, **how)
    assert len(cuts) == 2


def test_it_can_be_switched_off_and_leaves_short_texts_alone(
    cache: Path, cuts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8}
    for value in ("0", "off", "False"):
        monkeypatch.setenv("TRISPARSE_CACHE_WINDOWS", value)
        token_windows(ROWS, **how)
    monkeypatch.setenv("TRISPARSE_CACHE_WINDOWS", "1")
    monkeypatch.undo()
    monkeypatch.setenv("TRISPARSE_CACHE", str(cache.parent))
    token_windows(ROWS, **how)
    token_windows(datasets.Dataset.from_dict({"text": ROWS}), **how)
    assert not cache.exists() or not list(cache.iterdir())


def test_what_cannot_be_told_apart_is_not_kept(cache: Path) -> None:
    def rows() -> Any:
        yield from ({"text": row} for row in ROWS)

    class Duck:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    token_windows(datasets.IterableDataset.from_generator(rows), tokenizer=TOKENIZER, seq_len=8, samples=2)
    token_windows(torch.arange(64), seq_len=8)
    token_windows(ROWS, tokenizer=Duck(), seq_len=8)  # type: ignore[arg-type]
    assert not cache.exists()


def test_a_stream_of_one_commit_of_the_hub_is_kept(
    cache: Path, cuts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40

    def load_dataset(path: str, **options: Any) -> Any:
        def rows(files: list[str]) -> Any:
            yield from ({"text": row} for row in ROWS)

        files = [f"hf://datasets/{path}@{commit}/{name}" for name in options["data_files"].values()]
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": files})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "seq_len": 8, "samples": 4, "seed": 0}
    first = token_windows(load_text("c4"), **how)
    assert torch.equal(token_windows(load_text("c4"), **how), first)
    assert len(cuts) == 1
    token_windows(load_text("c4:validation"), **how)
    assert len(cuts) == 2
    token_windows(load_text("c4").filter(lambda row: len(row["text"]) > 9), **how)  # no longer that stream
    token_windows(load_text("c4").filter(lambda row: len(row["text"]) > 99), **how)
    assert len(cuts) == 4
    commit = "b" * 40
    token_windows(load_text("c4"), **how)
    assert len(cuts) == 5
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="token windows are not kept: the cache cannot be written"):
        found = token_windows(ROWS, tokenizer=TOKENIZER, seq_len=8, samples=2)
    assert found.shape == (2, 8)


def wanda_c4(rows: list[str], seq_len: int, samples: int, seed: int, tokenizer: Any) -> list[list[int]]:
    """The draws of Wanda's calibration (``get_c4`` of its lib/data.py): a long document, then a place in it."""
    random.seed(seed)
    windows = []
    while len(windows) < samples:
        ids = tokenizer(rows[random.randint(0, len(rows) - 1)])["input_ids"]
        if len(ids) > seq_len:
            begin = random.randint(0, len(ids) - seq_len - 1)
            windows.append(ids[begin : begin + seq_len])
    return windows


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_documents_are_drawn_as_wanda_draws_them(seed: int) -> None:
    tokenizer = make_tokenizer(begin=True)
    how: dict[str, Any] = {"tokenizer": tokenizer, "seq_len": 50, "samples": 12, "seed": seed, "sampling": "documents"}
    expected = wanda_c4(ROWS, 50, 12, seed, tokenizer)
    assert token_windows(ROWS, **how).tolist() == expected
    assert token_windows(datasets.Dataset.from_dict({"text": ROWS}), **how).tolist() == expected
    ids = [tokenizer(row)["input_ids"] for row in ROWS]
    how.pop("tokenizer")
    assert token_windows(datasets.Dataset.from_dict({"input_ids": ids}), **how).tolist() == expected


def test_documents_of_a_stream_are_the_first_long_ones() -> None:
    read: list[int] = []

    def rows() -> Any:
        for number in range(1000):
            read.append(number)
            yield {"input_ids": [number] * (5 if number % 2 else 20)}

    stream = datasets.IterableDataset.from_generator(rows)
    found = token_windows(stream, seq_len=8, samples=6, seed=0, sampling="documents")
    assert found.shape == (6, 8)
    assert (found == found[:, :1]).all()  # one document a window
    chosen = set(found[:, 0].tolist())
    assert chosen <= set(range(0, 24, 2))  # of the first twelve that are long enough
    assert len(chosen) > 1
    assert max(read) < 30


def test_documents_refuse_what_they_cannot_do() -> None:
    how: dict[str, Any] = {"seq_len": 8, "samples": 2, "seed": 0, "sampling": "documents"}
    with pytest.raises(ValueError, match="none of its 3 documents is longer than seq_len=8"):
        token_windows(torch.zeros(3, 8, dtype=torch.int64), **how)
    with pytest.raises(ValueError, match="needs samples and a seed"):
        token_windows(ROWS, tokenizer=TOKENIZER, **{**how, "seed": None})
    with pytest.raises(ValueError, match="needs rows: a list of strings or a dataset, got str"):
        token_windows("one text", tokenizer=TOKENIZER, **how)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        token_windows(ROWS, **how)
    with pytest.raises(ValueError, match="sampling must be one of windows, documents, got 'rows'"):
        token_windows(ROWS, tokenizer=TOKENIZER, **{**how, "sampling": "rows"})
    with pytest.raises(ValueError, match="data holds batches"):
        calibration_batches(torch.nn.Linear(2, 2), [torch.zeros(1, 2)], sampling="documents")


def test_prune_takes_documents(tiny_llama: Path, tmp_path: Path, trisparse_command: Any) -> None:
    file = tmp_path / "rows.jsonl"
    words = (tiny_llama / "text.txt").read_text().split()
    file.write_text("\n".join(json.dumps({"text": " ".join(words[i : i + 40])}) for i in range(0, 2000, 40)))
    common = ["prune", tiny_llama / "dense", "--data", file, "--samples", 4, "--seq-len", 16, "--json"]
    trisparse_command(*common, "--out", tmp_path / "p", "--sampling", "documents")
    recipe = json.loads(trisparse_command("inspect", tmp_path / "p", "--json"))["recipe"]
    assert recipe[0]["sampling"] == "documents"
