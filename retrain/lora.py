"""LoRA of a dense layer that keeps the zeros of its mask, as custom modules of PEFT; lora_layer.py has the variants.

Where nothing is pruned (the output head) every variant is plain LoRA. Where whole outputs are pruned (``Rows``), B has
the kept rows alone and is added to them alone, so all variants but "scale_lora" are plain LoRA on the smaller layer,
and can be merged. A convolution's weight [n, c, d, d] is seen as the matrix [n, c·d²]. Source of both: PERP, Appendix
A, "LoRA for convolutions and pruned layers".
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.bitmask import apply_bits, pack_bits, unpack_bits
from trisparse.kernels.lora import lora
from trisparse.kernels.masked_lora import effective_weight, mask_lora, scale_lora
from trisparse.retrain.lora_layer import VariantLora
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, MaskError, mask_of
from trisparse.sparsity.pattern import Rows


def kept_rows(mask: Mask | None) -> Tensor | None:
    """Indices of the rows that a mask of whole rows keeps, or None for any other mask."""
    if mask is None or not isinstance(mask.pattern, Rows):
        return None
    kept = mask.matrix().any(1).nonzero()[:, 0]
    return kept if mask.kept == len(kept) * mask.cols else None


def factor_sizes(module: nn.Module) -> tuple[int, int]:
    """Columns of A and rows of B of the LoRA on ``module``, a layer of any kind that takes one."""
    if isinstance(module, SparseLinear):
        return module.in_features, module.out_features
    weight: Any = module.weight
    outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
    rows = kept_rows(mask_of(module))
    return weight.numel() // outputs, outputs if rows is None else len(rows)


def fills_zeros(module: nn.Module) -> bool:
    """Whether a merge of plain LoRA into ``module`` makes pruned weights non-zero; not where whole rows are pruned."""
    mask = mask_of(module)
    return mask is not None and (isinstance(module, SparseLinear) or kept_rows(mask) is None)


class _DenseLora(VariantLora):
    """What linears and convolutions share: the mask as packed bits in the layout of the stored weight, and merging.

    The mask is no part of the ``state_dict``.

    Raises:
        ValueError: an option of PEFT's that this layer does not implement.
        MaskError: a pruned weight of the base layer is not zero.
    """

    default_variant = "mask_lora"
    packed: Tensor | None
    rows: Tensor | None
    """Kept rows, int64, where whole rows are pruned; those of B."""
    transposed: bool

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return factor_sizes(module)

    def _read_mask(self, name: str) -> None:
        layer = self.get_base_layer()
        self.transposed = isinstance(layer, Conv1D)
        mask = mask_of(layer)
        packed = None
        if mask is not None:
            keep = mask.dense(layer.weight.device)
            if bool(((layer.weight != 0) & ~keep).any()):
                raise MaskError(f"{name} has pruned weights that are not zero")
            packed = pack_bits(keep.contiguous()) if self.transposed else mask.bits.to(layer.weight.device)
        rows = kept_rows(mask)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("rows", None if rows is None else rows.to(layer.weight.device), persistent=False)

    def _own_variant(self, variant: str) -> str:
        if self.packed is None or (self.rows is not None and variant != "scale_lora"):
            return "lora"
        return variant

    def _fills_zeros(self, variant: str) -> bool:
        return variant == "lora" and self.packed is not None and self.rows is None

    def _all_rows(self, up: Tensor) -> Tensor:
        """B [out, rank], with zeros in pruned rows where it holds the kept ones alone."""
        if self.rows is None:
            return up
        mask = mask_of(self.get_base_layer())
        assert mask is not None
        return up.new_zeros(mask.bits.shape[0], up.shape[1]).index_copy(0, self.rows, up)

    def _stored(self, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The factors of the update, whose product is in the layout of the base weight's matrix."""
        up = self._all_rows(up) * scale
        return (down.t(), up.t()) if self.transposed else (up, down)

    def _original(self) -> Tensor:
        weight: Tensor = self.get_base_layer().weight.detach() if self.unmerged is None else self.unmerged
        return weight

    _held = _original

    def _merged(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        left, right = self._stored(down, up, scale)
        original = self._original()
        weight = original.reshape(left.shape[0], -1)
        if self.packed is None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            merged = torch.addmm(weight.to(wide), left.to(wide), right.to(wide)).to(weight.dtype)
        else:
            merged = effective_weight(weight, None if variant == "scale_lora" else self.packed, left, right)
        return merged.view_as(original)

    def _set_weight(self, weight: Tensor) -> None:
        self.get_base_layer().weight.data = weight

    def _delta(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        left, right = self._stored(down, up, scale)
        delta = left @ right
        if variant == "scale_lora":
            delta = (delta - 1) * self._original().reshape(delta.shape).to(delta)
        elif self.packed is not None and variant != "lora":
            apply_bits(delta, self.packed)
        return delta.view_as(self._original())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is of low rank with factors of PEFT's shapes."""
        return self.variant[adapter_name] == "lora" and self.rows is None


class MaskLoraLinear(_DenseLora):
    """LoRA of an ``nn.Linear`` or a transformers ``Conv1D``; use it through :func:`mask_lora_modules`."""

    def _adapted(self, x: Tensor, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        layer = self.get_base_layer()
        if variant == "scale_lora":
            return scale_lora(x, layer.weight, down, self._all_rows(up), layer.bias, transposed=self.transposed)
        if variant == "mask_lora":
            assert self.packed is not None
            return mask_lora(
                x, layer.weight, self.packed, down, up, layer.bias, scale=scale, transposed=self.transposed
            )
        if self.rows is None and type(layer) in (nn.Linear, Conv1D):
            weight = layer.weight.t() if self.transposed else layer.weight
            return lora(x.reshape(-1, x.shape[-1]), weight, down, up, layer.bias, scale).view(*x.shape[:-1], -1)
        return _low_rank(x, layer, down, up, scale, self.rows)


def _low_rank(x: Tensor, layer: nn.Module, down: Tensor, up: Tensor, scale: float, rows: Tensor | None) -> Tensor:
    """layer(x) + s (x downᵀ) upᵀ, the latter in ``rows`` only, for a layer with a forward of its own too.

    It is added into the layer's own output, as that of the head is large.
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = layer(flat)
    with torch.autocast(x.device.type, enabled=False):
        hidden = flat.to(y.dtype) @ down.to(y.dtype).t()
        up = up.to(y.dtype).t()
        y = y.addmm_(hidden, up, alpha=scale) if rows is None else y.index_add_(1, rows, hidden @ up, alpha=scale)
    return y.view(*x.shape[:-1], -1)


class MaskLoraConv2d(_DenseLora):
    """LoRA of an ``nn.Conv2d``; use it through :func:`mask_lora_modules`.

    The two factors are convolutions: A with the kernel of the layer into ``rank`` channels, then B with 1x1.
    Where the update is under the mask, the weight with its update is formed.
    """

    def _adapted(self, x: Tensor, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        layer: nn.Conv2d = self.get_base_layer()
        weight, groups = layer.weight, layer.groups
        up = self._all_rows(up)
        y: Tensor
        if variant == "lora" or variant == "lora_prune":
            # each group of the layer has its own inputs, and A is one matrix over those of any group
            kernel = down.view(-1, *weight.shape[1:]).repeat(groups, 1, 1, 1)
            hidden = layer._conv_forward(x, kernel.to(weight.dtype), None)
            factor = (up * scale).to(weight.dtype)[:, :, None, None]
            y = layer(x) + nn.functional.conv2d(hidden, factor, groups=groups)
            return y
        update = up @ down
        if variant == "scale_lora":
            effective = weight * update.view_as(weight)
        else:
            assert self.packed is not None
            keep = unpack_bits(self.packed, update.shape[1])
            effective = weight + (update * scale).masked_fill(~keep, 0).view_as(weight)
        y = layer._conv_forward(x, effective.to(weight.dtype), layer.bias)
        return y


def mask_lora_modules(config: LoraConfig) -> LoraConfig:
    """Make ``get_peft_model(model, config)`` keep the zeros of every linear, Conv1D and Conv2d among its targets.

    The variant is "mask_lora"; :func:`trisparse.retrain.sparse_lora_config.sparse_lora_modules` takes another.
    """
    config._register_custom_module({nn.Linear: MaskLoraLinear, Conv1D: MaskLoraLinear, nn.Conv2d: MaskLoraConv2d})
    return config
