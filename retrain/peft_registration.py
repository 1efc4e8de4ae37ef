"""Telling PEFT of compressed layers and of the variants, once, without importing PEFT for it.

After ``import trisparse``, ``PeftModel.from_pretrained(model, folder)`` reads our adapters as what they are, and PEFT's own
``LoraConfig`` works on compressed layers. PEFT has a table of neither: an adapter's config is of the class that its
``peft_type`` names ("LORA" here, so that every PEFT reads the file), which would drop the variant and compute another
product; and layer types can be added to one config at a time only. And it merges a LoRA of an output head into the
embedding too, where they share a weight. So a few functions of PEFT are wrapped.
"""

from __future__ import annotations

import sys
import warnings
from functools import wraps
from typing import Any

from trisparse.sparsity.checkpoint.registration import when_imported

_MODULE = "peft.tuners.lora.model"


def register_with_peft() -> None:
    """Now if PEFT is imported, else as soon as it is; a second call does nothing."""
    when_imported(_MODULE, _register)


def _register() -> None:
    # Everything of ours that imports PEFT is imported inside: this runs in the middle of PEFT's own import.
    import peft.tuners.lora.model as lora_model
    from peft.config import PeftConfig

    if hasattr(lora_model.dispatch_default, "of_trisparse"):
        return
    from_peft_type = PeftConfig.from_peft_type.__func__
    dispatch_default = lora_model.dispatch_default

    @wraps(from_peft_type)
    def with_variant(cls: Any, **kwargs: Any) -> Any:
        if kwargs.get("peft_type") == "LORA" and kwargs.get("variant") is not None:
            from trisparse.retrain.sparse_lora_config import SparseLoraConfig

            return SparseLoraConfig.from_peft_type(**kwargs)
        return from_peft_type(cls, **kwargs)

    @wraps(dispatch_default)
    def with_compressed_layers(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        compressed = sys.modules.get("trisparse.sparsity.linear")  # without it there is no such layer
        if compressed is not None and isinstance(layer, compressed.SparseLinear):
            from trisparse.retrain.sparse_lora import PlainSparseLora

            return PlainSparseLora(target, adapter_name, config=config, **kwargs)
        return dispatch_default(target, adapter_name, config=config, **kwargs)

    for name in ("merge_adapter", "_unload_and_optionally_merge"):
        setattr(lora_model.LoraModel, name, _untying_first(getattr(lora_model.LoraModel, name)))
    with_compressed_layers.of_trisparse = True  # type: ignore[attr-defined]
    PeftConfig.from_peft_type = classmethod(with_variant)
    lora_model.dispatch_default = with_compressed_layers


def _untying_first(merge: Any) -> Any:
    """``merge``, a method of PEFT's LoraModel, after a head of ours got a weight of its own."""

    @wraps(merge)
    def with_own_head(self: Any, *args: Any, **kwargs: Any) -> Any:
        merges = kwargs.get("merge", args[0] if args and isinstance(args[0], bool) else True)
        layers = sys.modules.get("trisparse.retrain.lora_layer")
        if merges and layers is not None:
            _untie_head(self.model, layers.VariantLora)
        return merge(self, *args, **kwargs)

    return with_own_head


def _untie_head(model: Any, kind: type) -> None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, kind):
        return
    from trisparse.retrain.adapters import is_tied, untie

    name = next(name for name, module in model.named_modules() if module is head)
    layer: Any = head.get_base_layer()  # type: ignore[attr-defined]
    if is_tied(model, name):
        added = untie(model, name, layer)
        warnings.warn(
            f"{name} shared the weight of the embedding, which a merge would change as well: it has one of its own now, "
            f"{added:,} parameters more",
            stacklevel=3,
        )
