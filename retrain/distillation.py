"""Distillation from the dense model: the logits' divergence at a temperature, beside the loss on the tokens.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2:

    loss = (1 − α) · CE(labels, z) + α · T² · KL(softmax(v / T) ‖ softmax(z / T))

with the logits z of the model that trains and v of the teacher. T² keeps the size of the gradients as T changes (their
section 2.1). α and T are ``distillation_weight`` and ``temperature`` of :class:`trisparse.retrain.perp.PERPConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def divergence(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T² · KL(teacher ‖ model) summed over the predicted tokens, and how many there are.

    Args:
        logits: [batch, seq_len, vocabulary] of the model that trains; the token at i predicts the one at i + 1.
        teacher: the same of the teacher, no gradient.
        labels: int64 [batch, seq_len]; -100 does not count.
        temperature: T, above 0.

    Returns:
        fp32 scalar, int64 scalar.
    """
    counted = (labels[:, 1:] != -100).unsqueeze(-1)
    student = F.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    target = F.log_softmax(teacher[:, :-1].float() / temperature, dim=-1)
    pointwise = F.kl_div(student, target, reduction="none", log_target=True)
    return temperature**2 * pointwise.masked_fill(~counted, 0).sum(), counted.sum()


def check_teacher(teacher: Any, model: Any) -> None:
    """Check that ``teacher`` can stand beside ``model``.

    Raises:
        ValueError: no language model, the model itself, another vocabulary, or another device.
    """
    if not isinstance(teacher, nn.Module) or not callable(getattr(teacher, "get_input_embeddings", None)):
        raise ValueError(f"teacher must be a transformers causal language model, got {type(teacher).__name__}")
    shared = {id(param) for param in model.parameters()}
    if any(id(param) in shared for param in teacher.parameters()):
        raise ValueError("teacher must be another model than the one that trains, they share parameters")
    ours, theirs = _embedding(model), _embedding(teacher)
    if ours.shape[0] != theirs.shape[0]:
        raise ValueError(f"teacher has a vocabulary of {theirs.shape[0]} tokens, and the model one of {ours.shape[0]}")
    if ours.device != theirs.device:
        raise ValueError(f"teacher is on {theirs.device}, and the model on {ours.device}: move one of them")


def _embedding(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


@torch.no_grad()
def teacher_logits(teacher: nn.Module, windows: Tensor) -> Tensor:
    """Logits [batch, seq_len, vocabulary] of token ids [batch, seq_len]."""
    logits: Tensor = teacher(input_ids=windows, use_cache=False).logits
    return logits
