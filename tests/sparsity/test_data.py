"""Windows of tokens: every kind of data, cut as computed by hand, and every wrong input refused by name."""

from __future__ import annotations

import sys
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trisparse.sparsity.data import token_windows


class Words:
    """A tokenizer of one token per character (its code point), which adds a first token 1."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        assert options.get("truncation") is False, "a text must not be cut by the tokenizer"
        assert options.get("verbose") is False, "a long text must not warn"
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


WORDS: Any = Words()


def windows(data: Any, **options: Any) -> list[list[int]]:
    found = token_windows(data, **options)
    assert found.dtype == torch.int64
    assert found.device.type == "cpu"
    return found.tolist()  # type: ignore[no-any-return]


def test_a_stream_is_cut_and_its_rest_dropped() -> None:
    assert windows(torch.arange(8), seq_len=3) == [[0, 1, 2], [3, 4, 5]]
    assert windows(torch.arange(8, dtype=torch.int32), seq_len=3, samples=1) == [[0, 1, 2]]
    assert windows(torch.arange(8, dtype=torch.uint8), seq_len=8, samples=5) == [list(range(8))]


def test_rows_are_cut_one_by_one() -> None:
    rows = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    assert windows(rows, seq_len=2) == [[0, 1], [2, 3], [10, 11], [12, 13]]


def test_the_windows_do_not_alias_the_data() -> None:
    stream = torch.arange(6)
    token_windows(stream, seq_len=3)[0, 0] = 99
    assert stream[0] == 0


@given(length=st.integers(2, 200), seq_len=st.integers(2, 20), samples=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_any_choice_is_of_distinct_windows(length: int, seq_len: int, samples: int, seed: int) -> None:
    stream = torch.arange(length)
    if length < seq_len:
        with pytest.raises(ValueError, match="too short"):
            token_windows(stream, seq_len=seq_len)
        return
    every = windows(stream, seq_len=seq_len)
    assert every == [list(range(i, i + seq_len)) for i in range(0, length - seq_len + 1, seq_len)]
    chosen = windows(stream, seq_len=seq_len, samples=samples, seed=seed)
    assert len(chosen) == min(samples, len(every))
    assert len({row[0] for row in chosen}) == len(chosen)
    assert all(row in every for row in chosen)
    assert chosen == windows(stream, seq_len=seq_len, samples=samples, seed=seed)


def test_a_seed_shuffles_and_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    orders = {str(windows(torch.arange(40), seq_len=2, seed=seed)) for seed in range(5)}
    assert len(orders) == 5
    assert str(windows(torch.arange(40), seq_len=2)) not in orders
    assert torch.equal(before, torch.random.get_rng_state())


def test_text_is_joined_by_blank_lines_and_tokenized_once() -> None:
    a, b, newline = ord("a"), ord("b"), ord("\n")
    assert windows("ab", tokenizer=WORDS, seq_len=3) == [[1, a, b]]
    assert windows(["a", "b"], tokenizer=WORDS, seq_len=5) == [[1, a, newline, newline, b]]
    assert windows(("a", "", "b"), tokenizer=WORDS, seq_len=7) == [[1, a, *[newline] * 4, b]]


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (BATCH, [[5, 6], [8, 9], [10, 11]]),  # the 7 stands before padding
        ([BATCH, {"input_ids": [[1, 2]]}], [[5, 6], [8, 9], [10, 11], [1, 2]]),
        (iter([torch.tensor([[1, 2, 3]]), torch.tensor([4, 5])]), [[1, 2], [4, 5]]),
        ({"input_ids": torch.tensor([1, 2, 3, 4]), "attention_mask": torch.ones(4, dtype=int)}, [[1, 2], [3, 4]]),
    ],
)
def test_batches(data: Any, expected: list[list[int]]) -> None:
    assert windows(data, seq_len=2) == expected


def test_an_endless_iterable_is_read_only_as_far_as_needed() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield torch.tensor([[read, read]])

    assert windows(endless(), seq_len=2, samples=3) == [[1, 1], [2, 2], [3, 3]]
    assert read == 3


def test_needed_tokens_are_counted_over_whole_batches() -> None:
    """A batch with padding comes as several rows; all of them count."""
    padded = {"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    data = iter([padded, "must not be read"])
    assert windows(data, seq_len=2, samples=2) == [[1, 2], [4, 5]]


def test_the_rest_of_a_row_gives_no_window() -> None:
    """Two rows of three tokens hold six tokens, but only two windows of two: a third row is needed."""
    rows = [torch.tensor([[i, i, i]]) for i in range(5)]
    assert windows(iter(rows), seq_len=2, samples=3) == [[0, 0], [1, 1], [2, 2]]


def test_dataset_of_tokens_is_one_stream_without_its_padding() -> None:
    rows = {"input_ids": [[1, 2, 3], [4, 0], [5, 6]], "attention_mask": [[1, 1, 1], [1, 0], [1, 1]]}
    data = datasets.Dataset.from_dict(rows)
    assert windows(data, seq_len=3) == [[1, 2, 3], [4, 5, 6]]
    assert windows(data.with_format("torch"), seq_len=3) == [[1, 2, 3], [4, 5, 6]]
    assert windows(data.to_iterable_dataset(), seq_len=3, samples=1) == [[1, 2, 3]]


def test_dataset_of_text_equals_the_list_of_its_rows() -> None:
    texts = [f"row {i}" for i in range(50)]
    data = datasets.Dataset.from_dict({"text": texts, "id": list(range(50))})
    assert windows(data, tokenizer=WORDS, seq_len=4) == windows(texts, tokenizer=WORDS, seq_len=4)
    head = windows(texts, tokenizer=WORDS, seq_len=4, samples=6)
    assert windows(data, tokenizer=WORDS, seq_len=4, samples=6) == head
    assert windows(data.to_iterable_dataset(), tokenizer=WORDS, seq_len=4, samples=6) == head


def test_missing_texts_count_as_empty_rows() -> None:
    data = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
    assert windows(data, tokenizer=WORDS, seq_len=7) == windows(["a", "", "b"], tokenizer=WORDS, seq_len=7)


def test_a_stream_is_read_as_far_as_the_samples_need_and_a_seed_looks_further() -> None:
    read = 0

    def rows() -> Any:
        nonlocal read
        for i in range(10_000):
            read = i + 1
            yield {"input_ids": [i] * 10}

    stream = datasets.IterableDataset.from_generator(rows)
    assert len(windows(stream, seq_len=10, samples=4)) == 4
    assert read <= 6  # one row to learn the columns, four for the windows
    chosen = windows(stream, seq_len=10, samples=4, seed=0)
    assert 30 <= read <= 40
    assert max(row[0] for row in chosen) > 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {}, "data must be .* got NoneType"),
        (7, {}, "data must be .* got int"),
        ({"labels": [1]}, {}, "data must be .* got dict"),
        (torch.empty(0, dtype=torch.int64), {}, "data is empty"),
        (torch.empty(3, 0, dtype=torch.int64), {}, "data is empty"),
        ([], {}, "data is empty"),
        ("", {}, "data is empty"),
        ([" ", "\n"], {}, "data is empty"),
        (datasets.Dataset.from_dict({"input_ids": []}), {}, "data is empty"),
        (datasets.Dataset.from_dict({"text": []}), {"tokenizer": WORDS}, "data is empty"),
        (torch.arange(3), {}, "data is too short: 3 tokens, .* seq_len=4"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "too short: 3 tokens in its longest row, .* seq_len=4"),
        (torch.rand(8), {}, "integer token ids, got a tensor of torch.float32"),
        (torch.ones(8, dtype=torch.bool), {}, "integer token ids, got a tensor of torch.bool"),
        (torch.ones(2, 2, 2, dtype=torch.int64), {}, r"shape \(2, 2, 2\)"),
        ("some text", {}, "tokenizer="),
        (datasets.Dataset.from_dict({"text": ["some text"]}), {}, "tokenizer="),
        (["some text", 3], {"tokenizer": WORDS}, "it holds a str"),
        ([1, 2, 3, 4], {}, "it holds a int"),
        (datasets.Dataset.from_dict({"words": ["a"], "n": [1]}), {}, "it has: words, n"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), {}, "one of its splits: train"),
        (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), {"tokenizer": WORDS}, "samples must"),
        (torch.tensor([1, 2, -3, 4]), {}, "token id -3"),
        (torch.tensor([1, 2, 3, 10]), {"vocab_size": 10}, "token id 10, but vocab_size=10"),
        (torch.arange(8), {"seq_len": 1}, "seq_len must be at least 2"),
        (torch.arange(8), {"samples": 0}, "samples must be at least 1"),
    ],
)
def test_wrong_data_is_refused_by_name(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(data, **{"seq_len": 4, **options})


def test_the_greatest_id_of_the_vocabulary_is_allowed() -> None:
    assert windows(torch.tensor([0, 9]), seq_len=2, vocab_size=10) == [[0, 9]]


def test_tensors_need_no_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert windows(torch.arange(4), seq_len=2) == [[0, 1], [2, 3]]
