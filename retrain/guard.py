"""A callback that checks during training that every pruned weight is zero."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from trisparse.sparsity.mask import MaskError, check_masks


class MaskGuard(TrainerCallback):
    """Checks the masks after every ``every`` steps (None: never), and after the last.

    The merge of the adapters zeroes what is pruned: without the check a mask that broke on the way would not show.
    """

    def __init__(self, model: nn.Module, every: int | None) -> None:
        self.model, self.every = model, every
        self.checked: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, if it is time.

        Raises:
            MaskError: a pruned weight is not zero; names the step and the parameters.
        """
        step = state.global_step
        if step != state.max_steps and (self.every is None or step % self.every):
            return
        try:
            check_masks(self.model)
        except MaskError as error:
            text = str(error).replace(".base_layer.", ".")  # PEFT's name for what stands under an adapter
            raise MaskError(f"after step {step} of {state.max_steps} {text}") from None
        self.checked.append(step)
