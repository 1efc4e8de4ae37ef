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
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.bench.masked_lora import peak_bytes
from trisparse.bench.smollm2 import load_smollm2
from trisparse.env import environment
from trisparse.retrain.adapters import Adapted
from trisparse.retrain.batch_settings import BatchSettings
from trisparse.retrain.groups import parameter_groups
from trisparse.retrain.loop import Watch, trainer_for, with_labels
from trisparse.retrain.perp import PERPConfig
from trisparse.sparsity.mask import check_masks, masks
from trisparse.sparsity.sparsify import sparsify

# groups and variant of each; None is full fine-tuning, the usual code
CONTESTANTS: dict[str, tuple[tuple[str, ...], str] | None] = {
    "full": None,
    "lora": (("lora",), "lora"),
    "mask_lora + norms + head": (("norms", "head", "lora"), "mask_lora"),
    "norms only": (("norms",), "mask_lora"),
}
Step = Callable[[Tensor], None]


def usual_step(model: Any, *, checkpointing: bool) -> Step:
    """Full fine-tuning as it is usually written: every parameter trains, then the mask is multiplied on."""
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    pruned = [(model.get_parameter(name), mask.dense().to(torch.float32)) for name, mask in masks(model).items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step(windows: Tensor) -> None:
        model(**with_labels(windows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, keep in pruned:
                param.mul_(keep)

    return step


def perp_step(model: Any, groups: tuple[str, ...], variant: str, *, checkpointing: bool) -> Step:
    """A step of ours: the adapters and the loss of ``retrain``."""
    batch, seq_len = 2, 512
    config = PERPConfig(groups, variant, merge=False, steps=1, batch_size=batch, seq_len=seq_len, dtype="fp32")  # type: ignore[arg-type]
    adapted = Adapted(model, parameter_groups(model), groups, config.rank, config.alpha, config.variant)
    adapted.switch_cache_off()
    module = adapted.module.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(1, progress=False)
        trainer: Any = trainer_for(
            module, torch.zeros(batch, seq_len).long(), config, watch, batch=BatchSettings(batch, 1),
            learning_rate=1e-5, folder=folder, dtype=None,
        )  # fmt: skip
    trained = [param for param in module.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step(windows: Tensor) -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(module, with_labels(windows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_of(name: str, model: Any, *, checkpointing: bool = False) -> Step:
    """The training step of a contestant on ``model``, which it takes for itself."""
    chosen = CONTESTANTS[name]
    if chosen is None:
        return usual_step(model, checkpointing=checkpointing)
    return perp_step(model, *chosen, checkpointing=checkpointing)


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
