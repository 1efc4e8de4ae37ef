"""LoRA on a compressed layer, as a custom module of PEFT.

    variant      effective product                          merge
    lora         y = x Wᵀ + b + s (x Aᵀ) Bᵀ                 refused: it would fill the zeros of W
    lora_prune   the same, in one kernel                    W + M ⊙ s·B A
    mask_lora    y = x (W + M ⊙ s·B A)ᵀ + b                 W + M ⊙ s·B A
    scale_lora   y = x (W ⊙ B A)ᵀ + b                       W ⊙ B A

W [out, in] is frozen and stays compressed (sparsity/linear.py), M is its mask, A [rank, in] and B [out, rank] train.
A merge rounds every kept weight once and keeps the mask bit for bit. Source: PERP (Zimmer et al. 2023,
https://arxiv.org/abs/2312.15230, section 3, and its published code for the last three, ``customLayers.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from trisparse.kernels.bitmask import apply_bits
from trisparse.kernels.compressed import CompressedWeight
from trisparse.kernels.linear import MAX_RANK
from trisparse.kernels.masked_lora import effective_weight
from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.retrain.lora import _UNSUPPORTED
from trisparse.retrain.masked_product import decompress, masked_product, packed_mask
from trisparse.sparsity.linear import SparseLinear

VARIANTS = ("lora", "lora_prune", "mask_lora", "scale_lora")


class SparseLoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]
    """LoRA of a :class:`~trisparse.sparsity.linear.SparseLinear`; use it through ``sparse_lora_modules``.

    Active adapters must be of one variant. They add up, except that "scale_lora" takes one at a time, as it multiplies.
    Its ``lora_alpha`` has no effect. The kept values from before a merge are held until the layer is unwrapped, so
    that `unmerge` gives back the very same bits.

    Raises:
        ValueError: another base layer, a config without a variant, or an option that this layer does not implement.
    """

    other_param_names = (*LoraLayer.other_param_names, "variant")
    unmerged: Tensor | None
    # PEFT is not typed, and nn.Module's __getattr__ would answer for it
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    scaling: dict[str, float]
    merged_adapters: list[str]
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    get_base_layer: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.variant: dict[str, str] = {}
        self.register_buffer("unmerged", None, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

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

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one adapter (PEFT's protocol)."""
        variant = getattr(config, "variant", None)
        if variant not in VARIANTS:
            raise ValueError(
                "config names no variant: make it with sparse_lora_modules(config, variant), and load a saved adapter "
                "with load_adapters"
            )
        for option, value in _UNSUPPORTED.items():
            if (given := getattr(config, option, value)) != value and given:
                raise ValueError(f"{variant} does not implement {option}={given!r}; leave it at {value!r}")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"{variant} does not implement init_lora_weights={config.init_lora_weights!r}; use True, False "
                "or 'gaussian' (the others change the frozen weight)"
            )
        self.variant[adapter_name] = variant
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """PEFT's start; for "scale_lora" one at which B A is all ones, so that the layer is as it was.

        True is PERP's: every entry is rank^-1/2. As the ranks are then alike, and get the same gradients, the update
        stays of rank 1; "gaussian" starts from a column and a row of ones, with PEFT's start for the other ranks.
        """
        super().reset_lora_parameters(adapter_name, init_lora_weights)
        if self.variant[adapter_name] != "scale_lora" or init_lora_weights is False:
            return
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if init_lora_weights is True:
            for factor in (a, b):
                factor.fill_(a.shape[0] ** -0.5)
        else:
            a[0], b[:, 0] = 1, 1

    def _variant(self, adapters: list[str]) -> str:
        """The one variant of ``adapters``."""
        found = {self.variant[name] for name in adapters}
        if len(found) > 1:
            raise ValueError(f"adapters {adapters} are of the variants {sorted(found)}; use one variant at a time")
        variant = found.pop()
        if variant == "scale_lora" and len(adapters) > 1:
            raise ValueError(f"adapters {adapters} are scale_lora, of which only one can be used at a time")
        return variant

    def _factors(self, adapters: list[str], variant: str) -> tuple[Tensor, Tensor, float]:
        """(A [ranks, in], B [out, ranks], s) of the sum of ``adapters``; of several, s is inside B."""
        downs = [self.lora_A[name].weight for name in adapters]
        ups = [self.lora_B[name].weight for name in adapters]
        scales = [1.0 if variant == "scale_lora" else self.scaling[name] for name in adapters]
        if len(adapters) == 1:
            return downs[0], ups[0], scales[0]
        return torch.cat(downs), torch.cat([up * s for up, s in zip(ups, scales, strict=True)], dim=1), 1.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("compressed layers do not implement adapter_names (a batch with several adapters)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        layer: SparseLinear = self.get_base_layer()
        if self.disable_adapters or self.merged or not adapters:
            return layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        variant = self._variant(adapters)
        down, up, scale = self._factors(adapters, variant)
        x = x.to(_compute_dtype(x, layer))
        if variant in ("mask_lora", "scale_lora"):
            up = up if scale == 1.0 else up * scale
            return masked_product(x, layer, down, up, scales=variant == "scale_lora")
        down, up = down.to(x.dtype), up.to(x.dtype)
        if down.shape[0] <= MAX_RANK:
            return layer(x, lora=(down, up, scale))  # type: ignore[no-any-return]
        return layer(x) + scale * F.linear(F.linear(x, down), up)  # type: ignore[no-any-return]

    def _original(self) -> CompressedWeight:
        """The weight before any merge."""
        weight: CompressedWeight = self.get_base_layer().compressed()
        return weight if self.unmerged is None else replace(weight, values=self.unmerged)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (all active ones by default) to the base weight; the mask stays as it is, bit for bit.

        Raises:
            ValueError: the variant is "lora", whose sum with W has no zeros; or with ``safe_merge`` a merged weight is
                not finite. The weight is as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        adapters = [*self.merged_adapters, *new]
        layer: SparseLinear = self.get_base_layer()
        if (variant := self._variant(adapters)) == "lora":
            raise ValueError(
                f"adapters {new} are of the variant 'lora': merged, they would fill the zeros of a weight pruned to "
                f"{layer.pattern}, so they stay separate (effective sparsity with them: "
                f"{effective_sparsity(self).total:.2%}). Variants that can be merged: {', '.join(VARIANTS[1:])}"
            )
        down, up, scale = self._factors(adapters, variant)
        original = self._original()
        packed = None if variant == "scale_lora" else packed_mask(original)
        merged = effective_weight(decompress(original), packed, up * scale, down)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"the merged weight is not finite; one of the adapters {new} is broken")
        layer.set_weight(merged)
        self.unmerged = original.values
        self.merged_adapters.extend(new)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight from before every merge, the very same bits."""
        if self.unmerged is not None:
            self.get_base_layer().set_weight(decompress(self._original()))
            self.unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter adds to W, [out, in] in its own dtype; 0 where pruned, but for the variant "lora"."""
        variant = self.variant[adapter]
        down, up, scale = self._factors([adapter], variant)
        delta = (up * scale) @ down
        if variant == "lora":
            return delta
        if variant == "scale_lora":
            return (delta - 1) * decompress(self._original()).to(delta)
        return apply_bits(delta, packed_mask(self._original()))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is of low rank, which a masked one is not."""
        return self.variant[adapter_name] == "lora"

    def __repr__(self) -> str:
        return "trisparse." + super().__repr__()


def _compute_dtype(x: Tensor, layer: SparseLinear) -> torch.dtype:
    dtype, device = layer.values.dtype, x.device.type
    if device == "meta" or torch.float64 in (x.dtype, dtype) or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)
