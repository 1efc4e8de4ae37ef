"""Random kill -9 during a streamed prune: is every resumed result, byte for byte, that of a run without a kill?

Prunes a tiny Llama in a process that is killed at a random time, as often as asked, each time resumed by the same call
until it ends; hidden states are in memory and on disk in turn.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.sparsity.streaming.output import work_folder
from trisparse.sparsity.streaming.stream import stream_sparsify

_SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
_BLOCKS = 6

# Children are forked, so that torch is imported once. The parent computes nothing, which would start threads that a
# child does not have.
_FORK = multiprocessing.get_context("fork")


def make_model(folder: Path) -> None:
    """Write the model to prune."""
    torch.manual_seed(0)
    config = LlamaConfig(**_SHAPE, num_hidden_layers=_BLOCKS, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)


def prune(folder: Path, out: Path, hidden_states: str) -> None:
    """The call that is killed."""
    tokens = torch.randint(0, 512, (64, 64), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in tokens.split(8)]
    options: dict[str, Any] = {"hidden_states": hidden_states, "device": "cpu", "progress": False}
    stream_sparsify(folder, out, "50%", "wanda", batches, **options)


def run(*call: Any, kill_after: float | None = None) -> bool:
    """Run ``call`` in a process of its own, and whether it was killed before it ended.

    Raises:
        RuntimeError: it failed by itself.
    """
    process = _FORK.Process(target=call[0], args=call[1:])
    process.start()
    process.join(kill_after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the streamed prune failed with exit code {process.exitcode}")
    return process.exitcode != 0


def content_of(folder: Path) -> dict[str, str]:
    """Hash of every file in ``folder``, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def state_of(out: Path) -> dict[str, Any]:
    """What a killed process left: finished parts, and files that it was writing."""
    work = work_folder(out)
    journal = work / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n") - 1 if journal.is_file() else None
    writing = sorted(file.name for file in work.rglob(".*.unfinished")) if work.is_dir() else []
    return {"finished": lines, "writing": writing}


def measure(kills: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one kill each; its time, what was left, and whether the result in the end is the same."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    work = Path(tempfile.mkdtemp(prefix="stream-kills-"))
    try:
        run(make_model, work / "model")
        expected, seconds = {}, {}
        for mode in ("memory", "disk"):
            start = time.perf_counter()
            run(prune, work / "model", work / mode, mode)
            seconds[mode] = time.perf_counter() - start
            expected[mode] = content_of(work / mode)
        for mode in itertools.cycle(("memory", "disk")):
            if len(rows) >= kills:
                break
            out = work / "out"
            trial: list[dict[str, Any]] = []
            while len(rows) + len(trial) < kills:  # some are killed again, and again
                after = rng.uniform(0.02, 1) * seconds[mode]
                if not run(prune, work / "model", out, mode, kill_after=after):
                    break
                trial.append({"hidden_states": mode, "after_seconds": after, **state_of(out)})
                if rng.random() < 0.6:
                    break
            run(prune, work / "model", out, mode)
            same = content_of(out) == expected[mode] and not work_folder(out).exists()
            rows += [{**row, "same": same} for row in trial]
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work)
    return rows


@benchmark("stream-kills", "random kill -9 during a streamed prune: are the resumed results the same bytes?")
def stream_kills(options: Options) -> Iterator[Measured]:
    """Each kill, measured in a process of its own that has computed nothing yet (it forks).

    Raises:
        RuntimeError: a result differs.
    """
    kills = 4 if options.quick else 20
    command = [sys.executable, "-m", "trisparse.bench.studies.stream_kills", str(kills)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    same = sum(row["same"] for row in rows)
    finished = sum(row["finished"] is not None for row in rows)
    writing = sum(bool(row["writing"]) for row in rows)
    metrics = {"same": same, "different": len(rows) - same, "after_a_finished_part": finished, "while_writing": writing}
    yield Measured(f"{kills} kills", {"kills": kills, "blocks": _BLOCKS}, {"streamed": metrics})
    if same != len(rows):
        raise RuntimeError(f"{len(rows) - same} of {len(rows)} resumed results differ")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), seed=0)))
