"""Checkpoints of a run that can go on: which are complete, whose they are, and everything that trained in them.

The Trainer writes the optimizer, the schedule, the random states and its own state. To them come here every trained
parameter by name, exactly, and last of all ``retrain.json``: a checkpoint without it was cut off while it was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from trisparse.retrain.processes import process_count, wait_for_all
from trisparse.retrain.sharding import as_held, held
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import masks_sha256

if TYPE_CHECKING:
    from trisparse.retrain.batch_settings import BatchSettings
    from trisparse.retrain.perp import PERPConfig

RUN_FILE = "retrain.json"
TRAINED_FILE = "trained.safetensors"

_CHECKPOINT = re.compile(r"checkpoint-\d+")
# what may differ between the run that wrote a checkpoint and the one that goes on from it
_FREE = (
    "output_dir", "save_steps", "save_total_limit", "report_to", "resume", "guard_every", "gradient_checkpointing",
)  # fmt: skip
# what would say nothing in a message
_HASHES = ("masks", "weights", "data", "validation", "teacher")
# bytes of a weight on a GPU that are copied to the CPU together
_HASHED_AT_ONCE = 2**26


def run_identity(
    config: PERPConfig, batch: BatchSettings, dtype: torch.dtype | None, model: nn.Module, windows: Tensor, *,
    validation: Tensor | None, teacher: nn.Module | None, callbacks: Sequence[Any] = (),
) -> Any:  # fmt: skip
    """What decides the outcome of a run, as JSON has it: settings, masks, weights, data, processes.

    Args:
        dtype: of autocast, which "auto" depends on the machine for.
        validation: held-out windows, where they decide something or are measured throughout; else None.
        callbacks: those with a method ``identity`` count with what it returns, to be written as JSON.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    settings |= {"batch_size": batch.size, "gradient_accumulation": batch.accumulation, "processes": process_count()}
    settings |= {"masks": masks_sha256(model), "weights": weights_sha256(model), "data": _windows_sha256(windows)}
    settings["validation"] = None if validation is None else _windows_sha256(validation)
    settings["teacher"] = None if teacher is None else weights_sha256(teacher)
    settings["dtype"] = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    settings["callbacks"] = [callback.identity() for callback in callbacks if hasattr(callback, "identity")]
    return json.loads(json.dumps(settings, default=str))


def weights_sha256(model: nn.Module) -> str:
    """A hash over name, shape, dtype and bytes of every parameter and of every compressed layer's values."""
    digest = hashlib.sha256()
    compressed = {f"{n}.values": m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    for name, stored in (dict(model.named_parameters()) | compressed).items():
        # whatever its layout in memory
        weight = stored.compressed().values if isinstance(stored, SparseLinear) else stored
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        for part in weight.detach().flatten().view(torch.uint8).split(_HASHED_AT_ONCE):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()


def _windows_sha256(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Every complete checkpoint of a run folder, the oldest first."""
    found = (path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name))
    return [path for path in sorted(found, key=_step) if (path / RUN_FILE).is_file()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def unmark(folder: Path, step: int) -> None:
    """What an earlier run left at ``step`` counts no longer: another is about to be written over it."""
    (folder / f"checkpoint-{step}" / RUN_FILE).unlink(missing_ok=True)


def last_checkpoint(folder: Path, identity: Any, *, required: bool = True) -> tuple[Path | None, dict[str, Any]]:
    """The last complete checkpoint of the run ``identity``, and what that run had chosen.

    None where there is no complete one at all and ``required`` is False.

    Raises:
        ValueError: there is none; names what differs in the last one of another run.
    """
    complete = checkpoints(folder)
    if not complete and not required:
        return None, {}
    if not complete:
        raise ValueError(f"resume=True, and {folder} holds no complete checkpoint: leave resume out to start anew")
    for path in reversed(complete):
        run = json.loads((path / RUN_FILE).read_text())
        if run["identity"] == identity:
            return path, run["chosen"]
    theirs = json.loads((complete[-1] / RUN_FILE).read_text())["identity"]
    different = sorted(key for key in theirs.keys() | identity.keys() if theirs.get(key) != identity.get(key))
    shown = [
        key if key in _HASHES else f"{key} (was {theirs.get(key)!r}, is {identity.get(key)!r})" for key in different
    ]
    raise ValueError(f"{complete[-1]} is of another run, resume needs the same: {', '.join(shown)}")


def save_trained(params: Mapping[str, Tensor], folder: Path) -> None:
    """Write parameters by name, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: param.contiguous().cpu() for name, param in params.items()}, folder / TRAINED_FILE)


@torch.no_grad()
def load_trained(model: nn.Module, names: Collection[str], folder: Path) -> None:
    """Read what :func:`save_trained` wrote, in place; where parameters are split, each process its part.

    Raises:
        ValueError: the file holds other parameters, or in other shapes or dtypes.
    """
    tensors = load_file(folder / TRAINED_FILE)
    params = {name: model.get_parameter(name) for name in names}
    wrong = sorted(tensors.keys() ^ params.keys()) or [
        name for name, p in params.items() if (p.shape, p.dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if wrong:
        raise ValueError(f"{folder} does not fit the parameters that train: {', '.join(wrong[:5])}")
    for name, param in params.items():
        held(param).copy_(as_held(tensors[name], param))


class MarkComplete(TrainerCallback):
    """Writes ``retrain.json`` into each checkpoint, when all else is there, and removes the run's oldest ones.

    Args:
        identity: of the run.
        chosen: what the run has chosen.
        limit: how many checkpoints of the run stay; None is all.
    """

    def __init__(self, identity: Any, chosen: dict[str, Any], limit: int | None = None) -> None:
        self._identity, self._limit = identity, limit
        self._text = json.dumps({"identity": identity, "chosen": chosen}, indent=2)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that has just been written."""
        wait_for_all()  # every process writes its random state
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{RUN_FILE}.tmp"
        unfinished.write_text(self._text)
        os.replace(unfinished, folder / RUN_FILE)
        if self._limit is None:
            return
        # only now that the new one is complete, which the Trainer's own limit does not wait for
        earlier = [path for path in checkpoints(folder.parent) if _step(path) <= state.global_step]
        own = [path for path in earlier if json.loads((path / RUN_FILE).read_text())["identity"] == self._identity]
        for path in own[: -self._limit]:
            unmark(folder.parent, _step(path))
            shutil.rmtree(path)
