"""What tests/retrain/test_processes.py runs in every process that torchrun starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from trisparse import cli
from trisparse.retrain.perp import retrain
from trisparse.sparsity.mask import check_masks, masks_sha256


def main(folder: Path) -> None:
    """Retrain by the function, by the grid and by the command; each process writes what it ended with."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = conftest._build("opt")
    tokens = torch.load(folder / "tokens.pt")
    options = {"steps": 6, "batch_size": 2, "gradient_accumulation": 2, "guard_every": 1}
    config = conftest._quick(output_dir=folder / "checkpoints", save_steps=3, **options)
    report = retrain(model, tokens, config, validation=tokens[:2], progress=True)
    check_masks(model)
    torch.save(model.state_dict(), folder / f"rank-{rank}.pt")

    other = conftest._build("opt")
    rates = {"learning_rate": "grid", "learning_rates": (1e-4, 1e-2), "grid_steps": 2}
    grid = retrain(other, tokens, conftest._quick(**options, **rates), validation=tokens, progress=False)

    differ = ""
    try:
        retrain(conftest._build("opt"), tokens.roll(rank, 0), conftest._quick(**options), progress=False)
    except ValueError as error:
        differ = str(error)

    every = conftest._build("opt")
    full = conftest._quick(**options, groups="full", learning_rate=1e-3)
    losses = retrain(every, tokens, full, progress=False).losses
    (folder / f"rank-{rank}.json").write_text(
        json.dumps(
            {
                "report": report.to_dict(),
                "masks": masks_sha256(model),
                "grid": grid.learning_rate,
                "full": losses,
                "differ": differ,
            }
        )
    )
    sys.argv = ["trisparse", "retrain", str(folder / "pruned"), "--data", str(folder / "text.txt"), "--json"]
    sys.argv += ["--out", str(folder / "retrained"), "--config", str(folder / "retrain.yaml"), "--device", "cpu"]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
