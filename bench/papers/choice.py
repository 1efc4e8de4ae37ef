"""A multiple-choice task from Python's documentation, for where the papers' seven zero-shot tasks cannot be loaded.

A question is the beginning of a paragraph of the test split, and four continuations: its own, and those of three
other questions. The model chooses the one whose tokens have the highest mean log-likelihood, as lm-eval's ``acc_norm``
does by length. Chance is 25%. It is another task than the papers', and is not to be compared with their numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.text import pydoc_text

OPTIONS = 4
QUESTIONS = 24
BEGINNING, CONTINUATION = 24, 12  # words


class Question(NamedTuple):
    """Token ids of the beginning and of each continuation, and which of these is its own."""

    beginning: list[int]
    continuations: list[list[int]]
    answer: int


def choice_questions(
    tokenizer: Any, *, texts: Sequence[str] | None = None, questions: int = QUESTIONS, seed: int = 0
) -> list[Question]:
    """``questions`` of them, drawn from the paragraphs of ``texts``, by default the documentation's test split.

    Raises:
        ValueError: too few paragraphs of 36 words or more.
    """
    paragraphs = [
        words
        for text in (pydoc_text("test") if texts is None else texts)
        for paragraph in text.split("\n\n")
        if len(words := paragraph.split()) >= BEGINNING + CONTINUATION
    ]
    if len(paragraphs) < max(questions, OPTIONS):
        raise ValueError(f"texts have {len(paragraphs)} paragraphs that are long enough, {questions} are needed")
    draw = random.Random(seed)
    chosen = draw.sample(paragraphs, questions)
    endings = [" " + " ".join(words[BEGINNING : BEGINNING + CONTINUATION]) for words in chosen]
    found = []
    for index, words in enumerate(chosen):
        others = draw.sample([ending for place, ending in enumerate(endings) if place != index], OPTIONS - 1)
        answer = draw.randrange(OPTIONS)
        options = [*others[:answer], endings[index], *others[answer:]]
        ids = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        found.append(Question(tokenizer(" ".join(words[:BEGINNING]))["input_ids"], ids, answer))
    return found


@torch.no_grad()
def choice_accuracy(model: Any, questions: Sequence[Question]) -> float:
    """Share of ``questions`` whose own continuation has the highest mean log-likelihood; the first of equals counts."""
    device = model.get_input_embeddings().weight.device
    right = 0
    with evaluating(model):
        for question in questions:
            rows = [question.beginning + ids for ids in question.continuations]
            longest = max(map(len, rows))
            # Padded at the end, where causal attention keeps it from what is scored.
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            logits = model(input_ids=padded, use_cache=False).logits[:, len(question.beginning) - 1 : -1].float()
            following = padded[:, len(question.beginning) :]
            likelihood = -F.cross_entropy(logits.transpose(1, 2), following, reduction="none")  # [4, longest]
            lengths = torch.tensor([len(ids) for ids in question.continuations], device=device)
            scored = torch.arange(following.shape[1], device=device)[None] < lengths[:, None]
            means = (likelihood * scored).sum(1) / lengths
            right += int(means.argmax()) == question.answer
    return right / len(questions)
