"""Training speed and memory of PERP against full fine-tuning with the mask applied again after each step.

Every contestant has its own copy of SmolLM2-135M, pruned to 50% by magnitude. They take one optimizer step of 2 x 512
tokens each in turn, in one process, so that whatever else the machine does slows all of them. Speeds are medians over
the rounds, and a ratio is the median of the ratios to "full" in the same round. All have torch's fused AdamW and no
clipping of gradients. Memory is the most bytes that torch holds at once in two steps (adapters, gradients, optimizer
state, activations) beyond the weights, with gradient checkpointing, counted by its profiler.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trisparse.bench.models import load_causal_lm, model_label
from trisparse.bench.peak_memory import peak_bytes
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.training_steps import CONTESTANTS, step_of
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify


def seconds_of_steps(model: nn.Module, names: Sequence[str], windows: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each contestant in each of ``rounds``, after one that is not counted.

    Args:
        model: pruned; it is copied for each.
        names: of contestants.
        windows: token ids [batches, batch, seq_len], taken in turn.
        rounds: steps of each contestant.
    """
    models = {name: copy.deepcopy(model) for name in names}
    steps = {name: step_of(name, own) for name, own in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        batch = windows[number % len(windows)]
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - start)
    for own in models.values():
        check_masks(own)
    return {name: times[1:] for name, times in seconds.items()}


def peak_of_steps(model: nn.Module, name: str, windows: Tensor, *, steps: int = 2) -> int:
    """Peak bytes above the weights of a contestant with gradient checkpointing."""
    own = copy.deepcopy(model)

    def train() -> None:
        step = step_of(name, own, checkpointing=True)  # its adapters count
        for number in range(steps):
            step(windows[number % len(windows)])

    return peak_bytes(train)


@benchmark(
    "train-speed",
    "training tokens/s and memory of PERP against full fine-tuning with the masks held",
    takes=("model", "repeats"),
)
def train_speed(options: Options) -> Iterator[Measured]:
    """Steps of 2 x 512 tokens in 10 rounds; ``quick``: of 2 x 128 in 2."""
    model, _ = load_causal_lm(options.model)
    sparsify(model, "50%", "magnitude", progress=False)
    batch, seq_len = 2, 128 if options.quick else 512
    rounds = options.repeats or (2 if options.quick else 10)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, vocabulary, (4, batch, seq_len), generator=generator)
    parameters = {"model": model_label(options.model), "batch": batch, "seq_len": seq_len, "pattern": "50%"}
    if options.wants("speed"):
        seconds = seconds_of_steps(model, list(CONTESTANTS), windows, rounds)
        speeds = {name: {"tokens_per_s": batch * seq_len / statistics.median(times)} for name, times in seconds.items()}
        yield Measured("speed", parameters, speeds, seconds, baseline="full")
    if options.wants("memory"):
        peaks = {name: peak_of_steps(model, name, windows) for name in CONTESTANTS}
        metrics = {
            name: {"peak_bytes": peak, "peak_ratio_to_full": peak / peaks["full"]} for name, peak in peaks.items()
        }
        yield Measured("memory above the weights, with checkpointing", parameters, metrics)
