"""Perplexity of a language model on a text: how likely it finds each next token.

    perplexity = exp( mean over windows and positions t of -log p(x[t+1] | x[0..t]) )

over non-overlapping windows, ``seq_len - 1`` predicted tokens each: the protocol of Wanda (``lib/eval.py``) and
PERP. (Wanda multiplies the mean by ``seq_len`` and divides it out again: the same number.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from trisparse.sparsity.data import token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The logits of a micro-batch, in fp32, may take this much: windows x seq_len x vocabulary x 4 bytes.
_LOGIT_BYTES = 256 * 2**20


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
            one window; a model without a vocabulary, on the meta device, or whose loss is NaN.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise ValueError(f"seq_len must be at most {longest}, the model's max_position_embeddings, got {seq_len}")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"max_tokens must hold at least one window of seq_len={seq_len}, got {max_tokens}")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    windows = token_windows(
        data,
        tokenizer=tokenizer,
        seq_len=seq_len,
        samples=None if max_tokens is None else max_tokens // seq_len,
        vocab_size=vocab_size,
    )
    device = model.get_input_embeddings().weight.device
