"""What the LoRA layers of all kinds of base layers share: the variants, PEFT's protocol, merging and taking it back.

    variant      effective product                          merge
    lora         y = x Wᵀ + b + s (x Aᵀ) Bᵀ                 refused where single weights are pruned: it fills the zeros
    lora_prune   the same                                   W + M ⊙ s·B A
    mask_lora    y = x (W + M ⊙ s·B A)ᵀ + b                 W + M ⊙ s·B A
    scale_lora   y = x (W ⊙ B A)ᵀ + b                       W ⊙ B A

W [out, in] is frozen and zero where its mask M prunes, A [rank, in] and B [out, rank] train. A merge rounds every kept
weight once and keeps the mask bit for bit. Source: PERP (Zimmer et al. 2023, https://arxiv.org/abs/2312.15230,
section 3, and its published code for the last three, ``customLayers.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.sparsity.mask import mask_of

Variant = Literal["lora", "lora_prune", "mask_lora", "scale_lora"]
VARIANTS = ("lora", "lora_prune", "mask_lora", "scale_lora")

# Options of LoraConfig that change the formula, with the one value that these layers implement.
_UNSUPPORTED: dict[str, Any] = {
    "lora_dropout": 0.0,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "layer_replication": None,
}


@dataclass
class _AdapterLayers:
    """The layers of one adapter on one model: PEFT merges layer by layer, and one that refuses must stop the first."""

    names: set[str] = field(default_factory=set)
    refusing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: LoraConfig, name: str) -> _AdapterLayers:
        """Those that ``config`` is making, with ``name`` among them; a name that comes again is another model's."""
        found = getattr(config, "adapter_layers", None)
        if found is None or name in found.names:
            found = config.adapter_layers = cls()
        found.names.add(name)
        return found


class VariantLora(nn.Module, LoraLayer):  # type: ignore[misc]
    """LoRA of one layer, of a variant that its config names.

    Active adapters must be of one variant. They add up, except that "scale_lora" takes one at a time, as it multiplies.
    Its ``lora_alpha`` has no effect. The weight from before a merge is held until the layer is unwrapped, so that
    `unmerge` gives back the very same bits.

    Raises:
        ValueError: a config without a variant, or an option that these layers do not implement.
    """

    other_param_names = (*LoraLayer.other_param_names, "variant", "siblings")
    default_variant: str | None = None
    """Variant of a config that names none; None refuses such a config."""
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
        self.siblings: dict[str, _AdapterLayers] = {}
        self.register_buffer("unmerged", None, persistent=False)
        self._read_mask(str(kwargs.get("target_name", "a layer")))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _read_mask(self, name: str) -> None:
        """Take what is needed of the mask of the base layer, called ``name``, before the first adapter comes."""

    @abstractmethod
    def _adapted(self, x: Tensor, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The layer with its update."""

    @abstractmethod
    def _original(self) -> Tensor:
        """The dense weight from before any merge, as the base layer stores it."""

    @abstractmethod
    def _merged(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The dense weight with the update, as the base layer stores it; zero where pruned."""

    @abstractmethod
    def _set_weight(self, weight: Tensor) -> None:
        """Make ``weight`` the base layer's."""

    @abstractmethod
    def _held(self) -> Tensor:
        """What `_original` is made from, to be held in ``unmerged`` over a merge."""

    @abstractmethod
    def _delta(self, variant: str, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """What the update adds to the weight, as the base layer stores it, in the dtype of the factors."""

    def _fills_zeros(self, variant: str) -> bool:
        """Whether a merge would make pruned weights non-zero."""
        return variant == "lora"

    def _own_variant(self, variant: str) -> str:
        """The variant that this layer computes where ``variant`` is asked for."""
        return variant

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one adapter (PEFT's protocol)."""
        variant = getattr(config, "variant", self.default_variant)
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
        self.variant[adapter_name] = self._own_variant(variant)
        name = str(kwargs.get("target_name", "a layer"))
        self.siblings[adapter_name] = _AdapterLayers.of(config, name)
        if self._fills_zeros(self.variant[adapter_name]):
            self.siblings[adapter_name].refusing.append(name)
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
        """[..., in] -> [..., out], or images as the base layer takes them."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("LoRA under masks does not implement adapter_names (a batch with several adapters)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return self.get_base_layer()(x, *args, **kwargs)  # type: ignore[no-any-return]
        variant = self._variant(adapters)
        return self._adapted(x, variant, *self._factors(adapters, variant))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (all active ones by default) to the base weight; the mask stays as it is, bit for bit.

        Raises:
            ValueError: the variant is "lora", whose sum with W has no zeros, here or in another layer of the adapter;
                or with ``safe_merge`` a merged weight is not finite. The weight is as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        adapters = [*self.merged_adapters, *new]
        variant = self._variant(adapters)
        if self._fills_zeros(variant):
            mask = mask_of(self.get_base_layer())
            pattern = None if mask is None else mask.pattern
            raise ValueError(
                f"adapters {new} are of the variant 'lora': merged, they would fill the zeros of a weight pruned to "
                f"{pattern}, so they stay separate (effective sparsity with them: "
                f"{effective_sparsity(self).total:.2%}). Variants that can be merged: {', '.join(VARIANTS[1:])}"
            )
        if refusing := [name for adapter in new for name in self.siblings[adapter].refusing]:
            raise ValueError(
                f"adapters {new} are of the variant 'lora': merged, they would fill the zeros of {len(refusing)} "
                f"pruned layers, such as {refusing[0]}, so no layer is merged. Variants that can be merged: "
                f"{', '.join(VARIANTS[1:])}"
            )
        merged = self._merged(variant, *self._factors(adapters, variant))
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"the merged weight is not finite; one of the adapters {new} is broken")
        held = self._held() if self.unmerged is None else self.unmerged
        self._set_weight(merged)
        self.unmerged = held
        self.merged_adapters.extend(new)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight from before every merge, the very same bits."""
        if self.unmerged is not None:
            self._set_weight(self._original())
            self.unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter adds to W, in the layout of W and its own dtype; 0 where pruned, but for "lora"."""
        variant = self.variant[adapter]
        return self._delta(variant, *self._factors([adapter], variant))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is of low rank, which a masked one is not."""
        return self.variant[adapter_name] == "lora"

    def __repr__(self) -> str:
        return "trisparse." + super().__repr__()
