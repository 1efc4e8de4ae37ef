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
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from trisparse.sparsity.capture import Batch, BlockCall, capture, probe
from trisparse.sparsity.distributed import ALONE, Processes
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.statistics import InputStatistics, experts_one_by_one
from trisparse.sparsity.targets import Block, Target, Targets

Propagate = Literal["block", "dense", "linear"]
PROPAGATE: tuple[str, ...] = get_args(Propagate)


class Hidden(Protocol):
    """Hidden states by micro-batch: a list, or what keeps them elsewhere."""

    def __getitem__(self, index: int, /) -> Tensor: ...
    def __setitem__(self, index: int, value: Tensor, /) -> None: ...


Step = tuple[list[Target], InputStatistics]


def walk(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    *,
    propagate: Propagate = "block",
    dtype: torch.dtype | None = None,
    on_use: Callable[[Target, Tensor], Tensor] | None = None,
    processes: Processes = ALONE,
) -> Generator[Step]:
    """Yield the targets of each block with their statistics, in calling order; prune them before going on.

    Targets outside the blocks come first, with statistics from the dense model. Memory: the hidden states of
    the calibration set, and one block's activations for one micro-batch.

    Args:
        model: the model, in any mode; it is run in eval mode without gradients.
        targets: from ``find_targets``.
        batches: keyword arguments of the model's forward, one dict for each micro-batch; with several processes, this
            one's share.
        propagate: see the module's docstring.
        dtype: compute dtype; None takes bf16 where the device is fast at it, for blocks that are all fp32 and run
            in it.
        on_use: for ``"linear"``: (target, X [parts, cols]) -> bool mask of the parameter to run on with.
        processes: those that call this together; statistics are added up over all of them.

    Raises:
        BlocksNotChainedError: the model does something between its blocks; ``propagate="dense"`` works.
    """
    runner = BlockRunner(propagate, dtype, next(model.parameters()).device, on_use=on_use, processes=processes)
    with evaluating(model), experts_one_by_one(model):
        yield from _walk(model, targets, batches, runner)


@torch.no_grad()  # as a decorator, it is off while the caller has its turn
def _walk(model: nn.Module, targets: Targets, batches: Sequence[Batch], runner: BlockRunner) -> Generator[Step]:
    stacks, inside = stacks_with_targets(targets)
    chains = probe(model, stacks, batches[0])
    if runner.propagate != "dense":
        for chain in chains.values():
            chain.check()
    if outside := [target for target in targets.found if target.block is None]:
        yield outside, _measure_whole_model(model, outside, batches, runner.processes)
    for stack in stacks.keys() - chains.keys():
        unreached = [target for block in stacks[stack] for target in inside[id(block)]]
        yield unreached, InputStatistics(unreached)
    valid = [valid_tokens(batch) for batch in batches]
    for stack, chain in chains.items():
        blocks = stacks[stack]
        if chain.broken_at:
            together = [target for block in blocks for target in inside[id(block)]]
            yield together, _measure_whole_model(model, together, batches, runner.processes)
            continue
        calls, hidden = capture(model, blocks, batches, chain)
        for block, block_calls in zip(blocks, calls, strict=True):
            group = inside[id(block)]
            statistics = runner.measure(block.module, group, block_calls, hidden, valid)
            if group:
                yield group, statistics
            if runner.runs_again(group) and block is not blocks[-1]:
                runner.run(block.module, block_calls, hidden)


def stacks_with_targets(targets: Targets) -> tuple[dict[int, list[Block]], dict[int, list[Target]]]:
    """The stacks of blocks that hold targets, and the targets inside each block by its ``id``."""
    stacks: dict[int, list[Block]] = {}
    inside: dict[int, list[Target]] = {}
    for index, block in enumerate(targets.blocks):
        stacks.setdefault(block.stack, []).append(block)
        inside[id(block)] = [target for target in targets.found if target.block == index]
    return {stack: blocks for stack, blocks in stacks.items() if any(inside[id(b)] for b in blocks)}, inside


