"""Several processes, one on each device, as ``torchrun`` and ``accelerate launch`` start them (DDP or FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import distributed

Sharding = Literal["none", "fsdp"]
SHARDINGS = ("none", "fsdp")
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
    """The CUDA device of this process, or the CPU where there is none or accelerate was launched with ``--cpu``."""
    if not torch.cuda.is_available() or _is_on("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")


def check_launcher() -> None:
    """Refuse what would split the weights, for a loop that holds them whole on every process.

    Raises:
        ValueError: accelerate was configured for FSDP or DeepSpeed.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if _is_on(variable):
            raise ValueError(
                f"{name} ({variable}) splits the weights, which this training holds whole: use DDP (torchrun, or "
                "accelerate launch --multi_gpu)"
            )


def chosen_sharding(asked: Sharding) -> Sharding:
    """How the weights are spread: as ``asked``, or "fsdp" where accelerate was launched for it.

    Raises:
        ValueError: accelerate was configured for what this does not do (DeepSpeed, the first FSDP, offloading), or
            there is one process only to spread them over.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed (ACCELERATE_USE_DEEPSPEED) is not supported: sharding='fsdp' splits the weights over the "
            "processes as well, and DDP (torchrun, or accelerate launch --multi_gpu) keeps them whole"
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "accelerate was launched for the first FSDP, whose flat parameters have no masks: pass "
                "--fsdp_version 2, or start torchrun with sharding='fsdp'"
            )
        if _is_on("FSDP_OFFLOAD_PARAMS"):
            raise ValueError("FSDP with offloading (FSDP_OFFLOAD_PARAMS) is not supported: launch without it")
        asked = "fsdp"
    if asked == "fsdp" and process_count() == 1:
        raise ValueError(
            "sharding='fsdp' splits the weights over several processes, and this is one: start them by torchrun or "
            "accelerate launch, or leave it out"
        )
    return asked


def join(device: torch.device) -> None:
    """Open the process group that the Trainer would open."""
    if distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def check_same_run(identity: dict[str, Any]) -> None:
    """Check that every process has the same ``identity`` (plain values); all must come here, after :func:`join`.

    Raises:
        ValueError: names what differs, on every process.
    """
    group = distributed.new_group(backend="gloo")
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, identity, group=group)
    distributed.destroy_process_group(group)
    different = sorted(key for key in found[0] if any(other[key] != found[0][key] for other in found))
    if different:
        raise ValueError(f"the processes differ in {', '.join(different)}: each must come with the same arguments")


def wait_for_all() -> None:
    """Return once every process has come here."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def leave() -> None:
    """Close the process group, if the Trainer opened one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
