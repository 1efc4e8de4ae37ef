"""LoRA on layers of any module, without a PeftModel around it: on while it trains, then merged or taken off."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import nn

from trisparse.retrain.loop import RetrainError
from trisparse.retrain.lora import MaskLoraConv2d, MaskLoraLinear
from trisparse.retrain.lora_layer import Variant
from trisparse.retrain.sparse_lora_config import SparseLoraConfig


class LayerAdapters:
    """Context manager: a LoRA stands in the place of layers of ``model`` until `merge`; a failure puts the layers back.

    Args:
        model: any module.
        names: its nn.Linear, Conv1D and nn.Conv2d that get a LoRA.
        variant, rank, alpha: of every LoRA.

    Attributes:
        parameters: the factors, by name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], variant: Variant, rank: int, alpha: float) -> None:
        self._model = model
        self._layers = {name: model.get_submodule(name) for name in names}
        self._adapters: dict[str, MaskLoraLinear | MaskLoraConv2d] = {}
        config = SparseLoraConfig(r=rank, lora_alpha=alpha, variant=variant)
        for name, layer in self._layers.items():
            kind = MaskLoraConv2d if isinstance(layer, nn.Conv2d) else MaskLoraLinear
            adapter = kind(layer, "default", config=config, r=rank, lora_alpha=alpha, target_name=name)  # type: ignore[arg-type]
            self._adapters[name] = adapter.train(layer.training)
        for name, adapter in self._adapters.items():
            model.set_submodule(name, adapter)
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{factor}": getattr(adapter, factor)["default"].weight
            for name, adapter in self._adapters.items()
            for factor in ("lora_A", "lora_B")
        }

    def __enter__(self) -> LayerAdapters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()

    def merge(self) -> None:
        """Merge every LoRA into its layer, whose pruned weights stay zero, and put the layers back.

        Raises:
            RetrainError: a factor is NaN or infinite; nothing is merged.
        """
        for name, factor in self.parameters.items():
            if not bool(torch.isfinite(factor).all()):
                raise RetrainError(f"{name} is not finite: no LoRA was merged")
        for adapter in self._adapters.values():
            adapter.merge()
        self._put_back()

    def discard(self) -> None:
        """Put the layers back as they were before, also after `merge`."""
        for adapter in self._adapters.values():
            adapter.unmerge()
        self._put_back()

    def _put_back(self) -> None:
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer)
