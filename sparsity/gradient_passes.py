"""Backward passes that fold each gradient into a sum of squares and free it at once.

``whole_model`` runs the model's own forward and backward, sequence by sequence, with every repeated block
checkpointed: the sums of all targets stay in memory, and of the activations one block's.
``block_by_block`` has the blocks outside and the sequences inside: all sequences go forward through one block after
the other, then, from the head, backward through one block after the other, each recomputed from the hidden states
that entered it. Those wait in a temporary file (blocks x tokens x hidden size). One block's sums are in memory at a
time, in fp32 whatever they are stored in, and finished when the pass leaves the block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trisparse.sparsity.capture import (
    Batch,
    BlockCall,
    BlocksNotChainedError,
    Chain,
    capture,
    hidden_argument,
    probe,
    replaced_forward,
)
from trisparse.sparsity.targets import Block, Target, Targets

Loss = Callable[[nn.Module, Batch], Tensor]
LossParts = Callable[[nn.Module, Batch], Iterable[Tensor]]  # parts that add up to the loss, made one at a time
Computing = Callable[[], AbstractContextManager[Any]]
Store = Callable[[Target, Tensor | None], None]  # takes a target and its norm, fp32 in the parameter's layout

_SAME_LOSS = 1e-5  # relative: both come from the same operations, but atomic additions on a GPU have no fixed order


class SquareSums:
    """Sums over sequences of the squared gradients of targets, fp32, in the layout of the parameters."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def collecting(self, targets: Sequence[Target]) -> Iterator[None]:
        """Let the weights of ``targets`` require gradients, and fold in each that a backward pass makes."""
        with ExitStack() as stack:
            for target in targets:
                weight = target.weight
                stack.callback(weight.requires_grad_, False)
                weight.requires_grad_(True)
                stack.callback(weight.register_post_accumulate_grad_hook(partial(self._fold, target.name)).remove)
            yield

    def take(self, target: Target) -> Tensor | None:
        """The root of the sum, fp32, in the parameter's layout; it is no longer held here. None: no gradient came."""
        total = self._sums.pop(target.name, None)
        return None if total is None else total.sqrt_()

    def _fold(self, name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        gradient = gradient.detach()
        # Checked here and not on the sum, so that the first layer on the way back from the loss is the one named.
        if not torch.isfinite(torch.linalg.vector_norm(gradient, dtype=torch.float32)):
            raise ValueError(f"the gradient of {name} is NaN or Inf, or its square overflows")
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(gradient, dtype=torch.float32)
        gradient = gradient.float()
        self._sums[name].addcmul_(gradient, gradient)


def whole_model(
    model: nn.Module,
    targets: Targets,
    sequences: Sequence[Batch],
    loss: Loss,
    computing: Computing,
    store: Store,
    advance: Callable[[float], None],
) -> None:
    """Measure all targets at once (see the module's docstring). ``advance`` is given shares that add up to 1.

    Raises:
        ValueError: a loss or a gradient is not finite, or the loss does not depend on the targets.
    """
    sums = SquareSums()
    with torch.enable_grad(), sums.collecting(targets.found), ExitStack() as replaced:
        for block in targets.blocks:
            replaced.enter_context(replaced_forward(block.module, _checkpointed))
        for index, sequence in enumerate(sequences):
            with computing():
                value = _checked(loss(model, sequence), index)
            value.backward()
            del value
            advance(1 / len(sequences))
    for target in targets.found:
        store(target, sums.take(target))


def _checkpointed(real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # No random numbers to bring back: the model is in eval mode. They would cost a copy of the generators' states.
    return checkpoint(real, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _checked(value: Tensor, sequence: int) -> Tensor:
    if not torch.isfinite(value):
        raise ValueError(f"the loss of sequence {sequence} is {float(value.detach())}, so it has no gradient")
    if not value.requires_grad:
        raise ValueError("the loss depends on none of the targets: the model's forward does not use them")
    return value


def block_by_block(
    model: nn.Module,
    targets: Targets,
    sequences: Sequence[Batch],
    loss: Loss,
    computing: Computing,
    store: Store,
    advance: Callable[[float], None],
    parts: LossParts | None = None,
    folder: Path | None = None,
) -> None:
    """Measure block after block, the last one first (see the module's docstring); ``advance`` as above.

    Args:
        parts: the loss in parts, so that fewer logits are in memory at once; it is given up where its sum is not the
            loss.
        folder: where the temporary file of hidden states is; None takes the system's folder for such files.

    Raises:
        BlocksNotChainedError: the model does not run its blocks one after the other, or its loss depends on them
            in another way than through the last one's output; or a target is outside the blocks or shared between them.
        ValueError: a loss or a gradient is not finite.
    """
    _check_inside(model, targets)
    with torch.no_grad(), computing():
        blocks, chain = _chain(model, targets, sequences[0])
        expected = float(loss(model, sequences[0]))
        try:
            calls, entering = capture(model, blocks, sequences, chain)
        except BlocksNotChainedError:
            raise _not_chained(f"at {chain.broken_at}") from None
    inside = [[t for t in targets.found if targets.blocks[t.block or 0] is block] for block in blocks]
    first = next(depth for depth, group in enumerate(inside) if group)
    share = 1 / (len(blocks) + 2 * (len(blocks) - first))  # forward of all; recomputation and backward of some
    with tempfile.TemporaryFile(dir=folder) as file:
        hidden = _HiddenStates(file)
        for index, x in enumerate(entering):
            hidden.write((0, index), x)
        del entering
        for depth, block in enumerate(blocks):
            for index, call in enumerate(calls[depth]):
                with torch.no_grad(), computing():
                    hidden.write((depth + 1, index), call.run(block.module, hidden.read((depth, index))))
            advance(share)
        losses: list[LossParts] = [lambda model, sequence: [loss(model, sequence)]]
        if parts is not None:
            losses.insert(0, parts)
        _through_head(model, blocks, chain, sequences, losses, computing, hidden, expected)
        for depth in reversed(range(first, len(blocks))):
            sums = SquareSums()
            with sums.collecting(inside[depth]):
                for index, call in enumerate(calls[depth]):
                    _backward(blocks[depth].module, call, hidden, (depth, index), computing, go_on=depth > first)
            for target in inside[depth]:
                store(target, sums.take(target))
            advance(2 * share)


def _through_head(
    model: nn.Module,
    blocks: Sequence[Block],
    chain: Chain,
    sequences: Sequence[Batch],
    losses: list[LossParts],
    computing: Computing,
    hidden: _HiddenStates,
    expected: float,
) -> None:
    """Put the gradient of each loss in the place of the hidden states that leave the last block.

    The model's own forward computes the loss, with blocks that compute nothing; the last one gives those states.
    A model that takes anything else from its blocks than these has another loss than ``expected`` for the first
    sequence, and is refused. Of ``losses``, the first that passes is taken.
    """
    leaving = torch.empty(0)

    def skip(depth: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind, rest = chain.returned[depth]
        x = leaving if depth + 1 == len(blocks) else hidden_argument(args, kwargs)
        return x if issubclass(kind, Tensor) else (x, *rest)

    def back(loss: LossParts, index: int) -> float:
        total, parts = 0.0, iter(loss(model, sequences[index]))
        while True:
            with torch.enable_grad(), computing():
                part = next(parts, None)
            if part is None:
                return total
            total += float(_checked(part, index).detach())
            part.backward()

    with ExitStack() as replaced:
        for depth, block in enumerate(blocks):
            replaced.enter_context(replaced_forward(block.module, partial(skip, depth)))
        for loss in losses:
            leaving = hidden.read((len(blocks), 0)).requires_grad_(True)
            if abs(back(loss, 0) - expected) <= _SAME_LOSS * abs(expected):
                break
        else:
            raise _not_chained("its loss takes more from the blocks than the last one's output")
        for index in range(len(sequences)):
            if index > 0:
                leaving = hidden.read((len(blocks), index)).requires_grad_(True)
                back(loss, index)
            assert leaving.grad is not None
            hidden.write((len(blocks), index), leaving.grad)


def _backward(
    block: nn.Module, call: BlockCall, hidden: _HiddenStates, at: tuple[int, int], computing: Computing, *, go_on: bool
) -> None:
    """Recompute a block on one sequence and go back through it.

    Where the way back goes on, the gradient takes the place of the hidden states that entered.
    """
    depth, index = at
    entering = hidden.read(at).requires_grad_(go_on)
    gradient = hidden.read((depth + 1, index))
    with torch.enable_grad(), computing():
        leaving = call.run(block, entering)
    if leaving.requires_grad:  # not so in a first block whose targets take no part
        leaving.backward(gradient)
    if go_on:
        assert entering.grad is not None
        hidden.write(at, entering.grad)


def _chain(model: nn.Module, targets: Targets, sequence: Batch) -> tuple[list[Block], Chain]:
    """The stack of blocks that has targets, and what a forward of ``sequence`` tells about it."""
    stacks: dict[int, list[Block]] = {}
    for block in targets.blocks:
        stacks.setdefault(block.stack, []).append(block)
    chosen = {targets.blocks[target.block or 0].stack for target in targets.found}
    if len(chosen) > 1:
        raise _not_chained(f"it has {len(chosen)} stacks of blocks with targets")
    chains = probe(model, {stack: stacks[stack] for stack in chosen}, sequence)
    (stack,) = chosen
    if stack not in chains:
        raise _not_chained("its forward uses none of the blocks with targets")
    chain = chains[stack]
    if chain.broken_at is not None:
        raise _not_chained(f"at {chain.broken_at}")
    for block, (_, rest) in zip(stacks[stack], chain.returned, strict=True):
        if any(item is not None for item in rest):  # a gradient may come back that way, too
            raise _not_chained(f"{block.name} returns more than its hidden states")
    return stacks[stack], chain


def _check_inside(model: nn.Module, targets: Targets) -> None:
    outside = [target.name for target in targets.found if target.block is None]
    if outside:
        raise BlocksNotChainedError(f"{outside[0]} is outside the blocks, where mode='block' ends: use mode='whole'")
    weights = {id(target.weight): target for target in targets.found}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        target = weights.get(id(parameter))
        if target and not name.startswith(f"{targets.blocks[target.block or 0].name}."):
            raise BlocksNotChainedError(
                f"{target.name} is shared with {name}, so mode='block' has its gradient in two parts: use mode='whole'"
            )


def _not_chained(why: str) -> BlocksNotChainedError:
    return BlocksNotChainedError(
        f"the model does not run its blocks one after the other, each once on the output of the one before it ({why}), "
        "so it cannot be taken back block by block; use mode='whole'"
    )


class _HiddenStates:
    """Tensors in a file, by (depth, sequence). They are read and written, not mapped: they stay out of memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = 0
        self._places: dict[tuple[int, int], tuple[int, torch.Size, torch.dtype, torch.device]] = {}

    def write(self, key: tuple[int, int], x: Tensor) -> None:
        """Put ``x`` there; over a tensor of the same shape, if there is one, in that one's dtype."""
        if key not in self._places:
            self._places[key] = self._end, x.shape, x.dtype, x.device
            self._end += x.numel() * x.element_size()
        start, shape, dtype, _ = self._places[key]
        assert x.shape == shape
        self._file.seek(start)
        self._file.write(_bytes(x.detach().to("cpu", dtype).contiguous()))

    def read(self, key: tuple[int, int]) -> Tensor:
        """The tensor that was put there, on the device that it came from."""
        start, shape, dtype, device = self._places[key]
        x = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes(x))  # type: ignore[attr-defined]
        return x.to(device)


def _bytes(x: Tensor) -> memoryview:
    data: memoryview = x.view(-1).view(torch.uint8).numpy().data
    return data
