"""Training speed and memory of PERP against full fine-tuning with the mask applied again after each step.

    python -m trisparse.bench.train_speed [--model FOLDER] [--rounds 10] [--json]

Every contestant has its own copy of SmolLM2-135M, pruned to 50% by magnitude. They take one optimizer step of 2 x 512
tokens each in turn, in one process, so that whatever else the machine does slows all of them. Speeds are medians over
the rounds, and a ratio is the median of the ratios to "full" in the same round. All have torch's fused AdamW and no
clipping of gradients. Memory is the most bytes that torch holds at once in two steps (adapters, gradients, optimizer
state, activations) beyond the weights, with gradient checkpointing, counted by its profiler.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.bench.masked_lora import peak_bytes
from trisparse.bench.smollm2 import load_smollm2
from trisparse.bench.training_steps import CONTESTANTS, step_of
from trisparse.env import environment
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify


def speeds(
    model: nn.Module,
    names: Sequence[str],
    windows: Tensor,
    rounds: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Tokens/s of each contestant, and the ratio to "full", over ``rounds`` after one that is not counted.

    Args:
        model: pruned; it is copied for each.
        names: of contestants, "full" among them.
        windows: token ids [batches, batch, seq_len], taken in turn.
        rounds: steps of each contestant.
        on_round: called after each round.
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
        on_round(number)
    for own in models.values():
        check_masks(own)
    tokens = windows[0].numel()
    full = seconds["full"][1:]
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(times[1:]),
            "ratio": statistics.median(f / t for f, t in zip(full, times[1:], strict=True)),
        }
        for name, times in seconds.items()
    }


def memory(model: nn.Module, names: Sequence[str], windows: Tensor, *, steps: int = 2) -> dict[str, dict[str, float]]:
    """Peak bytes above the weights of each contestant with gradient checkpointing, and the ratio to "full"."""
    found: dict[str, int] = {}
    for name in names:
        own = copy.deepcopy(model)

        def train(name: str = name, own: nn.Module = own) -> tuple[Tensor, ...]:
            step = step_of(name, own, checkpointing=True)
            for number in range(steps):
                step(windows[number % len(windows)])
            return ()

        found[name] = peak_bytes(train)
    return {name: {"peak_bytes": value, "ratio": value / found["full"]} for name, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the comparison, or give it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.train_speed", description=__doc__)
    parser.add_argument("--model", help="folder of a causal language model; SmolLM2-135M by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS)[1:], default=list(CONTESTANTS)[1:])
    parser.add_argument("--no-memory", action="store_true", help="measure the speed alone")
    parser.add_argument("--no-speed", action="store_true", help="measure the memory alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    model: Any
    if options.model is None:
        model, _ = load_smollm2()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    sparsify(model, "50%", "magnitude", progress=False)
    names = ["full", *options.only]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, vocabulary, (4, options.batch, options.seq_len), generator=generator)
    result: dict[str, Any] = {"batch": options.batch, "seq_len": options.seq_len, "rounds": options.rounds}
    if not options.no_speed:
        result["speed"] = speeds(model, names, windows, options.rounds)
    if not options.no_memory:
        result["memory"] = memory(model, names, windows)
    result["environment"] = environment()
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{options.batch} x {options.seq_len} tokens a step, {torch.get_num_threads()} threads")
    for name in names:
        cells = [f"{name:26}"]
        if "speed" in result:
            row = result["speed"][name]
            cells.append(f"{row['tokens_per_second']:8.1f} tokens/s  {row['ratio']:.2f}x of full")
        if "memory" in result:
            row = result["memory"][name]
            cells.append(f"{row['peak_bytes'] / 2**20:8.0f} MiB above the weights  {row['ratio']:.2f}x of full")
        print("  ".join(cells))


if __name__ == "__main__":
    main()