class BlockRunner:
    """Runs the blocks of a chain one after the other on the calibration set.

    Hidden states are replaced where they are, a micro-batch at a time, so that they are held once.

    Attributes:
        propagate: see the module's docstring.
        dtype: compute dtype of fp32 blocks from here on; None is their own.
        processes: those that calibrate together.
    """

    def __init__(
        self,
        propagate: Propagate,
        dtype: torch.dtype | None,
        device: torch.device,
        *,
        on_use: Callable[[Target, Tensor], Tensor] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.propagate = propagate
        self.dtype = torch.bfloat16 if dtype is None and bf16_is_fast(device) else dtype
        self.processes = processes
        self._automatic = dtype is None
        self._on_use = on_use

    def measure(
        self,
        block: nn.Module,
        group: Sequence[Target],
        calls: Sequence[BlockCall],
        hidden: Hidden,
        valid: Sequence[Tensor | None],
    ) -> InputStatistics:
        """Statistics of the targets ``group`` of ``block``; ``hidden`` then holds what leaves it.

        Unless :meth:`runs_again` says that the pruned block is to be run on ``hidden``, which stays for that.
        """
        leaving = None if self.runs_again(group) else hidden
        try:
            statistics = self._measure(block, group, calls, hidden, leaving, valid)
        except _FirstCallFailed as failed:
            error: RuntimeError = failed.args[0]
            if not self._automatic or self.dtype is None:
                raise error from None
            self.dtype = None  # the block's own code mixes dtypes: it runs in its own from here on
            try:
                statistics = self._measure(block, group, calls, hidden, leaving, valid)
            except _FirstCallFailed as again:
                raise again.args[0] from None
        statistics.add_up(self.processes)
        return statistics

    def runs_again(self, group: Sequence[Target]) -> bool:
        """Whether the next block is fed by this one as it is when ``group`` is pruned."""
        return self.propagate == "block" and bool(group)

    def run(self, block: nn.Module, calls: Sequence[BlockCall], hidden: Hidden) -> None:
        """Replace ``hidden`` by what leaves ``block``."""
        with _computing(block, self.dtype) as (cast, _):
            for index, call in enumerate(calls):
                hidden[index] = _cast_call(call, cast).run(block, cast(hidden[index]))

    def _measure(
        self,
        block: nn.Module,
        group: Sequence[Target],
        calls: Sequence[BlockCall],
        hidden: Hidden,
        leaving: Hidden | None,
        valid: Sequence[Tensor | None],
    ) -> InputStatistics:
        statistics = InputStatistics(group)
        with _computing(block, self.dtype, copy=self._on_use is not None) as (cast, originals):
            before_use = _prune_on_use(statistics, self._on_use, originals) if self._on_use is not None else None
            with statistics.observing(before_use):
                for index, (call, tokens) in enumerate(zip(calls, valid, strict=True)):
                    try:
                        with statistics.call(tokens):
                            output = _cast_call(call, cast).run(block, cast(hidden[index]))
                    except RuntimeError as error:
                        if index == 0:  # nothing is lost yet
                            raise _FirstCallFailed(error) from error
                        raise
                    if leaving is not None:
                        leaving[index] = output
        return statistics


class _FirstCallFailed(Exception):  # noqa: N818 - carries the error to where it is handled
    """A block failed on its first micro-batch, before any hidden state was replaced."""


def _cast_call(call: BlockCall, cast: Callable[[Any], Any]) -> BlockCall:
    return BlockCall(cast(call.args), cast(call.kwargs), call.slot)


def _prune_on_use(
    statistics: InputStatistics, on_use: Callable[[Target, Tensor], Tensor], originals: dict[int, Tensor]
) -> Callable[[Target], None]:
    done: set[str] = set()

    def before_use(target: Target) -> None:
        x = statistics.rms(target)
        if x is not None and target.name not in done:
            done.add(target.name)
            weight = target.weight
            copy, weight.data = weight.data, originals[id(weight)]  # rank the weights, not their bf16 copies
            try:
                keep = on_use(target, x)
            finally:
                weight.data = copy
            copy.masked_fill_(~keep, 0)

    return before_use


def _measure_whole_model(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch], processes: Processes
) -> InputStatistics:
    statistics = InputStatistics(targets)
    with statistics.observing():
        for batch in batches:
            with statistics.call(valid_tokens(batch)):
                model(**batch)
    statistics.add_up(processes)
    return statistics


def valid_tokens(batch: Batch) -> Tensor | None:
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
