"""Several processes that calibrate together, one on each device, as ``torchrun`` starts them.

Each one has the model (or streams it), runs its share of the micro-batches, and adds its sums to those of the others;
from there on all of them select the same masks. Sums are fp64 (see ``InputStatistics``), so that their order does not
show: the masks are those of one process with the same micro-batches. Hessians of updates are fp32 sums: all processes
have the same, and their masks are those of one process but for near ties.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that make one call together, and which one this is; the default is one alone."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """The micro-batches that this process runs.

        Raises:
            ValueError: there are fewer micro-batches than processes.
        """
        if len(batches) < self.count:
            raise ValueError(
                f"data has {len(batches)} micro-batches for {self.count} processes: each needs one (more samples, or "
                "fewer processes)"
            )
        return list(batches[self.rank :: self.count])

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, by rank; plain Python values."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def from_first(self, ask: Callable[[], T]) -> T:
        """What ``ask()`` returns, or raises, on the first process; it is called there only."""
        if self.count == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = ask()
            except Exception as error:
                answer[1] = error
        distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def check_equal(self, what: str, value: object) -> None:
        """Check that ``value`` is the same on all processes.

        Raises:
            ValueError: it is not; on every process.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise ValueError(f"{what} differ between the processes: all of them must make the same call")


ALONE = Processes()


def running_processes() -> Processes:
    """The processes of the default process group.

    Raises:
        ValueError: torch.distributed is not initialised.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("distributed=True needs a process group: start with torchrun, and init_process_group() first")
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that a launcher such as torchrun started, with a process group while open; else one alone."""
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    opened = not distributed.is_initialized()
    if opened:
        device = own_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL sends what is no tensor through the current device
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield running_processes()
    finally:
        if opened:
            distributed.destroy_process_group()


def own_device() -> torch.device:
    """The CUDA device of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
