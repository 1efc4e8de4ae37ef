"""What tests/sparsity/test_distributed.py runs in every process that torchrun starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from trisparse import cli
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.distributed import launched_processes
from trisparse.sparsity.mask import masks_sha256
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.streaming.stream import stream_sparsify


def message_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    """Prune in memory and from disk to disk, and be refused; each process writes what it found."""
    torch.set_num_threads(1)
    tokens = torch.load(folder / "tokens.pt")
    batches = [{"input_ids": part} for part in tokens.split(2)]
    found: dict[str, Any] = {}
    with launched_processes() as processes:
        options: dict[str, Any] = {"distributed": True, "progress": False}
        for name in ("llama", "mixtral"):
            model = conftest.make_model(name)
            report = sparsify(model, "50%", "wanda", batches, **options)
            found[name] = [masks_sha256(model), report.samples, [row.note for row in report.targets]]
        for name in ("llama", "mixtral"):
            model = conftest.make_model(name)
            sparsify(model, "2:4", "sparsegpt", batches, **options)
            found[f"{name} updated"] = masks_sha256(model)
            torch.save(model.state_dict(), folder / f"{name}-updated-{processes.rank}.pt")
        model = conftest.make_model("llama")
        sparsify(model, "50% layer", "wanda", batches, include=["lm_head", "*.up_proj"], propagate="dense", **options)
        found["outside"] = masks_sha256(model)
        sizes: list[int] = []

        def counted(model: Any, targets: Any, batches: Any, **options: Any) -> Any:
            sizes.append(len(batches))
            return walk(model, targets, batches, **options)

        model = conftest.make_model("llama")
        with patch("trisparse.sparsity.allocation.allocate.walk", counted):
            sparsify(model, "50%", "magnitude", [*batches, batches[0]], allocation="owl", **options)
        found["owl"] = [masks_sha256(model), *sizes]
        for mode in ("memory", "disk"):
            out = folder / f"streamed-{mode}"
            report = stream_sparsify(folder / "llama", out, "50%", "wanda", batches, hidden_states=mode, **options)
            found[mode] = [(row.name, row.kept) for row in report.targets]
        model = conftest.make_model("llama")
        found["refused"] = [
            message_of(lambda: sparsify(model, "50%", "wanda", tokens, seq_len=16, propagate="linear", **options)),
            message_of(lambda: sparsify(model, "50%", "pruner-zero", batches, **options)),
            message_of(lambda: sparsify(model, "50%", "wanda", batches[:1], **options)),
            message_of(lambda: sparsify(model, "50%", "wanda", batches[processes.rank :], **options)),
            message_of(lambda: stream_sparsify(folder / "llama", folder / "tokens.pt", **options)),
        ]
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
        # In the same process group: another one under the same launcher would meet the first one's addresses.
        text = [
            "--data",
            str(folder / "text.txt"),
            "--samples",
            "300",
            "--seq-len",
            "16",
            "--sparsity",
            "50%",
            "--json",
        ]
        for extra, out in ((["--stream"], "stream"), ([], "plain")):
            sys.argv[1:] = [
                "prune",
                str(folder / "llama"),
                "--method",
                "abs(W) * X",
                *text,
                *extra,
                "--out",
                str(folder / out),
            ]
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
