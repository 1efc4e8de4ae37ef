"""LoRA for a pruned model, compressed or not: its config, which remembers the variant, and adapters back from a folder.

config = sparse_lora_modules(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), "lora")
model = get_peft_model(compressed, config)
model.save_pretrained("adapter")
model = load_adapters(another_compressed, "adapter")
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from trisparse.retrain.lora import mask_lora_modules
from trisparse.retrain.lora_layer import VARIANTS, Variant
from trisparse.retrain.sparse_lora import SparseLoraLinear
from trisparse.sparsity.linear import SparseLinear


@dataclass
class SparseLoraConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's LoraConfig for a pruned model; ``variant`` is saved in ``adapter_config.json``.

    Compressed layers get a :class:`SparseLoraLinear`, other linears and convolutions a layer of lora.py; where nothing
    is pruned, that is plain LoRA.

    Raises:
        ValueError: an unknown variant, or "all-linear", which PEFT expands to dense layers alone.
    """

    variant: str = "mask_lora"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            raise ValueError("target_modules='all-linear' does not see compressed layers: name them, as in ['q_proj']")
        super().__post_init__()
        mask_lora_modules(self)
        self._register_custom_module({SparseLinear: SparseLoraLinear})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> SparseLoraConfig:
        """This class from saved options; PEFT's own takes the class from ``peft_type`` and would lose the variant.

        Raises:
            ValueError: the options name no variant.
        """
        if kwargs.get("variant") is None:
            raise ValueError("the adapter's config names no variant: say which of " + ", ".join(VARIANTS) + " it is")
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(f"this version of PEFT does not know the options {unknown}; they are ignored", stacklevel=3)
        return cls(**{name: value for name, value in kwargs.items() if name in known})


def sparse_lora_modules(config: LoraConfig, variant: Variant = "mask_lora") -> SparseLoraConfig:
    """A config for ``get_peft_model(model, ...)`` with the options of ``config``, for compressed and other layers."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return SparseLoraConfig(**{**options, "variant": variant})


def load_adapters(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, variant: Variant | None = None,
    is_trainable: bool = False,
) -> PeftModel:  # fmt: skip
    """Load adapters that ``save_pretrained`` wrote onto a compressed model, or beside those of a PeftModel.

    Args:
        folder: or a model id of the Hub.
        variant: for a folder that does not name it, such as one that PEFT's own LoRA wrote.

    Raises:
        ValueError: no variant is known, it is another than the folder's, or ``model`` has such an adapter already.
    """
    config = SparseLoraConfig.from_pretrained(str(folder), **({} if variant is None else {"variant": variant}))
    if variant not in (None, config.variant):
        raise ValueError(f"variant is {variant!r}; {folder} holds adapters of the variant {config.variant!r}")
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable, config=config)
    if adapter_name in model.peft_config:
        raise ValueError(f"model has an adapter {adapter_name!r} already; give another adapter_name")
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    return model
