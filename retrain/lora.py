"""LoRA under the mask of its layer, as a custom module of PEFT.

    y = x (W + M ⊙ s·B A)ᵀ + b        mask_lora (PERP, section 3.2; kernels/masked_lora.py)
    y = x Wᵀ + b + s (x Aᵀ) Bᵀ         the same layer where nothing is pruned (the output head)

W [out, in] is frozen and zero where it is pruned, M [out, in] is its mask, A [rank, in] and B [out, rank]
train. A merge therefore loses no zero.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.bitmask import apply_bits, pack_bits
from trisparse.kernels.masked_lora import effective_weight, mask_lora
from trisparse.sparsity.mask import MaskError, mask_of

# Options of LoraConfig that change the formula, with the one value that this layer implements.
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


def _low_rank(x: Tensor, layer: nn.Module, down: Tensor, up: Tensor) -> Tensor:
    """layer(x) + (x downᵀ) upᵀ; adds into the layer's own output (the head's is large)."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = layer(rows)
    with torch.autocast(x.device.type, enabled=False):
        y = y.addmm_(rows.to(y.dtype) @ down.to(y.dtype).t(), up.to(y.dtype).t())
    return y.view(*x.shape[:-1], -1)


class MaskLoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]
    """LoRA of an ``nn.Linear`` or a transformers ``Conv1D`` that keeps the zeros of its mask.

    The mask is taken from the base layer, as packed bits in the layout of its weight, and is no part of the
    ``state_dict``. Several active adapters add up under the one mask. Use it through
    :func:`mask_lora_modules`.

    Raises:
        ValueError: an option of PEFT's that this layer does not implement.
        MaskError: a pruned weight of the base layer is not zero.
    """

    packed: Tensor | None
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
        layer = self.get_base_layer()
        self.transposed = isinstance(layer, Conv1D)
        mask = mask_of(layer)
        packed = None
        if mask is not None:
            keep = mask.dense(layer.weight.device).contiguous()
            if bool(((layer.weight != 0) & ~keep).any()):
                raise MaskError(f"{kwargs.get('target_name', 'a layer')} has pruned weights that are not zero")
            packed = pack_bits(keep)
        self.register_buffer("packed", packed, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one adapter (PEFT's protocol)."""
        for option, value in _UNSUPPORTED.items():
            if (given := getattr(config, option, value)) != value and given:
                raise ValueError(f"mask_lora does not implement {option}={given!r}; leave it at {value!r}")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"mask_lora does not implement init_lora_weights={config.init_lora_weights!r}; use True, False or "
                "'gaussian' (the others change the frozen weight)"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _factors(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """A [ranks, in] and B [out, ranks] of the sum of ``adapters``, the scaling in B."""
        downs = [self.lora_A[name].weight for name in adapters]
        ups = [self.lora_B[name].weight * self.scaling[name] for name in adapters]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        up = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
        return down, up

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("mask_lora does not implement adapter_names (a batch with several adapters)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        layer = self.get_base_layer()
        if self.disable_adapters or self.merged or not adapters:
            return layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        down, up = self._factors(adapters)
        if self.packed is None:
            return _low_rank(x, layer, down, up)
        return mask_lora(x, layer.weight, self.packed, down, up, layer.bias, transposed=self.transposed)

    def _stored(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The factors of one adapter's update in the layout of the base weight."""
        down, up = self._factors([adapter])
        return (down.t(), up.t()) if self.transposed else (up, down)

    @torch.no_grad()
    def _add(self, adapter: str, sign: int) -> Tensor:
        left, right = self._stored(adapter)
        weight = self.get_base_layer().weight
        if self.packed is None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            return torch.addmm(weight.to(wide), sign * left.to(wide), right.to(wide)).to(weight.dtype)
        return effective_weight(weight, self.packed, sign * left, right)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (all active ones by default) to the base weight; every pruned weight stays exactly zero.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite; the weight is as it was.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            merged = self._add(adapter, 1)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"the merged weight is not finite; the adapter {adapter!r} is broken")
            self.get_base_layer().weight.data.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract every merged adapter from the base weight."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.lora_A:
                self.get_base_layer().weight.data.copy_(self._add(adapter, -1))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """M ⊙ s·B A of one adapter, in the layout of the base weight and the dtype of the adapter."""
        left, right = self._stored(adapter)
        delta = left @ right
        return delta if self.packed is None else apply_bits(delta, self.packed)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is of low rank, which a masked one is not."""
        return self.packed is None

    def __repr__(self) -> str:
        return "trisparse." + super().__repr__()


def mask_lora_modules(config: LoraConfig) -> LoraConfig:
    """Make ``get_peft_model(model, config)`` use :class:`MaskLoraLinear` for every linear and Conv1D target."""
    config._register_custom_module({nn.Linear: MaskLoraLinear, Conv1D: MaskLoraLinear})
    return config
