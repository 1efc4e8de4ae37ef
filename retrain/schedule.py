"""Learning-rate schedules of retraining: FT, LRW, SLR, CLR, LLR, ALLR, and linear with warm-up for language models.

A schedule is a pure function: ``schedule.at(step, steps)`` is the rate of update ``step`` (counted from 0) out of
``steps``, and ``at(steps, steps)`` is where it ends. :func:`lr_lambda` makes of it what LambdaLR takes.

Below, the original training took T epochs at the rates η, with the highest η_max, the last η_T and, after the highest,
the lowest η_min. Retraining takes T_rt epochs. All are defined in words in PERP (Zimmer et al., Appendix A.2); each
class names the paper that introduced it. Where the papers leave a constant open (the length of the warm-up, where it
starts, where CLR ends), the class says what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trisparse.sparsity.mask import masks


@runtime_checkable
class Schedule(Protocol):
    """Anything with :meth:`at`."""

    def at(self, step: int, steps: int) -> float:
        """The learning rate of update ``step`` of ``steps``, 0 <= step <= steps; other values raise ValueError."""
        ...


def lr_lambda(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """``schedule`` over ``steps`` updates for LambdaLR, on an optimizer whose own learning rate is 1.

    LambdaLR may ask for more steps than there are; from the last on, the rate stays where the schedule ends.
    """
    _check_step(0, steps)
    return lambda step: schedule.at(min(step, steps), steps)


@dataclass(frozen=True)
class Original:
    """The learning rates of the training that made the dense model.

    Attributes:
        rates: evenly spaced over the training: one for each epoch, or one for each step.
        epochs: T.

    Raises:
        ValueError: a rate that is negative or not finite, no rate above 0, or no epoch.
    """

    rates: Sequence[float]
    epochs: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))
        if not all(_is_number(rate) and rate >= 0 for rate in self.rates) or not any(self.rates):
            raise ValueError(f"rates must be numbers of at least 0, one of them above 0, got {list(self.rates)[:8]!r}")
        _check_integer("epochs", self.epochs)

    @classmethod
    def linear(cls, peak: float, epochs: int, steps_per_epoch: int = 1) -> Original:
        """From ``peak`` to 0; ``linear(0.1, 90)`` is the paper's ResNet-50 on ImageNet (Table 3)."""
        _check_above("peak", peak)
        _check_integer("epochs", epochs)
        _check_integer("steps_per_epoch", steps_per_epoch)
        count = epochs * steps_per_epoch
        return cls([peak * (count - i) / count for i in range(count)], epochs)

    @classmethod
    def stepped(cls, peak: float, epochs: int, milestones: Sequence[int], gamma: float = 0.1) -> Original:
        """``peak``, multiplied by ``gamma`` at each of the epochs ``milestones``."""
        _check_above("peak", peak)
        _check_above("gamma", gamma)
        _check_integer("epochs", epochs)
        return cls([peak * gamma ** sum(at <= epoch for at in milestones) for epoch in range(epochs)], epochs)

    @property
    def highest(self) -> float:
        """η_max."""
        return max(self.rates)

    @property
    def lowest(self) -> float:
        """η_min: the lowest rate from the highest on, so that a warm-up of the original does not count."""
        return min(self.rates[self.rates.index(self.highest) :])

    @property
    def last(self) -> float:
        """η_T."""
        return self.rates[-1]

    def after(self, part: int, whole: int) -> float:
        """The rate when ``part`` / ``whole`` of the training was done; its last one at the end."""
        return self.rates[min(part * len(self.rates) // whole, len(self.rates) - 1)]


@dataclass(frozen=True)
class FT:
    """Fine-tuning: η(step) = η_T, the last rate of the original training (Han et al. 2015).

    Raises:
        ValueError: the original ends at 0, at which nothing would be learnt.
    """

    original: Original

    def __post_init__(self) -> None:
        _check_original(self.original)
        if self.original.last == 0:
            raise ValueError("original must end at a rate above 0 for FT, got a last rate of 0")

    def at(self, step: int, steps: int) -> float:
        """η_T."""
        _check_step(step, steps)
        return self.original.last


@dataclass(frozen=True)
class LRW:
    """Learning-rate rewinding: the last T_rt epochs of the original again (Renda et al. 2020).

    η(step) = η at the epoch T - T_rt + T_rt · step / steps.

    Attributes:
        original: the training of the dense model.
        epochs: T_rt.

    Raises:
        ValueError: T_rt is more than T: there is nothing further back to rewind to.
    """

    original: Original
    epochs: int

    def __post_init__(self) -> None:
        _check_original(self.original)
        _check_integer("epochs", self.epochs)
        if self.epochs > self.original.epochs:
            raise ValueError(f"epochs must be at most the original's {self.original.epochs} for LRW, got {self.epochs}")

    def at(self, step: int, steps: int) -> float:
        """The rate of the original at the same distance from its end."""
        _check_step(step, steps)
        total = self.original.epochs
        return self.original.after((total - self.epochs) * steps + self.epochs * step, total * steps)


@dataclass(frozen=True)
class SLR:
    """Scaled learning-rate restarting: the whole original in T_rt epochs, after a warm-up (Le & Hua 2021, figure 1c).

    With w = ⌊warmup_ratio · steps⌋: η_min + (η_max - η_min) · step / w while step < w, then the original at the share
    (step - w) / (steps - w) of its length. A warm-up of the original's own counts as η_max, as there is one already.

    Attributes:
        original: the training of the dense model.
        warmup_ratio: 0.1 is what Zimmer et al. (2023) use; the warm-up's start at η_min is Le & Hua's.
    """

    original: Original
    warmup_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_original(self.original)
        _check_share("warmup_ratio", self.warmup_ratio)

    def at(self, step: int, steps: int) -> float:
        """Warm-up, then the compressed original."""
        warmup = _warmup_steps(step, steps, self.warmup_ratio)
        if step < warmup:
            return _between(self.original.lowest, self.original.highest, step, warmup)
        rates = self.original.rates
        index = min((step - warmup) * len(rates) // max(steps - warmup, 1), len(rates) - 1)
        return self.original.highest if index < rates.index(self.original.highest) else rates[index]


@dataclass(frozen=True)
class CLR:
    """Cyclic learning-rate restarting: one cycle of warm-up and cosine decay (Le & Hua 2021, figure 1d).

    With w = ⌊warmup_ratio · steps⌋: η_min + (η_max - η_min) · step / w while step < w, then
    η_min + (η_max - η_min) · (1 + cos(π (step - w) / (steps - w))) / 2.

    Attributes:
        original: the training of the dense model.
        warmup_ratio: 0.1 is what Zimmer et al. (2023) use; "from the lowest to the highest value" is Le & Hua's.
    """

    original: Original
    warmup_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_original(self.original)
        _check_share("warmup_ratio", self.warmup_ratio)

    def at(self, step: int, steps: int) -> float:
        """Warm-up, then a cosine down to η_min."""
        warmup = _warmup_steps(step, steps, self.warmup_ratio)
        low, high = self.original.lowest, self.original.highest
        if step < warmup:
            return _between(low, high, step, warmup)
        return low + (high - low) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


@dataclass(frozen=True)
class Linear:
    """Linear with warm-up, as for language models (PERP, section 2.3) and as transformers defines it.

    With w = ⌊warmup_ratio · steps⌋: peak · step / w while step < w, then peak · (steps - step) / (steps - w).

    Attributes:
        peak: the rate after the warm-up.
        warmup_ratio: share of the steps; the paper's is 10%.
    """

    peak: float
    warmup_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_above("peak", self.peak)
        _check_share("warmup_ratio", self.warmup_ratio)

    def at(self, step: int, steps: int) -> float:
        """Up to the peak, then down to 0."""
        warmup = _warmup_steps(step, steps, self.warmup_ratio)
        if step < warmup:
            return self.peak * step / warmup
        return self.peak * (steps - step) / max(steps - warmup, 1)


@dataclass(frozen=True)
class LLR:
    """Linear learning-rate restarting: η_max · (1 - step / steps) (Zimmer et al. 2023).

    Attributes:
        original: the training of the dense model.
        warmup_ratio: 0 is the formula above; the authors' experiments warm up from 0 over the first 10%.
    """

    original: Original
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_original(self.original)
        _check_share("warmup_ratio", self.warmup_ratio)

    def at(self, step: int, steps: int) -> float:
        """From η_max down to 0."""
        return Linear(self.original.highest, self.warmup_ratio).at(step, steps)


@dataclass(frozen=True)
class ALLR:
    """Adaptive LLR, the paper's choice for vision: d · η_max · (1 - step / steps) (Zimmer et al. 2023).

    d = max(d_1, d_2), where d_1 = ‖W - W_p‖₂ / (‖W‖₂ · √s) is how much the pruning of a share s changed the weights
    (:func:`pruning_change`) and d_2 = T_rt / T the length of the retraining, at most 1; the authors' code
    (github.com/ZIB-IOL/BIMP) computes the same.

    Attributes:
        original: the training of the dense model.
        change: d_1, in [0, 1].
        epochs: T_rt.
        warmup_ratio: 0 is the formula above; the authors' experiments warm up from 0 over the first 10%.
    """

    original: Original
    change: float
    epochs: int
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_original(self.original)
        _check_share("change", self.change, one=True)
        _check_integer("epochs", self.epochs)
        _check_share("warmup_ratio", self.warmup_ratio)

    @property
    def discount(self) -> float:
        """d."""
        return max(self.change, min(self.epochs / self.original.epochs, 1.0))

    def at(self, step: int, steps: int) -> float:
        """From d · η_max down to 0."""
        return Linear(self.discount * self.original.highest, self.warmup_ratio).at(step, steps)


@torch.no_grad()
def pruning_change(dense: nn.Module | Mapping[str, Tensor], pruned: nn.Module) -> float:
    """d_1 = ‖W - W_p‖₂ / (‖W‖₂ · √s) of ALLR, in [0, 1] (Zimmer et al. 2023).

    W are the weights of all parameters with a mask, W_p what the masks leave of them, and s the share that the masks
    prune of the weights there were. Magnitude pruning removes the smallest ones, at most the share s of ‖W‖₂², so √s
    is the most that can be reached. Other methods may exceed it: then the result is 1.

    Args:
        dense: the model before pruning, or its ``state_dict``. A model that has masks is one of an earlier cycle:
            what they prune is not counted in s.
        pruned: the model with masks.

    Raises:
        ValueError: no masks, a parameter that ``dense`` lacks or has in another shape, or nothing newly pruned.
    """
    if not (now := masks(pruned)):
        raise ValueError("pruned has no masks: prune it first")
    earlier = masks(dense) if isinstance(dense, nn.Module) else {}
    weights = dict(dense.named_parameters()) if isinstance(dense, nn.Module) else dense
    squares = removed = 0.0
    count = gone = 0
    for name, mask in now.items():
        weight = weights.get(name)
        if weight is None or weight.shape != mask.shape:
            found = "nothing" if weight is None else str(tuple(weight.shape))
            raise ValueError(f"dense must have {name} of shape {tuple(mask.shape)}, got {found}")
        drop = ~mask.dense(weight.device)
        if name in earlier:
            drop &= earlier[name].dense(weight.device)
        squared = weight.double().square()
        squares += float(squared.sum())
        removed += float(squared[drop].sum())
        count += earlier[name].kept if name in earlier else weight.numel()
        gone += int(drop.sum())
    if not gone or not squares:
        raise ValueError("pruned must have fewer weights than dense: nothing was pruned between them")
    return min(math.sqrt(removed / squares / (gone / count)), 1.0)


def _between(low: float, high: float, part: int, whole: int) -> float:
    return low + (high - low) * part / whole


def _warmup_steps(step: int, steps: int, ratio: float) -> int:
    _check_step(step, steps)
    return math.floor(steps * ratio)


def _check_step(step: int, steps: int) -> None:
    _check_integer("steps", steps)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= steps:
        raise ValueError(f"step must be an integer from 0 to steps={steps}, got {step!r}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_above(name: str, value: float) -> None:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _check_share(name: str, value: float, *, one: bool = False) -> None:
    if not _is_number(value) or not 0 <= value <= 1 or (value == 1 and not one):
        raise ValueError(f"{name} must be a number in [0, 1{']' if one else ')'}, got {value!r}")


def _check_original(value: object) -> None:
    if not isinstance(value, Original):
        raise ValueError(f"original must be an Original, such as Original.linear(0.1, 90), got {value!r}")
