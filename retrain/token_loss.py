"""The loss of transformers' causal language models, without copies of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from trisparse.kernels.cross_entropy import cross_entropy_sum


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The same as transformers' ``ForCausalLMLoss``, whose signature it has; a backward overwrites ``logits``.

    Args:
        logits: [batch, seq_len, vocab_size]; the token at i predicts the one at i + 1.
        labels: int64 [batch, seq_len]; ``ignore_index`` does not count.
        num_items_in_batch: what to divide the sum by, as the Trainer counts it over all batches of a step and all
            processes; None is the mean over this batch.
        shift_labels: labels that are in the place of their logits already.
        kwargs: what the Trainer or the model passes on to other losses; not read, as there.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total = cross_entropy_sum(logits.view(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / (
        num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )


def takes_lean_loss(module: nn.Module) -> bool:
    """Whether `lean_loss` changes the loss of the transformers model in ``module``."""
    model = _transformers_model(module)
    return model is not None and model.loss_function is ForCausalLMLoss


def _transformers_model(module: nn.Module) -> Any:
    return next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)


@contextmanager
def lean_loss(module: nn.Module) -> Iterator[None]:
    """Inside, the transformers model in ``module`` (itself, or PEFT's wrapper of it) takes `causal_lm_loss`.

    It does where its loss is transformers' own ``ForCausalLMLoss``, on the logits after whatever the model does to them
    (capping, scaling). A model with another loss, or one that does not ask ``loss_function``, keeps its own.
    """
    if not takes_lean_loss(module):
        yield
        return
    model = _transformers_model(module)
    before = model.__dict__.get("_loss_function")
    model.loss_function = causal_lm_loss
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before
