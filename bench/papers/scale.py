"""How much of a paper is run: its own settings, those of a small model on two CPU cores, or those of a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from trisparse.retrain.groups import PRESETS
from trisparse.retrain.loop_options import LEARNING_RATES

ScaleName = Literal["tiny", "small", "paper"]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Scale:
    """What the cells of every table take from it.

    Attributes:
        name: of the scale.
        calibration, train, validation, test: names of texts, see :func:`trisparse.sparsity.text.load_text`.
        seq_len: tokens of a window; None is the model's context in the paper, see :func:`context`.
        samples: calibration windows.
        validation_windows, test_windows: windows to measure on; None is all.
        steps, batch_size, accumulation: of retraining; None is the paper's batch for the model's size.
        learning_rates: the peak by the groups that train, "grid" to choose it; "" is of all others.
        grid: rates of the grid.
        grid_steps: steps of each of its runs.
        checkpointing: gradient checkpointing.
        keep_copies: see :class:`trisparse.bench.papers.cell.Session`.
        images: of the vision figures: "digits", or a folder of ImageNet (train/CLASS/*, test/CLASS/*).
        machine: of what takes seconds, see :func:`trisparse.bench.papers.cell.machine_name`; a run fills it in.
        models: whether tables run on each of the paper's models when none is named; else on SmolLM2 alone.
    """

    name: ScaleName
    calibration: str = "pydoc:calibration"
    train: str = "pydoc:train"
    validation: str = "pydoc:validation"
    test: str = "pydoc:test"
    seq_len: int | None = 128
    samples: int = 16
    validation_windows: int | None = 8
    test_windows: int | None = 12
    steps: int = 16
    batch_size: int | None = 2
    accumulation: int | None = 1
    learning_rates: dict[str, float | Literal["grid"]] = field(default_factory=lambda: {"": 1e-3})
    grid: tuple[float, ...] = LEARNING_RATES
    grid_steps: int = 20
    checkpointing: bool = False
    keep_copies: bool = True
    images: str = "digits"
    machine: str = ""
    models: bool = False

    def rate(self, groups: str | Sequence[str]) -> float | Literal["grid"]:
        """The learning rate for what trains."""
        names = PRESETS.get(groups, (groups,)) if isinstance(groups, str) else tuple(groups)
        known = self.learning_rates.get("+".join(name for name in names if name != "biases"))
        return self.learning_rates[""] if known is None else known

    def choose(self, *, tiny: Choice, small: Choice, paper: Choice) -> Choice:
        """The one of the three that belongs to this scale."""
        return {"tiny": tiny, "small": small, "paper": paper}[self.name]

    def context(self, model: str) -> int:
        """Tokens of a window.

        The papers train and evaluate on the model's context. PERP's 5.11 of dense Llama-2-7B is that of windows of
        4,096 tokens (2,048 give 5.47), and so is the 5.12 in Pruner-Zero; the other models have 2,048, as in Wanda.
        """
        if self.seq_len is not None:
            return self.seq_len
        return 4096 if any(name in model.lower() for name in ("llama-2", "mistral", "mixtral")) else 2048


# On SmolLM2-135M, pruned to 50% by magnitude, the better of two rates or three for each; docs/papers.md has them.
_SMOLLM2_RATES: dict[str, float | Literal["grid"]] = {"": 3e-3, "norms": 1e-2, "norms+head": 1e-2, "full": 5e-4}

SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", seq_len=16, samples=4, validation_windows=4, test_windows=4, steps=3),
        Scale("small", learning_rates=_SMOLLM2_RATES),
        Scale(
            "paper",
            calibration="c4:train",
            train="c4:train",
            validation="c4:validation",
            test="wikitext2:test",
            seq_len=None,
            samples=128,
            validation_windows=100,
            test_windows=None,
            steps=1000,
            batch_size=None,
            accumulation=None,
            learning_rates={"": "grid"},
            grid_steps=100,
            checkpointing=True,
            keep_copies=False,
            models=True,
        ),
    )
}


def find_scale(name: str) -> Scale:
    """The scale called ``name``.

    Raises:
        ValueError: there is none, and which there are.
    """
    if name not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]
