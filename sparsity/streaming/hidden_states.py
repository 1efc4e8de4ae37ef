"""The hidden states of the calibration set between two blocks, by micro-batch: in memory or on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor

from trisparse.sparsity.streaming.journal import sync

_COMPLETE = "complete"  # a file that appears when all micro-batches are there


class InMemory(list[Tensor]):
    """Held in memory. They are lost with the process, and computed anew from the pruned blocks."""

    def leave(self, block: int) -> None:
        """What was assigned since the last call is what leaves ``block``."""

    def forget_before(self, block: int) -> None:
        """What leaves the blocks before ``block`` is not needed any more."""

    def go_on_behind(self, block: int) -> bool:
        """Take up what leaves ``block``, if an earlier run has left it; returns whether it has."""
        return False


class OnDisk:
    """A file for each micro-batch; what is assigned goes into new files, which count from :meth:`leave` on.

    So the files behind the last finished block are there until those behind the next one are complete, and a run that
    was killed goes on from them. They are read and written, not mapped: a map's pages would count as this process's
    memory. The methods are those of :class:`InMemory`.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._behind = -1  # the block that the hidden states leave; -1: they enter the first
        self._count = 0

    def append(self, tensor: Tensor) -> None:
        self._write(-1, self._count, tensor)
        self._count += 1

    def __getitem__(self, index: int) -> Tensor:
        with safe_open(self._path(self._behind, index), framework="pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor("hidden")
        return tensor.to(self._device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._write(self._behind + 1, index, tensor)

    def leave(self, block: int) -> None:
        folder = self._path(block, 0).parent
        for file in folder.iterdir():
            sync(file)
        (folder / _COMPLETE).touch()
        sync(folder)
        self._behind = block

    def forget_before(self, block: int) -> None:
        for folder in self._folder.glob("behind-*"):
            if int(folder.name.removeprefix("behind-")) < block:
                shutil.rmtree(folder)

    def go_on_behind(self, block: int) -> bool:
        if not (self._path(block, 0).parent / _COMPLETE).is_file():
            return False
        self._behind = block
        return True

    def _write(self, block: int, index: int, tensor: Tensor) -> None:
        path = self._path(block, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": tensor.cpu().contiguous()}, path)  # nothing reads it until the journal says that it may

    def _path(self, block: int, index: int) -> Path:
        return self._folder / f"behind-{block}" / f"{index:06}.safetensors"


HiddenStates = InMemory | OnDisk
