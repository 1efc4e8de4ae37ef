"""Distillation: Hinton's formula by hand, in the training loop, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from trisparse.retrain.distillation import divergence
from trisparse.retrain.loop import with_labels
from trisparse.retrain.perp import retrain
from trisparse.sparsity.mask import check_masks


def test_divergence_by_hand():
    # two classes, T = 2; the first token is predicted by nothing, the last position predicts nothing
    student = torch.tensor([[[0.0, 0.0], [2 * math.log(3), 0.0], [50.0, -50.0]]])
    teacher = torch.tensor([[[2 * math.log(3), 0.0], [0.0, 0.0], [-50.0, 50.0]]])
    labels = torch.tensor([[-100, 1, 0]])
    # softmax(v / 2) = (3/4, 1/4), softmax(z / 2) = (1/2, 1/2) at the first position, the other way at the second
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    total, count = divergence(student, teacher, labels, 2.0)
    assert count == 2
    assert float(total) == pytest.approx(4 * (first + second), rel=1e-6)
    total, count = divergence(student, teacher, torch.tensor([[-100, -100, 0]]), 2.0)
    assert (int(count), float(total)) == (1, pytest.approx(4 * second, rel=1e-6))
    assert float(divergence(student, student, labels, 1.0)[0]) == 0


def test_divergence_reaches_the_student_alone():
    student = torch.randn(1, 3, 5, requires_grad=True)
    teacher = torch.randn(1, 3, 5)
    divergence(student, teacher, torch.tensor([[-100, 1, 2]]), 3.0)[0].backward()
    # d/dz of T² · KL is T · (softmax(z / T) − softmax(v / T))
    expected = 3 * (torch.softmax(student / 3, -1) - torch.softmax(teacher / 3, -1))
    torch.testing.assert_close(student.grad[:, :2], expected[:, :2].detach())
    assert not student.grad[:, 2].any()


def mixed(model, teacher, tokens, weight, temperature):
    with torch.no_grad():
        batch = with_labels(tokens)
        output = model(**batch)
        total, count = divergence(output.logits, teacher(tokens).logits, batch["labels"], temperature)
    return (1 - weight) * float(output.loss) + weight * float(total / count)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_first_loss_is_the_formula(build, tokens, quick, accumulation, weight):
    model, teacher = build("llama").eval(), build("qwen3").train()
    frozen = copy.deepcopy(teacher.state_dict())
    expected = mixed(model, teacher, tokens[:4], weight, 3.0)
    size = 4 // accumulation
    config = quick(
        steps=1, batch_size=size, gradient_accumulation=accumulation, distillation_weight=weight, temperature=3.0
    )
    report = retrain(model, tokens[:4], config, teacher=teacher, progress=False)
    assert report.first_loss == pytest.approx(expected, rel=1e-5)
    assert teacher.training  # put back
    assert all(param.grad is None and param.requires_grad for param in teacher.parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    check_masks(model)


def test_distillation_comes_closer_to_the_teacher(build, tokens, quick):
    model, teacher = build("llama"), build("qwen3").eval()
    before = mixed(model, teacher, tokens, 1.0, 2.0)
    retrain(model, tokens, quick(steps=30, distillation_weight=1.0), teacher=teacher, progress=False)
    assert mixed(model, teacher, tokens, 1.0, 2.0) < 0.8 * before


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        (lambda model: nn.Linear(2, 2), "teacher must be a transformers causal language model, got Linear"),
        (lambda model: "gpt2", "teacher must be a transformers causal language model, got str"),
        (lambda model: model, "share parameters"),
        (lambda model: copy.deepcopy(model).to("meta"), "teacher is on meta, and the model on cpu"),
    ],
)
def test_wrong_teachers_are_refused(build, tokens, quick, snapshot, assert_same, teacher, match):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        retrain(model, tokens, quick(), teacher=teacher(model), progress=False)
    assert_same(model, before)


def test_a_teacher_with_another_vocabulary_is_refused(build, tokens, quick):
    teacher = build("llama")
    teacher.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, and the model one of 48"):
        retrain(build("llama"), tokens, quick(), teacher=teacher, progress=False)
