"""What training changes in a model besides its weights, and how it comes back."""

from __future__ import annotations

from typing import Any


class ModelState:
    """The flags, modes and configs of a transformers model as they are now."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._requires_grad = [(param, param.requires_grad) for param in model.parameters()]
        self._training = [(module, module.training) for module in model.modules()]
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        self._configs = [(config, dict(vars(config))) for config in configs.values()]
        self._checkpointing = bool(getattr(model, "is_activation_checkpointing", False))
        self._input_grads = bool(getattr(model, "_require_grads_hooks", None))

    def switch_cache_off(self) -> None:
        """No key/value cache while training; `restore` puts the configs back."""
        for config, _ in self._configs:
            if hasattr(config, "use_cache"):
                config.use_cache = False

    def restore(self, *, frozen: bool = False) -> None:
        """Put all of it back and clear the gradients; with ``frozen`` what trains stays as training left it."""
        if not self._checkpointing and getattr(self._model, "is_activation_checkpointing", False):
            self._model.activation_checkpointing_disable()
        if not self._input_grads and getattr(self._model, "_require_grads_hooks", None):
            self._model.disable_input_require_grads()  # transformers adds it with the checkpointing
        for param in self._model.parameters():
            param.grad = None
        for param, flag in self._requires_grad:
            if not frozen:
                param.requires_grad_(flag)
            param.grad = None
        for module, training in self._training:
            module.training = training
        for config, values in self._configs:
            vars(config).clear()
            vars(config).update(values)
