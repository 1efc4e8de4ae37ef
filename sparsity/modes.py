"""Evaluation or training mode for a while, with every module's own mode put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode while open; each module's own flag comes back, also where they differ."""
    with training(model, mode=False):
        yield


@contextmanager
def training(model: nn.Module, *, mode: bool = True) -> Iterator[None]:
    """Put ``model`` in training mode (or the other ``mode``) while open, likewise."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, own in modes:
            module.training = own
