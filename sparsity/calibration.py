"""Calibration: run the blocks of a model on sample data and measure what reaches the weights.

Three ways to propagate (``propagate=``):

- ``"block"`` (Wanda, SparseGPT): measure a block with its dense weights, prune it, feed the next block with the
  pruned block's output; two passes.
- ``"dense"``: all statistics come from the dense model; one pass.
- ``"linear"``: each linear is pruned on its first call, so that later ones in the same block see it; one pass,
  with the whole calibration set as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trisparse.sparsity.capture import Batch, BlockCall, BlocksNotChainedError, capture, probe
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.statistics import InputStatistics, experts_one_by_one
from trisparse.sparsity.targets import Block, Target, Targets

Propagate = Literal["block", "dense", "linear"]
PROPAGATE: tuple[str, ...] = get_args(Propagate)

Step = tuple[list[Target], InputStatistics]


def walk(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    *,
    propagate: Propagate = "block",
    dtype: torch.dtype | None = None,
    on_use: Callable[[Target, Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Yield the targets of each block with their statistics, in calling order; prune them before going on.

    Targets outside the blocks come first, with statistics from the dense model. Memory: the hidden states of
    the calibration set, and one block's activations for one micro-batch.

    Args:
        model: the model, in any mode; it is run in eval mode without gradients.
        targets: from ``find_targets``.
        batches: keyword arguments of the model's forward, one dict for each micro-batch.
        propagate: see the module's docstring.
        dtype: compute dtype; None takes bf16 where the device has fast bf16 and a block is all fp32.
        on_use: for ``"linear"``: (target, X [parts, cols]) -> bool mask of the parameter to run on with.

    Raises:
        BlocksNotChainedError: the model does something between its blocks; ``propagate="dense"`` works.
    """
    was_training = model.training
    model.eval()
    try:
        with experts_one_by_one(model):
            yield from _walk(model, targets, batches, propagate, dtype, on_use)
    finally:
        model.train(was_training)


@torch.no_grad()  # as a decorator, it is off while the caller has its turn
def _walk(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    propagate: Propagate,
    dtype: torch.dtype | None,
    on_use: Callable[[Target, Tensor], Tensor] | None,
) -> Iterator[Step]:
    if dtype is None and bf16_is_fast(next(model.parameters()).device):
        dtype = torch.bfloat16
    stacks: dict[int, list[Block]] = {}
    inside: dict[int, list[Target]] = {}
    for index, block in enumerate(targets.blocks):
        stacks.setdefault(block.stack, []).append(block)
        inside[id(block)] = [target for target in targets.found if target.block == index]
    stacks = {stack: blocks for stack, blocks in stacks.items() if any(inside[id(b)] for b in blocks)}
    chains = {stack: probe(model, blocks, batches[0]) for stack, blocks in stacks.items()}
    for chain in chains.values():
        if chain.broken_before and propagate != "dense":
            raise BlocksNotChainedError(
                f"the model changes the hidden states before {chain.broken_before}, so its blocks cannot be pruned "
                "one after the other; use propagate='dense'"
            )
    if outside := [target for target in targets.found if target.block is None]:
        yield outside, _measure_whole_model(model, outside, batches)
    for stack, blocks in stacks.items():
        if chains[stack].broken_before:
            together = [target for block in blocks for target in inside[id(block)]]
            yield together, _measure_whole_model(model, together, batches)
            continue
        calls, hidden = capture(model, blocks, batches, chains[stack])
        valid = [_valid_tokens(batch) for batch in batches]
        for block, block_calls in zip(blocks, calls, strict=True):
            group = inside[id(block)]
            statistics = InputStatistics(group)
            before_use = _prune_on_use(statistics, on_use) if on_use is not None else None
            with (
                _computing(block.module, dtype, copy=on_use is not None) as cast,
                statistics.observing(before_use),
            ):
                entering = [cast(h) for h in hidden]
                hidden = []
                for call, x, tokens in zip(block_calls, entering, valid, strict=True):
                    with statistics.call(tokens):
                        hidden.append(_cast_call(call, cast).run(block.module, x))
            if group:
                yield group, statistics
            if propagate == "block" and group and block is not blocks[-1]:
                with _computing(block.module, dtype) as cast:
                    calls_and_inputs = zip(block_calls, entering, strict=True)
                    hidden = [_cast_call(call, cast).run(block.module, x) for call, x in calls_and_inputs]


def _cast_call(call: BlockCall, cast: Callable[[Any], Any]) -> BlockCall:
    return BlockCall(cast(call.args), cast(call.kwargs), call.slot)


def _prune_on_use(statistics: InputStatistics, on_use: Callable[[Target, Tensor], Tensor]) -> Callable[[Target], None]:
    done: set[str] = set()

    def before_use(target: Target) -> None:
        x = statistics.rms(target)
        if x is not None and target.name not in done:
            done.add(target.name)
            target.weight.data.masked_fill_(~on_use(target, x), 0)

    return before_use


def _measure_whole_model(model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]) -> InputStatistics:
    statistics = InputStatistics(targets)
    with statistics.observing():
        for batch in batches:
            with statistics.call(_valid_tokens(batch)):
                model(**batch)
    return statistics


def _valid_tokens(batch: Batch) -> Tensor | None:
    """Bool [batch, tokens], False where the batch is padded; None if it is not."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


@contextmanager
def _computing(block: nn.Module, dtype: torch.dtype | None, *, copy: bool = False) -> Iterator[Callable[[Any], Any]]:
    """Run ``block`` with its parameters in ``dtype`` (or on a ``copy`` of them); they come back when it closes.

    Yields a function that casts floating-point tensors (in lists, tuples and dicts) to that dtype. Blocks that
    are not fp32 throughout, or hold statistics (BatchNorm), keep their own dtypes.
    """
    parameters = list(block.parameters())
    if any(p.dtype != torch.float32 for p in parameters) or any(b.is_floating_point() for b in block.buffers()):
        dtype = None
    originals = [p.data for p in parameters]

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _cast(value, dtype) if dtype is not None else value
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        return value

    try:
        for p in parameters:
            p.data = p.data.to(dtype or p.dtype, copy=copy)
        yield cast
    finally:
        for p, original in zip(parameters, originals, strict=True):
            p.data = original


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype`` if floating point; the large negative numbers of attention masks stay finite."""
    if not value.is_floating_point() or value.dtype == dtype:
        return value
    return value.clamp(min=torch.finfo(dtype).min, max=torch.finfo(dtype).max).to(dtype)
