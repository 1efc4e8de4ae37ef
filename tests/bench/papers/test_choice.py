"""The local multiple-choice task: its questions, and the accuracy against sums of log-likelihoods done one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trisparse.bench.papers.choice import Question, choice_accuracy, choice_questions


@pytest.fixture(scope="module")
def model(tiny_llama):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama / "dense")
    for param in model.parameters():  # the usual start makes all tokens equally likely
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.5)
    return model


@torch.no_grad()
def one_by_one(model, question):
    means = []
    for ids in question.continuations:
        logits = model(torch.tensor([question.beginning + ids])).logits[0].log_softmax(-1)
        start = len(question.beginning)
        means.append(sum(float(logits[start + i - 1, token]) for i, token in enumerate(ids)) / len(ids))
    return means.index(max(means)) == question.answer


def test_the_highest_mean_log_likelihood_is_chosen(model):
    draw = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(1, 16, (length,), generator=draw).tolist()

    questions = [Question(ids(5), [ids(3), ids(7), ids(2), ids(4)], i % 4) for i in range(40)]
    right = [one_by_one(model, question) for question in questions]
    assert 0 < sum(right) < 40
    assert choice_accuracy(model, questions) == sum(right) / 40


def test_questions_are_the_same_every_time_and_hold_their_own_continuation(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama / "dense")
    words = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not"]
    texts = ["\n\n".join(" ".join(words[(i * j + j) % 11] for j in range(40)) for i in range(8)), "too short"]
    questions = choice_questions(tokenizer, texts=texts, questions=6)
    assert questions == choice_questions(tokenizer, texts=texts, questions=6)
    assert questions != choice_questions(tokenizer, texts=texts, questions=6, seed=1)
    paragraphs = [tokenizer(text)["input_ids"] for text in texts[0].split("\n\n")]
    for question in questions:
        assert len(question.continuations) == 4
        assert question.beginning + question.continuations[question.answer] in [row[:36] for row in paragraphs]
    with pytest.raises(ValueError, match="texts have 8 paragraphs that are long enough, 9 are needed"):
        choice_questions(tokenizer, texts=texts, questions=9)
