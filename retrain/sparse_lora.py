"""LoRA on a compressed layer, as a custom module of PEFT; lora_layer.py has the variants.

W is frozen and stays compressed (sparsity/linear.py). "lora" and "lora_prune" run in one kernel with the layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trisparse.kernels.bitmask import apply_bits
from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.linear import MAX_RANK
from trisparse.kernels.masked_lora import effective_weight
from trisparse.retrain.lora_layer import VariantLora
from trisparse.retrain.masked_product import decompress, masked_product
from trisparse.sparsity.linear import SparseLinear


class SparseLoraLinear(VariantLora):
    """LoRA of a :class:`~trisparse.sparsity.linear.SparseLinear`; use it through ``sparse_lora_modules``.

    Over a merge the kept values from before are held.

    Raises:
        ValueError: another base layer, a config without a variant, or an option that this layer does not implement.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if not isinstance(module, SparseLinear):
            raise ValueError(f"base_layer is a {type(module).__name__}; it must be a SparseLinear")
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: SparseLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.values.device, base_layer.values.dtype  # PEFT would read weight, which decompresses

    @property
    def weight(self) -> Tensor:
        """W [out, in] of the base layer, dense, to read only."""
        weight: Tensor = self.get_base_layer().weight
        return weight

    def _adapted(self, x: Tensor, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        layer: SparseLinear = self.get_base_layer()
        x = x.to(_compute_dtype(x, layer))
        if variant in ("mask_lora", "scale_lora"):
            up = up if scale == 1.0 else up * scale
            return masked_product(x, layer, down, up, scales=variant == "scale_lora")
        down, up = down.to(x.dtype), up.to(x.dtype)
        if down.shape[0] <= MAX_RANK:
            return layer(x, lora=(down, up, scale))  # type: ignore[no-any-return]
        return layer(x) + scale * F.linear(F.linear(x, down), up)  # type: ignore[no-any-return]

    def _compressed(self) -> CompressedWeight:
        """The weight before any merge."""
        weight: CompressedWeight = self.get_base_layer().compressed()
        return weight if self.unmerged is None else replace(weight, values=self.unmerged)

    def _original(self) -> Tensor:
        return decompress(self._compressed())

    def _held(self) -> Tensor:
        return self._compressed().values

    def _merged(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        packed = None if variant == "scale_lora" else self._compressed().packed
        return effective_weight(self._original(), packed, up * scale, down)

    def _set_weight(self, weight: Tensor) -> None:
        self.get_base_layer().set_weight(weight)

    def _delta(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        delta = (up * scale) @ down
        if variant == "lora":
            return delta
        if variant == "scale_lora":
            return (delta - 1) * self._original().to(delta)
        return apply_bits(delta, self._compressed().packed)


class PlainSparseLora(SparseLoraLinear):
    """What PEFT's own LoraConfig, which knows no variants, makes of a compressed layer: plain LoRA."""

    default_variant = "lora"


def _compute_dtype(x: Tensor, layer: SparseLinear) -> torch.dtype:
    dtype, device = layer.values.dtype, x.device.type
    if device == "meta" or torch.float64 in (x.dtype, dtype) or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)
