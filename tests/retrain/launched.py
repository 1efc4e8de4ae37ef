"""What tests/retrain/test_accelerate_launch.py runs in every process that ``accelerate launch`` starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from trisparse.retrain.perp import retrain
from trisparse.retrain.processes import is_main_process, leave
from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.mask import check_masks, masks_sha256


def main(folder: Path) -> None:
    """Retrain, check the masks, let the first process save, and write what this process ended with."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    model = conftest._build("opt")
    config = conftest._quick(steps=4, save_steps=2, output_dir=folder / f"run-of-{rank}", guard_every=1)
    report = retrain(model, torch.load(folder / "tokens.pt"), config, progress=False)
    check_masks(model)
    torch.save(model.state_dict(), folder / f"rank-{rank}.pt")
    (folder / f"rank-{rank}.json").write_text(json.dumps({**report.to_dict(), "masks": masks_sha256(model)}))
    if is_main_process():
        save(model, folder / f"saved-by-{rank}", recipe=[])
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
