"""Put PERP's adapters on a model, and take them off: merged, or as if they had never been there."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from trisparse.retrain.groups import ParameterGroups, trainable_parameters
from trisparse.retrain.lora_layer import Variant, VariantLora
from trisparse.retrain.model_state import ModelState
from trisparse.retrain.sparse_lora_config import sparse_lora_modules
from trisparse.sparsity.interrupt import interrupt_after


def is_tied(model: Any, head: str) -> bool:
    """Whether the head's weight is the input embedding's."""
    return model.get_submodule(head).weight is model.get_input_embeddings().weight


def other_ties(model: Any, head: str) -> list[str]:
    """Tied weights of ``model`` that do not involve the head's."""
    own = f"{head}.weight"
    return [key for key, source in getattr(model, "all_tied_weights_keys", {}).items() if own not in (key, source)]


def untie(model: Any, head: str, layer: nn.Module) -> int:
    """Give the head ``layer`` a weight of its own, for saving and loading too; returns the parameters added."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    # transformers 5 reads the ties from this dict when it saves and when it ties again; from_pretrained makes
    # it anew from the config.
    own = f"{head}.weight"
    model.all_tied_weights_keys = {
        key: source for key, source in model.all_tied_weights_keys.items() if own not in (key, source)
    }
    return weight.numel()


class Adapted:
    """A model under PERP's adapters, with what it takes to restore it.

    Norms are PEFT's ``modules_to_save``, biases its ``bias="all"``: so an adapter folder holds everything that trains.
    Norms and biases of a half-precision model train in fp32.

    Args:
        model: a transformers model.
        groups: of ``model``.
        wanted: which of "biases", "norms", "head" and "lora" train.
        rank, alpha: of every LoRA.
        variant: of the LoRAs on pruned layers; the others are plain.

    Attributes:
        peft, module: the wrapped model, to train.
        trainable: parameters that train, per group of ``wanted``.
    """

    peft: PeftModel
    trainable: dict[str, int]

    def __init__(
        self, model: Any, groups: ParameterGroups, wanted: tuple[str, ...], rank: int, alpha: float,
        variant: Variant = "mask_lora",
    ) -> None:  # fmt: skip
        self.model = model
        self.head = groups.head[0] if "head" in wanted and groups.head else None
        self.norms = groups.norms if "norms" in wanted else ()
        self.lora = (*(groups.lora if "lora" in wanted else ()), *((self.head,) if self.head else ()))
        biases = groups.biases if "biases" in wanted else ()

        self._modules = {name: model.get_submodule(name) for name in (*self.norms, *self.lora)}
        self._state = ModelState(model)
        self._training = model.training
        self.trainable = trainable_parameters(model, groups, wanted, rank)
        self._biases = [(model.get_parameter(name), model.get_parameter(name).data.clone()) for name in biases]
        try:
            self._wrap(rank, alpha, variant, with_biases=bool(biases))
        except BaseException:
            self.discard()
            raise
        self.module: nn.Module = self.peft

    def _wrap(self, rank: int, alpha: float, variant: Variant, *, with_biases: bool) -> None:
        names = "|".join(map(re.escape, self.lora))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            # a pattern, matched in full: PEFT matches the names of a list by their endings too
            target_modules=f"(?:{names})" if names else DUMMY_TARGET_MODULES,
            modules_to_save=list(self.norms) or None,
            bias="all" if with_biases else "none",
        )
        with warnings.catch_warnings():
            # the head is untied before the merge, see merge()
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            # PEFT 0.21 asks by the older name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self.peft = get_peft_model(self.model, sparse_lora_modules(config, variant))
        for name in self.norms:
            self._active(name).float()
        chosen = {id(param) for param, _ in self._biases}
        inside_norms = tuple(f"{name}." for name in self.norms)
        for name, param in self.model.named_parameters():
            if id(param) in chosen:
                param.data = param.data.float()
                param.requires_grad_(True)
            elif param.requires_grad and ".lora_" not in name and not name.startswith(inside_norms):
                param.requires_grad_(False)  # bias="all" means the biases of norms too

    def _active(self, norm: str) -> nn.Module:
        return self.model.get_submodule(norm).modules_to_save["default"]  # type: ignore[no-any-return]

    def switch_cache_off(self) -> None:
        """No key/value cache while training; the configs are put back at the end."""
        self._state.switch_cache_off()

    def first_not_finite(self) -> str | None:
        """Name of a trained parameter that holds a NaN or Inf, or None."""
        for name, param in self.model.named_parameters():
            if param.requires_grad and not bool(torch.isfinite(param).all()):
                return str(name)
        return None

    def as_merged(self) -> None:
        """Compute from now on what the merged model will: of the variant "lora_prune", the update under the mask."""
        for name in self.lora:
            layer: Any = self.model.get_submodule(name)
            if isinstance(layer, VariantLora) and layer.variant["default"] == "lora_prune":
                layer.variant["default"] = "mask_lora"

    def keep(self) -> None:
        """End the training and leave the adapters on; the weights under them stay frozen."""
        with interrupt_after(), torch.no_grad():
            for name in self.norms:
                for trained, own in zip(self._active(name).parameters(), self._modules[name].parameters(), strict=True):
                    trained.data = trained.data.to(own.dtype)
            for param, before in self._biases:
                param.data = param.data.to(before.dtype)
            self.peft.train(self._training)  # what the adapters added, too
            self._state.restore(frozen=True)

    def merge(self) -> int:
        """Merge everything into the model and unwrap it; returns the parameters added by untying the head."""
        with interrupt_after(), torch.no_grad():
            trained = {name: [p.detach() for p in self._active(name).parameters()] for name in self.norms}
            added = 0
            self._state.restore()
            if self.head and is_tied(self.model, self.head):
                wrapper: Any = self.model.get_submodule(self.head)
                added = untie(self.model, self.head, wrapper.get_base_layer())
            self.peft.merge_and_unload()
            # the norms' own modules back, with the trained values: whoever holds one keeps holding the model's
            for name, values in trained.items():
                norm = self._modules[name]
                for param, value in zip(norm.parameters(), values, strict=True):
                    param.copy_(value)
                self.model.set_submodule(name, norm)
            for param, before in self._biases:
                param.data = param.data.to(before.dtype)
        return added

    def discard(self) -> None:
        """Take the adapters off and put every trained value back as it was."""
        for name, module in self._modules.items():
            self.model.set_submodule(name, module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        for param, before in self._biases:
            param.data = before
        self._state.restore()
