"""What tests/retrain/test_sharding.py runs in every process that torchrun starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from trisparse import cli
from trisparse.retrain import sharding
from trisparse.retrain.perp import retrain
from trisparse.retrain.sharding import held
from trisparse.sparsity.mask import check_masks, masks_sha256

RANK = int(os.environ.get("RANK", 0))


class Parts(TrainerCallback):
    """Bytes that this process holds of the parameters of ``model``, and of all, while it trains."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.bytes: list[tuple[int, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        params = list(self.model.parameters())
        whole = sum(param.numel() * param.element_size() for param in params)
        self.bytes.append((sum(held(param.detach()).nbytes for param in params), whole))


class Fails(TrainerCallback):
    """Raises after the second step in the processes ``ranks``."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK in self.ranks and state.global_step == 2:
            raise RuntimeError("as asked")


def text_of(run: Callable[[], Any]) -> str:
    """The exception that ``run`` raises, with its notes."""
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "nothing was raised"


def main(folder: Path) -> None:
    """Retrain in every way; each process writes what it ended with."""
    torch.set_num_threads(1)
    tokens = torch.load(folder / "tokens.pt")
    runs = json.loads((folder / "runs.json").read_text())
    found: dict[str, Any] = {}

    def launch(model: Any, callbacks: Any = (), data: Any = tokens, **changes: Any) -> Any:
        config = conftest._quick(**runs["common"] | changes)
        return retrain(model, data, config, validation=tokens[:2], progress=False, callbacks=callbacks)

    for name, (kind, changes) in runs["each"].items():
        model = conftest._build(kind)
        before, parts = conftest._snapshot(model), Parts(model)
        if "save_steps" in changes:
            changes = changes | {"output_dir": folder / name}
        report = launch(model, [parts], **changes)
        check_masks(model)
        after = conftest._snapshot(model)
        found[name] = {
            "report": report.to_dict(),
            "bytes": parts.bytes,
            "changed": [key for key in before if key != "state" and before[key] != after[key]],
            "masks": masks_sha256(model),
        }
        torch.save(model.state_dict(), folder / f"{name}-{RANK}.pt")

    for name in ("perp", "full"):  # as if the run had been cut off after its second step
        kind, changes = runs["each"][name]
        if RANK == 0:
            shutil.copytree(folder / name / "checkpoint-2", folder / f"{name}-cut" / "checkpoint-2")
        torch.distributed.barrier()
        resumed = conftest._build(kind)
        changes = changes | {"output_dir": folder / f"{name}-cut"}
        found[f"{name}-resumed"] = launch(resumed, resume=True, **changes).losses
        torch.save(resumed.state_dict(), folder / f"{name}-resumed-{RANK}.pt")

    half = conftest._build("llama").bfloat16()
    teacher = conftest._build("opt-dropout").bfloat16()
    before = conftest._snapshot(teacher)
    config = conftest._quick(**runs["common"] | runs["half"])
    found["half"] = retrain(half, tokens, config, validation=tokens, teacher=teacher, progress=False).to_dict()
    conftest._assert_same(teacher, before)
    check_masks(half)
    torch.save(half.state_dict(), folder / f"half-{RANK}.pt")

    untouched = {name: conftest._build(name) for name in ("llama", "opt")}
    before = {name: conftest._snapshot(model) for name, model in untouched.items()}
    found["differ"] = text_of(lambda: launch(untouched["llama"], data=tokens[RANK:]))
    found["failed"] = text_of(lambda: launch(untouched["llama"], [Fails(0, 1)]))
    found["failed full"] = text_of(lambda: launch(untouched["opt"], [Fails(0, 1)], groups="full"))
    found["infinite"] = text_of(lambda: launch(untouched["llama"], learning_rate=1e30, max_grad_norm=0.0))
    for name, model in untouched.items():
        conftest._assert_same(model, before[name])

    sys.argv = ["trisparse", "retrain", str(folder / "pruned"), "--data", str(folder / "text.txt"), "--json"]
    sys.argv += ["--out", str(folder / "retrained"), "--config", str(folder / "retrain.yaml"), "--sharding", "fsdp"]
    (folder / f"found-{RANK}.json").write_text(json.dumps(found))
    cli.main()


def alone(folder: Path) -> None:
    """The second process fails alone."""
    torch.set_num_threads(1)
    sharding._PATIENCE = timedelta(seconds=1)
    model = conftest._build("llama")
    common = json.loads((folder / "runs.json").read_text())["common"]
    config = conftest._quick(**common | {"sharding": "none"})  # accelerate says so
    tokens = torch.load(folder / "tokens.pt")
    text = text_of(lambda: retrain(model, tokens, config, progress=False, callbacks=[Fails(1)]))
    (folder / f"alone-{RANK}.txt").write_text(text)


if __name__ == "__main__":
    {"all": main, "alone": alone}[sys.argv[2]](Path(sys.argv[1]))
