"""Cross-entropy over a vocabulary, whose gradient takes the place of the logits.

    loss = Σ_i (logsumexp(z_i) - z_i[t_i])   over the tokens i whose target t_i counts
    dz_i = dloss · (softmax(z_i) - onehot(t_i)), and 0 where the target does not count

z [tokens, vocabulary]. The logits are the largest tensor of a step of a language model, and the usual code makes four
more of their size: the fp32 copy of half-precision ones, the log-probabilities, and the gradients of both. Here some
tokens at a time are widened to fp32 and reduced, and the backward writes dz where z was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of the fp32 logits of the tokens that are worked on at once: on the CPU they stay in the caches
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**27}


def cross_entropy_sum_ref(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The specification of `cross_entropy_sum`, in plain autograd."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")


def cross_entropy_sum(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum of the cross-entropies of all tokens that count, differentiable in the logits once.

    The logits stay as they are until the backward, which overwrites them. If the operation that made them needs them
    for its own gradient (a tanh, for one), autograd raises: it sees that they changed.

    Args:
        logits: [tokens, vocabulary], of a float dtype.
        targets: int64 [tokens]; ``ignore_index`` does not count.

    Returns:
        scalar, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: wrong shapes.
        IndexError: a target outside the vocabulary.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [tokens, vocabulary] and targets [tokens], got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    loss: Tensor = _CrossEntropySum.apply(logits, targets, ignore_index)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in _chunks(logits):
            log_probabilities = torch.log_softmax(logits[rows], -1, dtype=total.dtype)
            total += torch.nn.functional.nll_loss(
                log_probabilities, targets[rows], ignore_index=ignore_index, reduction="sum"
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        for rows in _chunks(logits):
            part, target = logits[rows], targets[rows, None]
            counted = target != ctx.ignore_index
            weight = counted * dloss
            gradient = torch.softmax(part, -1, dtype=dloss.dtype).mul_(weight)
            gradient.scatter_add_(1, target.where(counted, 0), -weight)
            part.copy_(gradient)
        return logits, None, None


def tokens_at_once(vocabulary: int, device_type: str) -> int:
    """Tokens whose logits are in memory in fp32 at once."""
    return max(1, _CHUNK_BYTES.get(device_type, 2**27) // max(1, 4 * vocabulary))


def _chunks(logits: Tensor) -> list[slice]:
    step = tokens_at_once(logits.shape[1], logits.device.type)
    return [slice(start, start + step) for start in range(0, len(logits), step)]
