"""Several processes, one on each device, as ``torchrun`` and ``accelerate launch`` start them (DDP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

# where accelerate looks on the CPU
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_count() -> int:
    """How many processes train together; 1 without a launcher.

    LOCAL_RANK is what accelerate goes by: a scheduler may set WORLD_SIZE alone.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


@contextmanager
def launcher_alone() -> Iterator[None]:
    """Hide the sizes that :func:`process_count` does not count: on the CPU accelerate would wait for so many others."""
    names = () if "LOCAL_RANK" in os.environ else _SIZES
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return process_count() == 1 or int(os.environ.get("RANK", 0)) == 0


def local_device() -> torch.device:
    """The CUDA device of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_launcher() -> None:
    """Refuse what would split the weights: adapters are merged into whole ones, on every process.

    Raises:
        ValueError: accelerate was configured for FSDP or DeepSpeed.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{name} ({variable}) shards the weights, which masks, their check and the merge of the adapters need "
                "whole: use DDP (torchrun, or accelerate launch --multi_gpu); frozen weights have neither gradient nor "
                "optimizer state there"
            )


def wait_for_all() -> None:
    """Return once every process has come here."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def leave() -> None:
    """Close the process group, if the Trainer opened one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
