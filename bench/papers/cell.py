"""A cell: one measurement that a paper's table shows, and what the cells of one run share.

A cell says completely what is done: model, texts and their sizes, pruning, retraining, seed. So its key, the SHA-256 of
that, is the same wherever the same is measured: tables share cells, and a run that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch

from trisparse.env import cpu_model

Value = TypeVar("Value")


def device_name(device: torch.device) -> str:
    """What rows call it: "cpu", or the GPU's name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def machine_name(device: torch.device) -> str:
    """What seconds depend on: the GPU's name, or the CPU's model and how many threads torch uses."""
    if device.type != "cpu":
        return device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


class Session:
    """What cells that are measured one after another share: loaded models, token windows, the last pruned model.

    Args:
        device: where models run.
        keep_copies: keep the dense model and the last pruned one beside the one that is worked on. Without, each cell
            loads and prunes anew, which is for models of which the memory holds only one.
    """

    def __init__(self, device: torch.device | None = None, *, keep_copies: bool = True) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.keep_copies = keep_copies
        self._kept: dict[Hashable, Any] = {}
        self._last: dict[str, tuple[Hashable, Any]] = {}

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()``, made once for ``key``: for what is small, such as token windows."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: Value = self._kept[key]
        return kept

    def last(self, slot: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()``, kept until ``slot`` is asked for another ``key``: for what is large, such as a pruned model."""
        if self._last.get(slot, (None,))[0] != key:
            self._last.pop(slot, None)  # frees it before the next is made
            self._last[slot] = (key, make())
        kept: Value = self._last[slot][1]
        return kept


@dataclass(frozen=True)
class Cell(ABC):
    """One measurement. A subclass is a frozen dataclass whose fields are all that the numbers depend on.

    Attributes:
        kind: tells the subclasses' keys apart.
    """

    kind: ClassVar[str]

    @property
    def spec(self) -> dict[str, Any]:
        """The fields and the kind, as what JSON gives back."""
        spec: dict[str, Any] = json.loads(json.dumps({"kind": self.kind, **asdict(self)}))
        return spec

    @property
    def key(self) -> str:
        """SHA-256 of :attr:`spec`, 24 hexadecimal digits of it."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def order(self) -> str:
        """Cells are measured in the order of this; what can share a pruned model is to lie together."""
        return json.dumps(self.spec, sort_keys=True)

    @abstractmethod
    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Do it, and return at least the numbers ``wanted``: perplexity, accuracy, trainable_share, seconds, ..."""
