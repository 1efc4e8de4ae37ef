"""What a run of prune-retrain cycles has finished: one that was killed goes on with the cycle that it was in.

``cycles.json`` says whose run it is and what every finished cycle reported, and ``cycle-N/finished.safetensors`` of the
last of them holds its weights and masks. The cycle after it is pruned again, which gives the same masks, and retrained
from its last checkpoint if there is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trisparse.retrain.adapters import is_tied, untie
from trisparse.retrain.cycles_report import CycleReport
from trisparse.retrain.groups import head_of
from trisparse.retrain.processes import is_main_process, wait_for_all
from trisparse.retrain.run_folder import RUN_FILE, checkpoints
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import Mask, attach, check_masks, detach, masks
from trisparse.sparsity.pattern import parse_pattern

JOURNAL = "cycles.json"
FINISHED = "finished.safetensors"
_MASK = "mask of "  # no parameter's name has a space


class CyclesJournal:
    """The folder of a run of cycles; every process reads it, the main one writes it.

    Args:
        folder: with a folder ``cycle-N`` for each cycle.
        identity: what decides the outcome of the run, as JSON has it.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        self.folder = folder
        self._content: dict[str, Any] = {"identity": identity, "perplexity_before": None, "cycles": [], "masks": {}}

    def cycle(self, number: int) -> Path:
        """The folder of one cycle."""
        return self.folder / f"cycle-{number}"

    def exists(self) -> bool:
        """Whether a run has begun in the folder."""
        return (self.folder / JOURNAL).is_file()

    def start(self, perplexity_before: float | None) -> None:
        """Begin anew: what an earlier run left in the folder counts no longer."""
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        for cycle in self.folder.glob("cycle-*"):
            (cycle / FINISHED).unlink(missing_ok=True)
            for checkpoint in checkpoints(cycle):
                (checkpoint / RUN_FILE).unlink()
        self._content["perplexity_before"] = perplexity_before
        self._write()

    def finish(self, model: nn.Module, report: CycleReport) -> None:
        """Write what a cycle left: the model first, so that the journal names no other than a whole one."""
        done = self._content["cycles"]
        done.append(asdict(report))
        found = masks(model)
        self._content["masks"] = {name: [mask.cols, mask.transposed, str(mask.pattern)] for name, mask in found.items()}
        if is_main_process():
            tensors = _state(model) | {_MASK + name: mask.bits for name, mask in found.items()}
            folder = self.cycle(len(done))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / FINISHED)
            self._write()
            (self.cycle(len(done) - 1) / FINISHED).unlink(missing_ok=True)
        wait_for_all()

    def resume(self, model: nn.Module) -> tuple[float | None, list[CycleReport]]:
        """Make ``model`` what the last finished cycle left; returns the perplexity before all, and the cycles' reports.

        Raises:
            ValueError: there is no journal, or it is of another run (names what differs); nothing was changed.
        """
        path = self.folder / JOURNAL
        if not self.exists():
            raise ValueError(f"resume=True, and {self.folder} holds no {JOURNAL}: leave resume out to start anew")
        theirs, mine = json.loads(path.read_text()), self._content["identity"]
        found = theirs["identity"]
        if different := sorted(key for key in found.keys() | mine.keys() if found.get(key) != mine.get(key)):
            raise ValueError(f"{path} is of another run, resume needs the same: {', '.join(different)}")
        self._content = theirs
        if theirs["cycles"]:
            _restore(model, load_file(self.cycle(len(theirs["cycles"])) / FINISHED), theirs["masks"])
        return theirs["perplexity_before"], [CycleReport(**cycle) for cycle in theirs["cycles"]]

    def _write(self) -> None:
        unfinished = self.folder / f"{JOURNAL}.tmp"
        unfinished.write_text(json.dumps(self._content, indent=2))
        os.replace(unfinished, self.folder / JOURNAL)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the ``state_dict``, each once."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: held for name, held in model.named_buffers() if name in saved}


@torch.no_grad()
def _restore(model: Any, tensors: Mapping[str, Tensor], patterns: Mapping[str, Any]) -> None:
    head = head_of(model)
    with interrupt_after():
        if head is not None and is_tied(model, head) and f"{head}.weight" in tensors:  # an earlier cycle untied it
            untie(model, head, model.get_submodule(head))
        for name, held in _state(model).items():
            held.copy_(tensors[name])
        for module in model.modules():
            detach(module)
        for name, (cols, transposed, pattern) in patterns.items():
            owner, _, attribute = name.rpartition(".")
            shape = model.get_parameter(name).shape
            mask = Mask(tensors[_MASK + name], shape, cols, transposed, parse_pattern(pattern))
            attach(model.get_submodule(owner), attribute, mask, zero=False)
    check_masks(model)
