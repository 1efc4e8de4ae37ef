"""A callback that checks during training that every pruned weight is zero."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from trisparse.sparsity.mask import MaskError, check_masks


class MaskGuard(TrainerCallback):
    """Checks the masks after every ``every`` steps, and after the last."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.model, self.every = model, every
        self.checked: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, if it is time.

        Raises:
            MaskError: a pruned weight is not zero; names the step and the parameters.
        """
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        try:
            check_masks(self.model)
        except MaskError as error:
            raise MaskError(f"after step {step} of {state.max_steps} {error}") from None
        self.checked.append(step)
