"""Calibration: run the blocks of a model on sample data and measure what reaches the weights.

Three ways to propagate (``propagate=``):

- ``"block"`` (Wanda, SparseGPT): measure a block with its dense weights, prune it, feed the next block with the
  pruned block's output; two passes.
- ``"dense"``: all statistics come from the dense model; one pass.
- ``"linear"``: each linear is pruned on its first call, so that later ones in the same block see it; one pass,
  with the whole calibration set as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trisparse.sparsity.capture import Batch, BlockCall, capture, probe
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.statistics import InputStatistics, experts_one_by_one
from trisparse.sparsity.targets import Block, Target, Targets

Propagate = Literal["block", "dense", "linear"]
PROPAGATE: tuple[str, ...] = get_args(Propagate)

Step = tuple[list[Target], InputStatistics]
OnUse = Callable[[Target, InputStatistics], Tensor]


def walk(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    *,
    propagate: Propagate = "block",
    dtype: torch.dtype | None = None,
    on_use: OnUse | None = None,
    hessians: bool = False,
) -> Generator[Step]:
    """Yield the targets of each block with their statistics, in calling order; prune them before going on.

    Targets outside the blocks come first, with statistics from the dense model. Memory: the hidden states of
    the calibration set, and one block's activations for one micro-batch.

    Args:
        model: the model, in any mode; it is run in eval mode without gradients.
        targets: from ``find_targets``.
        batches: keyword arguments of the model's forward, one dict for each micro-batch.
        propagate: see the module's docstring.
        dtype: compute dtype; None takes bf16 where the device is fast at it, for blocks that are all fp32 and run
            in it.
        on_use: for ``"linear"``: (target, statistics so far) -> the pruned parameter, to run on with.
        hessians: also sum the Hessians of the targets' inputs, 4 cols² bytes for each input of a block.

    Raises:
        BlocksNotChainedError: the model does something between its blocks; ``propagate="dense"`` works.
    """
    with evaluating(model), experts_one_by_one(model):
        yield from _walk(model, targets, batches, propagate, dtype, on_use, hessians)


@torch.no_grad()  # as a decorator, it is off while the caller has its turn
def _walk(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    propagate: Propagate,
    dtype: torch.dtype | None,
    on_use: OnUse | None,
    hessians: bool,
) -> Generator[Step]:
    automatic = dtype is None
    if automatic and bf16_is_fast(next(model.parameters()).device):
        dtype = torch.bfloat16
    stacks: dict[int, list[Block]] = {}
    inside: dict[int, list[Target]] = {}
    for index, block in enumerate(targets.blocks):
        stacks.setdefault(block.stack, []).append(block)
        inside[id(block)] = [target for target in targets.found if target.block == index]
    stacks = {stack: blocks for stack, blocks in stacks.items() if any(inside[id(b)] for b in blocks)}
    chains = probe(model, stacks, batches[0])
    if propagate != "dense":
        for chain in chains.values():
            chain.check()
    if outside := [target for target in targets.found if target.block is None]:
        yield outside, _measure_whole_model(model, outside, batches, hessians)
    for stack in stacks.keys() - chains.keys():
        unreached = [target for block in stacks[stack] for target in inside[id(block)]]
        yield unreached, InputStatistics(unreached)
    for stack, chain in chains.items():
        blocks = stacks[stack]
        if chain.broken_at:
            together = [target for block in blocks for target in inside[id(block)]]
            yield together, _measure_whole_model(model, together, batches, hessians)
            continue
        calls, hidden = capture(model, blocks, batches, chain)
        valid = [_valid_tokens(batch) for batch in batches]
        for block, block_calls in zip(blocks, calls, strict=True):
            group = inside[id(block)]
            try:
                statistics, leaving = _measure(block.module, group, block_calls, hidden, valid, dtype, on_use, hessians)
            except RuntimeError:
                if not automatic or dtype is None:
                    raise
                dtype = None  # the block's own code mixes dtypes: it runs in its own from here on
                statistics, leaving = _measure(block.module, group, block_calls, hidden, valid, dtype, on_use, hessians)
            if group:
                yield group, statistics
            if propagate == "block" and group and block is not blocks[-1]:
                with _computing(block.module, dtype) as (cast, _):
                    pairs = zip(block_calls, hidden, strict=True)
                    leaving = [_cast_call(call, cast).run(block.module, cast(x)) for call, x in pairs]
            hidden = leaving


def _measure(
    block: nn.Module,
    group: Sequence[Target],
    calls: Sequence[BlockCall],
    hidden: Sequence[Tensor],
    valid: Sequence[Tensor | None],
    dtype: torch.dtype | None,
    on_use: OnUse | None,
    hessians: bool,
) -> tuple[InputStatistics, list[Tensor]]:
    """Run one block on all micro-batches: statistics of its targets, and the hidden states that leave it."""
    statistics = InputStatistics(group, hessians=hessians)
    leaving = []
    with _computing(block, dtype, copy=on_use is not None) as (cast, originals):
        before_use = _prune_on_use(statistics, on_use, originals) if on_use is not None else None
        with statistics.observing(before_use):
            for call, x, tokens in zip(calls, hidden, valid, strict=True):
                with statistics.call(tokens):
                    leaving.append(_cast_call(call, cast).run(block, cast(x)))
    return statistics, leaving


def _cast_call(call: BlockCall, cast: Callable[[Any], Any]) -> BlockCall:
    return BlockCall(cast(call.args), cast(call.kwargs), call.slot)


def _prune_on_use(statistics: InputStatistics, on_use: OnUse, originals: dict[int, Tensor]) -> Callable[[Target], None]:
    done: set[str] = set()

    def before_use(target: Target) -> None:
        if statistics.rms(target) is not None and target.name not in done:
            done.add(target.name)
            weight = target.weight
            copy, weight.data = weight.data, originals[id(weight)]  # rank the weights, not their bf16 copies
            try:
                pruned = on_use(target, statistics)
            finally:
                weight.data = copy
            copy.copy_(pruned)

    return before_use


def _measure_whole_model(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch], hessians: bool
) -> InputStatistics:
    statistics = InputStatistics(targets, hessians=hessians)
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
def _computing(
    block: nn.Module, dtype: torch.dtype | None, *, copy: bool = False
) -> Iterator[tuple[Callable[[Any], Any], dict[int, Tensor]]]:
    """Run ``block`` with its parameters in ``dtype`` (or on a ``copy`` of them); they come back when it closes.

    Yields a function that casts floating-point tensors (in lists, tuples and dicts) to that dtype, and the
    parameters' own values by ``id`` of the parameter. Blocks that are not fp32 throughout keep their own dtypes;
    those that hold statistics (BatchNorm) stay fp32.
    """
    parameters = list(block.parameters())
    if any(p.dtype != torch.float32 for p in parameters):
        dtype = None
    elif dtype is None or any(b.is_floating_point() for b in block.buffers()):
        dtype = torch.float32  # the hidden states may come from a block that ran in bf16
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
        yield cast, {id(p): original for p, original in zip(parameters, originals, strict=True)}
    finally:
        for p, original in zip(parameters, originals, strict=True):
            p.data = original


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype`` if floating point; the large negative numbers of attention masks stay finite."""
    if not value.is_floating_point() or value.dtype == dtype:
        return value
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(value.dtype).max:
        value = value.clamp(limits.min, limits.max)
    return value.to(dtype)
