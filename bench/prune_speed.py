"""Seconds that pruning SmolLM2-135M takes, against the usual implementations, and the perplexity of each result.

    python -m trisparse.bench.prune_speed [--rounds 1] [--json FILE]

Every contestant runs in a process of its own, one after the other, round by round, on the same 32 x 512 tokens and
with the same number of threads. Ours runs as the command line does, with its setting of malloc
(:func:`trisparse.sparsity.hardware.keep_freed_memory`); the usual one has glibc's. The model is loaded and the text is
cut before the clock starts. A ratio is the median over the rounds of ours to the usual one of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trisparse.bench.smollm2 import load_smollm2
from trisparse.bench.usual_pruning import prune_as_usual
from trisparse.env import environment
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.hardware import keep_freed_memory
from trisparse.sparsity.pattern import NM, parse_pattern
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

# method, pattern, how calibration goes on ("usual": the usual implementation), the bar as a ratio to the usual one
CONTESTANTS: tuple[tuple[str, str, str, float | None], ...] = (
    ("wanda", "50%", "usual", None),
    ("wanda", "50%", "block", 0.65),
    ("wanda", "50%", "dense", 0.40),
    ("sparsegpt", "50%", "usual", None),
    ("sparsegpt", "50%", "block", 0.50),
    ("sparsegpt", "2:4", "usual", None),
    ("sparsegpt", "2:4", "block", 0.50),
)


def measure(model: Any, calibration: torch.Tensor, method: str, pattern: str, propagate: str) -> float:
    """Seconds in which ``model`` is pruned, in place.

    Args:
        model: a Llama-like model in fp32.
        calibration: token ids [samples, seq_len].
        method, pattern, propagate: of :data:`CONTESTANTS`.
    """
    start = time.perf_counter()
    if propagate == "usual":
        parsed = parse_pattern(pattern)
        n_of_m = (parsed.n, parsed.m) if isinstance(parsed, NM) else None
        prune_as_usual(model, calibration, method, parsed.sparsity, n_of_m)
    else:
        samples, seq_len = calibration.shape
        how: Any = propagate
        sparsify(model, pattern, method, calibration, samples=samples, seq_len=seq_len, propagate=how, progress=False)
    return time.perf_counter() - start


def contestant(method: str, pattern: str, propagate: str, samples: int, seq_len: int, test: int) -> dict[str, float]:
    """What one process measures: seconds and perplexity."""
    if propagate != "usual":
        keep_freed_memory()
    model, tokenizer = load_smollm2()
    calibration = token_windows(pydoc_text("calibration"), tokenizer=tokenizer, seq_len=seq_len, samples=samples)
    windows = token_windows(pydoc_text("test"), tokenizer=tokenizer, seq_len=seq_len, samples=test)
    seconds = measure(model, calibration, method, pattern, propagate)
    return {"seconds": seconds, "perplexity": perplexity(model, windows, seq_len=seq_len)}


def summary(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row for each contestant: median seconds, the median ratio to the usual one, perplexity and the bar."""
    rows = []
    for method, pattern, propagate, bar in CONTESTANTS:
        own, usual = f"{method} {pattern} {propagate}", f"{method} {pattern} usual"
        if own not in rounds[0]:
            continue
        row: dict[str, Any] = {
            "method": method,
            "pattern": pattern,
            "propagate": propagate,
            "seconds": statistics.median(found[own]["seconds"] for found in rounds),
            "perplexity": rounds[0][own]["perplexity"],
        }
        if bar is not None and usual in rounds[0]:
            row["ratio"] = statistics.median(found[own]["seconds"] / found[usual]["seconds"] for found in rounds)
            row["bar"] = bar
            row["perplexity_ratio"] = row["perplexity"] / rounds[0][usual]["perplexity"]
        rows.append(row)
    return rows


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    text = f"{row['method']:10}{row['pattern']:6}{row['propagate']:7}{row['seconds']:8.1f} s  "
    text += f"perplexity {row['perplexity']:7.2f}"
    if "ratio" in row:
        text += f"  {row['ratio']:.2f}x of the usual time (bar {row['bar']:.2f})"
        text += f"  {row['perplexity_ratio']:.3f}x of its perplexity"
    return text


def _in_a_process(options: argparse.Namespace, method: str, pattern: str, propagate: str) -> dict[str, float]:
    command = [sys.executable, "-m", "trisparse.bench.prune_speed", "--contestant", method, pattern, propagate]
    for name in ("samples", "seq_len", "test"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the contestants, print the table, and store it if a file is given."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.prune_speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test", type=int, default=16, help="windows of the test split")
    parser.add_argument("--only", choices=("wanda", "sparsegpt"), help="one of the methods")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--contestant", nargs=3, metavar=("METHOD", "PATTERN", "PROPAGATE"), help="run one, print JSON")
    options = parser.parse_args(arguments)
    if options.contestant is not None:
        method, pattern, propagate = options.contestant
        found = contestant(method, pattern, propagate, options.samples, options.seq_len, options.test)
        print(json.dumps(found))
        return
    chosen = [row[:3] for row in CONTESTANTS if options.only in (None, row[0])]
    rounds = []
    for number in range(options.rounds):
        rounds.append({" ".join(row): _in_a_process(options, *row) for row in chosen})
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = summary(rounds)
    for row in rows:
        print(as_line(row))
    if options.json is not None:
        settings = {"rounds": options.rounds, "samples": options.samples, "seq_len": options.seq_len}
        settings |= {"test_windows": options.test, "threads": torch.get_num_threads()}
        content = {"settings": settings, "rows": rows, "rounds": rounds, "environment": environment()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
