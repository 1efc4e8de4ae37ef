"""Perplexity of a language model on a text: how likely it finds each next token.

    perplexity = exp( mean over windows and positions t of -log p(x[t+1] | x[0..t]) )

over non-overlapping windows, ``seq_len - 1`` predicted tokens each: the protocol of Wanda (``lib/eval.py``) and
PERP. (Wanda multiplies the mean by ``seq_len`` and divides it out again: the same number.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from trisparse.sparsity.data import token_windows
from trisparse.sparsity.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The logits of a micro-batch, in fp32, may take this much: windows x seq_len x vocabulary x 4 bytes.
_LOGIT_BYTES = 256 * 2**20
_MAX_EXPONENT = math.log(sys.float_info.max)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of ``model`` on ``data``; the model computes in its own dtype, the loss in fp32.

    Args:
        model: a causal language model; left in the mode (train or eval) that it came in.
        data: what :func:`trisparse.sparsity.data.token_windows` takes.
        seq_len: tokens per window, at most the model's ``max_position_embeddings``.
        max_tokens: read only the first so many tokens (whole windows).
        progress: called with the windows done and their total, after each micro-batch.

    Returns:
        The perplexity, at least 1; ``inf`` where the mean loss is too great for a float.

    Raises:
        ValueError: ``data`` as in ``token_windows``; ``seq_len`` over the model's maximum, or ``max_tokens`` under
            one window; a model on the meta device, or one that gives NaN.
    """
    embedding = cast(torch.Tensor, model.get_input_embeddings().weight)
    if embedding.device.type == "meta":
        raise ValueError("model is on the meta device: it has no weights to compute with")
    windows = _windows(model, data, tokenizer, seq_len, max_tokens, vocab_size=len(embedding))
    per_batch = max(1, _LOGIT_BYTES // (4 * seq_len * len(embedding)))
    loss, done = 0.0, 0
    with evaluating(model):
        for batch in torch.split(windows, per_batch):
            loss += _summed_loss(model, batch.to(embedding.device))
            if math.isnan(loss):
                raise ValueError(f"model gives NaN for windows {done} to {done + len(batch) - 1} of data")
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    return perplexity_of(loss / (len(windows) * (seq_len - 1)))


def perplexity_of(mean_loss: float) -> float:
    """exp of the mean of -log p over tokens; ``inf`` where that is too great for a float."""
    return math.exp(mean_loss) if mean_loss < _MAX_EXPONENT else math.inf


def _windows(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    max_tokens: int | None,
    vocab_size: int,
) -> torch.Tensor:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise ValueError(f"seq_len must be at most {longest}, the model's max_position_embeddings, got {seq_len}")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"max_tokens must be at least seq_len={seq_len}, one window, got {max_tokens}")
    samples = None if max_tokens is None else max_tokens // seq_len
    return token_windows(data, tokenizer=tokenizer, seq_len=seq_len, samples=samples, vocab_size=vocab_size)


def _summed_loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Sum of -log p(next token) over windows [n, seq_len], in fp32; the sum itself in fp64."""
    logits = model(input_ids=windows, use_cache=False).logits  # [n, seq_len, vocabulary]
    # The last position predicts nothing. Ignoring it saves a copy of the logits without it.
    following = windows.roll(-1, dims=1)
    following[:, -1] = -100
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten().to(logits.device), ignore_index=-100, reduction="none"
    )
    return float(losses.double().sum())
