"""Hold masks while weights under them train: what is pruned gets no gradient, and so stays exactly zero.

The gradient of a pruned weight is set to zero as soon as it is there. So clipping does not count it, the momentum of
SGD and the moments of AdamW stay zero, and with them the weight; weight decay leaves a zero alone, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trisparse.kernels.bitmask import apply_bits, pack_bits
from trisparse.retrain.sharding import held, is_split, rows_held
from trisparse.sparsity.mask import Mask, masks


@contextmanager
def held_masks(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Zero the gradients of the pruned weights among ``params`` of ``model`` while open.

    Args:
        model: with its masks, and zeros where they prune (:func:`trisparse.sparsity.mask.check_masks`).
        params: what trains, whole or split over processes; those without a mask, and those that do not require a
            gradient, are left alone.
    """
    chosen = {id(param) for param in params if param.requires_grad}
    with ExitStack() as hooks:
        for name, mask in masks(model).items():
            owner, _, attribute = name.rpartition(".")
            # a compressed layer has a mask and no parameter of that name
            param = model.get_submodule(owner)._parameters.get(attribute)
            if param is not None and id(param) in chosen:
                packed, cols = _stored(mask)
                if is_split(param):
                    rows = packed.unflatten(0, (len(param), -1))  # of the mask's matrix, by row of the parameter
                    packed = rows[rows_held(len(param))].flatten(0, 1)
                hook = partial(_zero_pruned, packed.to(param.device), cols)
                hooks.callback(param.register_post_accumulate_grad_hook(hook).remove)
        yield


def _stored(mask: Mask) -> tuple[Tensor, int]:
    """The bits of ``mask`` in the layout in which the parameter is stored, and the columns of that matrix."""
    if not mask.transposed:
        return mask.bits, mask.cols
    cols = mask.shape[-1]
    return pack_bits(mask.dense().reshape(-1, cols).contiguous()), cols


def _zero_pruned(packed: Tensor, cols: int, param: Tensor) -> None:
    assert param.grad is not None
    if not param.grad.is_contiguous():
        param.grad = param.grad.contiguous()
    with torch.no_grad():
        apply_bits(held(param.grad).view(-1, cols), packed)
