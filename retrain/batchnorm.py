"""BN-Recalibrate: the statistics of batch norms measured anew after pruning, without any gradient.

PERP, section 3.1, after Li et al. (2020): pruning changes the inputs of every norm behind it, while the running mean
and variance that it uses for inference are still the dense model's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trisparse.sparsity.modes import evaluating


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of ``model`` that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the running statistics of every batch norm to the average over ``batches``, each counted the same.

    A norm's statistics are measured on what reaches it when the norms before it use the batch's own, as in training;
    everything else is in eval mode. Modes and momenta are put back, and after an error the statistics, too.

    Args:
        model: takes a batch as its first argument.
        batches: pixel values [batch, channels, height, width], in the model's dtype; moved to its device.

    Returns:
        How many norms were recalibrated.

    Raises:
        ValueError: the model has no batch norm with running statistics, or there is no batch.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError("model has no batch norm with running statistics to recalibrate")
    device = next(model.parameters()).device
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms.values()]
    momenta = [norm.momentum for norm in norms.values()]
    count = 0
    with evaluating(model):
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative average
                norm.train()
            for count, batch in enumerate(batches, 1):  # noqa: B007
                model(batch.to(device))
            if not count:
                raise ValueError("data is empty: it holds no batch")
        except BaseException:
            for norm, buffers in zip(norms.values(), before, strict=True):
                for name, buffer in buffers.items():
                    norm.get_buffer(name).copy_(buffer)
            raise
        finally:
            for norm, momentum in zip(norms.values(), momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
