"""Magnitude conservation: gradual freezing or unfreezing of the pruned layers while a cycle retrains.

A cycle's steps are split into E stages (PERP's epochs). With L pruned layers in order from the input, ⌊L e/E⌋ of them
are unfrozen (or frozen) in stage e = 1 .. E, from the input or from the output on; the head, the norms and whatever
else trains is never frozen. So each layer trains for some of the steps and none for all of them.

Source: PERP (Zimmer et al. 2023, section 3.4, Table 12, whose columns are ``unfreeze`` and ``reverse``). The paper says
that the share of layers follows the share of epochs. The rounding, and that the head and the norms always train, come
from the table: they alone give its trainable shares for ResNet-50 (88.83, 70.95, 37.28 and 19.40%).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from trisparse.retrain.groups import parameter_groups
from trisparse.sparsity.mask import masks


@dataclass(frozen=True)
class GradualFreezing:
    """Which pruned layers train when.

    Attributes:
        mode: "unfreeze" starts with few layers and adds to them, "freeze" starts with most and takes from them.
        start: the end that layers are unfrozen or frozen from, "input" or "output" (the table's ``reverse``).
        stages: how many times the choice changes in a cycle; the paper's cycles have five epochs.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    mode: Literal["freeze", "unfreeze"] = "unfreeze"
    start: Literal["input", "output"] = "output"
    stages: int = 5

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("freeze", "unfreeze")), ("start", ("input", "output"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise ValueError(f"stages must be an integer of at least 1, got {self.stages!r}")

    def trained(self, layers: int, stage: int) -> range:
        """Indices, from the input, of the layers that train in ``stage`` (1 .. stages) of ``layers``."""
        reached = layers * stage // self.stages
        if self.start == "input":
            return range(reached) if self.mode == "unfreeze" else range(reached, layers)
        return range(layers - reached, layers) if self.mode == "unfreeze" else range(layers - reached)

    def stage(self, step: int, steps: int) -> int:
        """Stage (1 .. stages) of the step after ``step`` done ones of ``steps``."""
        return step * self.stages // steps + 1

    def steps(self, stage: int, steps: int) -> int:
        """How many of ``steps`` steps are in ``stage`` (1 .. stages)."""
        return -(-stage * steps // self.stages) - -(-(stage - 1) * steps // self.stages)


class FreezingCallback(TrainerCallback):
    """Freezes and unfreezes the pruned layers of ``model`` while a Trainer runs; pass a new one to each ``retrain``.

    A frozen parameter has no gradient, so AdamW leaves it and its moments alone.

    Args:
        freezing: which layers when.
        model: the model that ``retrain`` is called on, with its masks.

    Attributes:
        layers: names of the pruned layers.
        mean_trainable: parameters that train, on average over all steps (the paper's aggregated trainable
            parameters); known when the training begins, NaN before.
    """

    def __init__(self, freezing: GradualFreezing, model: nn.Module) -> None:
        self.freezing = freezing
        self.model = model
        self.layers = pruned_layers(model)
        self._of_layer: list[list[nn.Parameter]] = []
        self._stage = 0
        self.mean_trainable = math.nan

    def identity(self) -> dict[str, Any]:
        """What must be the same in a run that resumes another."""
        return {"freezing": asdict(self.freezing)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sort what trains by layer; the optimizer holds all of it already.

        Raises:
            ValueError: no pruned layer trains, nothing at all does in some stage, or several processes share the run.
        """
        if args.world_size > 1:  # DistributedDataParallel waits for the gradient of whatever it was made with
            raise ValueError(f"freezing changes what trains from step to step: run one process, not {args.world_size}")
        trained = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        self._of_layer = [[param for name, param in trained if name.startswith(f"{layer}.")] for layer in self.layers]
        inside = {id(param) for params in self._of_layer for param in params}
        if not inside:
            raise ValueError("freezing has nothing to freeze: no pruned layer trains in these groups")
        always = sum(param.numel() for _, param in trained if id(param) not in inside)
        total = 0
        for stage in range(1, self.freezing.stages + 1):
            chosen = self.freezing.trained(len(self.layers), stage)
            steps = self.freezing.steps(stage, state.max_steps)
            total += steps * (always + sum(param.numel() for index in chosen for param in self._of_layer[index]))
            if not always and not any(self._of_layer[index] for index in chosen):
                raise ValueError(
                    f"freezing leaves nothing to train in stage {stage} of {self.freezing.stages}: add 'norms' or "
                    "'head' to the groups, which are never frozen"
                )
        self.mean_trainable = total / state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze and unfreeze where a new stage begins."""
        stage = self.freezing.stage(state.global_step, state.max_steps)
        chosen = self.freezing.trained(len(self.layers), stage)
        if stage != self._stage:
            self._stage = stage
            for index, params in enumerate(self._of_layer):
                for param in params:
                    param.requires_grad_(index in chosen)
                    if index not in chosen:
                        param.grad = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unfreeze everything: what trained is checked and merged as usual."""
        for params in self._of_layer:
            for param in params:
                param.requires_grad_(True)


def pruned_layers(model: nn.Module) -> list[str]:
    """Names of the pruned layers of ``model`` but the head, in the order of ``named_modules``."""
    head = parameter_groups(model).head
    names = dict.fromkeys(param.rpartition(".")[0] for param in masks(model))
    return [name for name in names if name not in head]
