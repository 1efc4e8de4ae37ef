"""The benchmark "prune": seconds and memory of pruning a model, against the usual implementations, and its perplexity.

Every contestant runs in a process of its own (bench/families/prune_process.py), one after the other, round by round, on
the same text and with the same number of threads. The model is loaded and the text cut before the clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trisparse.bench.models import model_label
from trisparse.bench.registry import Case, Measured, Options, benchmark
from trisparse.sparsity.pattern import parse_pattern

USUAL = "usual"
_ROUNDS = 3
_STDERR_LINES = 5
PRUNED_WITHIN = 0.02  # of the share asked for: SparseGPT's usual threshold takes ties along


@dataclass(frozen=True)
class Job:
    """What one process prunes.

    Attributes:
        method, pattern: as ``sparsify`` takes them.
        how: "usual", or ``propagate`` of ``sparsify``.
        model: a Hugging Face id, a folder or ``smollm2``.
        device: "cpu" or "cuda".
        dtype: of the weights, such as "float32".
        samples, seq_len: of calibration.
        test: windows that perplexity is taken on.
    """

    method: str
    pattern: str
    how: str
    model: str
    device: str
    dtype: str
    samples: int
    seq_len: int
    test: int

    @property
    def contestant(self) -> str:
        """Its name among the contestants."""
        return {USUAL: USUAL, "block": "trisparse"}.get(self.how, f"trisparse, propagate={self.how}")


Found = dict[str, float]  # what a process prints: seconds, and the metrics of its row
RunJob = Callable[[Job], Found]

CASES = (
    ("magnitude", "50% layer", (USUAL, "block")),
    ("wanda", "50%", (USUAL, "block", "dense")),
    ("sparsegpt", "50%", (USUAL, "block")),
    ("sparsegpt", "2:4", (USUAL, "block")),
    ("pruner-zero", "50%", (USUAL, "block")),
)
QUICK_CASES = (
    ("magnitude", "50% layer", (USUAL, "block")),
    ("wanda", "50%", (USUAL, "block")),
    ("sparsegpt", "2:4", (USUAL, "block")),
    ("pruner-zero", "50%", (USUAL, "block")),
)


@benchmark(
    "prune",
    "seconds, peak memory and perplexity of each pruning method against the usual implementations",
    devices=("cpu", "cuda"),
    takes=("dtype", "model", "repeats"),
)
def prune(options: Options) -> Iterator[Case | Measured]:
    """Each method on SmolLM2-135M or ``--model``, a Llama-like one; 32 x 512 tokens, quick 8 x 256.

    Raises:
        RuntimeError: processes failed, or did not prune the share that was asked for; at the end, after all others.
    """
    return measure(options, in_a_process)


def measure(options: Options, run: RunJob) -> Iterator[Measured]:
    """The cases, each job run by ``run``."""
    samples, seq_len, test = (8, 256, 4) if options.quick else (32, 512, 16)
    usual_dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16  # fp32 of 7B with G fills 80 GB
    dtype = str(options.dtype or usual_dtype).removeprefix("torch.")
    model, device = options.model or "smollm2", str(options.device)
    rounds = options.repeats or (1 if options.quick else _ROUNDS)
    problems: list[str] = []
    for method, pattern, ways in QUICK_CASES if options.quick else CASES:
        name = f"{method} {pattern}, {model_label(model)}, {samples}x{seq_len} tokens"
        if options.only not in name:
            continue
        jobs = [Job(method, pattern, how, model, device, dtype, samples, seq_len, test) for how in ways]
        found, failed = run_rounds(jobs, rounds, run)
        problems += [f"{name}: {problem}" for problem in failed]
        if found:
            parameters: dict[str, Any] = {
                "method": method,
                "pattern": pattern,
                "model": model_label(model),
                "dtype": dtype,
            }
            parameters |= {"sparsity": parse_pattern(pattern).sparsity, "samples": samples, "seq_len": seq_len}
            seconds = {key: [one["seconds"] for one in own] for key, own in found.items()}
            metrics = {key: _metrics(own) for key, own in found.items()}
            yield Measured(name, parameters, metrics, seconds, baseline=USUAL)
    if problems:
        raise RuntimeError("; ".join(problems))


def run_rounds(jobs: list[Job], rounds: int, run: RunJob) -> tuple[dict[str, list[Found]], list[str]]:
    """What each contestant found in each round, A B A B; one that fails is left out from there on, and is named."""
    found: dict[str, list[Found]] = {job.contestant: [] for job in jobs}
    problems = []
    for _ in range(rounds):
        for job in jobs:
            if job.contestant not in found:
                continue
            try:
                one = run(job)
                asked = parse_pattern(job.pattern).sparsity
                if abs(one["sparsity"] - asked) > PRUNED_WITHIN:
                    raise RuntimeError(f"pruned {one['sparsity']:.3f} of the weights and not {asked:.3f}")
            except RuntimeError as problem:
                del found[job.contestant]
                problems.append(f"{job.contestant}: {problem}")
            else:
                found[job.contestant].append(one)
    return found, problems


def _metrics(rounds: list[Found]) -> Found:
    """Of the first round; memory is the most of any."""
    first = {key: value for key, value in rounds[0].items() if key != "seconds"}
    return first | {"peak_bytes": max(one["peak_bytes"] for one in rounds)}


def in_a_process(job: Job) -> Found:
    """Run ``job`` in a process of its own.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    command = [sys.executable, "-m", "trisparse.bench.families.prune_process", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " | ".join(done.stderr.strip().splitlines()[-_STDERR_LINES:])
        raise RuntimeError(f"the process ended with code {done.returncode}: {said}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found
