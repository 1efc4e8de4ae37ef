"""How a model calls its blocks: the arguments of every call, captured from the model's own forward.

Nothing is assumed about the architecture. A probe with one sample shows what each block returns and whether
blocks feed each other; then the calibration set is passed by the blocks without computing them, and each one's
arguments (masks, position embeddings, ...) are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.sparsity.targets import Block

Batch = dict[str, Any]  # keyword arguments of the model's forward


class BlocksNotChainedError(ValueError):
    """The blocks of the model do not simply feed each other."""


@dataclass
class BlockCall:
    """Arguments of one call of a block without its hidden states; ``slot`` is where those go."""

    args: list[Any]
    kwargs: dict[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output hidden states of ``block`` for ``hidden``."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return first_tensor(block(*args, **kwargs))


@dataclass
class Chain:
    """What a probe found out about a stack of blocks.

    Attributes:
        returned: for each block, the class of its output and what follows the hidden states in it.
        passes_through: whether the model can run with the blocks left out, to record their arguments.
        broken_before: the first block whose input is not the output of the block before it, or None.
    """

    returned: list[tuple[type, tuple[Any, ...]]] = field(default_factory=list)
    passes_through: bool = True
    broken_before: str | None = None


class _LastBlockReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after the last block: what follows it is not needed."""


def probe(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> Chain:
    """Run the first sample of ``batch`` up to the last of ``blocks`` and watch what they take and return.

    Raises:
        BlocksNotChainedError: a block is called without hidden states, more than once, or not at all.
    """
    chain = Chain()
    last: list[Tensor] = []

    def record(index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(chain.returned):
            raise BlocksNotChainedError(
                f"the model does not call its blocks in order, once each ({blocks[index].name})"
            )
        hidden = _hidden(args, kwargs)
        if last and not _same(hidden, last.pop()) and chain.broken_before is None:
            chain.broken_before = blocks[index].name
        output = real(*args, **kwargs)
        rest = () if isinstance(output, Tensor) else tuple(output[1:])
        chain.returned.append((type(output), rest))
        last.append(first_tensor(output))
        if index + 1 < len(blocks):
            chain.passes_through &= last[0].shape == hidden.shape and all(item is None for item in rest)
            return output
        raise _LastBlockReached

    _run(model, blocks, [_first_sample(batch)], record)
    return chain


def capture(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], chain: Chain
) -> tuple[list[list[BlockCall]], list[Tensor]]:
    """Record every call of ``blocks``.

    Returns:
        The calls, [block][micro-batch], and the hidden states that enter the first block, one for each batch.
    """
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    entering: list[Tensor] = []

    def record(index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot, hidden = _slot(args, kwargs), _hidden(args, kwargs)
        call = BlockCall(list(args), dict(kwargs), slot)
        if isinstance(slot, int):
            call.args[slot] = None
        else:
            del call.kwargs[slot]
        calls[index].append(_shared(call, calls[index][0]) if calls[index] else call)
        if index == 0:
            entering.append(hidden)
        if index + 1 == len(blocks):
            raise _LastBlockReached
        if not chain.passes_through:
            return real(*args, **kwargs)
        kind, rest = chain.returned[index]
        return hidden if issubclass(kind, Tensor) else (hidden, *rest)

    _run(model, blocks, batches, record)
    return calls, entering


def first_tensor(output: Any) -> Tensor:
    """Hidden states in a block's output, which is a tensor or a tuple that starts with it."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _run(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], record: Callable[..., Any]) -> None:
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_replaced_forward(block.module, index, record))
        for batch in batches:
            try:
                model(**batch)
            except _LastBlockReached:
                continue
            raise BlocksNotChainedError(f"the model's forward never called {blocks[-1].name}")


@contextmanager
def _replaced_forward(module: nn.Module, index: int, record: Callable[..., Any]) -> Iterator[None]:
    real = module.forward
    had_own = "forward" in module.__dict__
    module.forward = lambda *args, **kwargs: record(index, real, args, kwargs)
    try:
        yield
    finally:
        if had_own:
            module.forward = real
        else:
            del module.forward


def _slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    if args and isinstance(args[0], Tensor):
        return 0
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return name
    raise BlocksNotChainedError("a block of the model is called without hidden states")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    slot = _slot(args, kwargs)
    hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
    return hidden


def _first_sample(batch: Batch) -> Batch:
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(sizes) != 1:
        return batch
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _shared(call: BlockCall, first: BlockCall) -> BlockCall:
    """Take equal tensors from the first micro-batch's call, so that masks and positions are held once."""
    args = [_share(a, b) for a, b in zip(call.args, first.args, strict=True)]
    kwargs = {name: _share(value, first.kwargs.get(name)) for name, value in call.kwargs.items()}
    return BlockCall(args, kwargs, call.slot)


def _share(value: Any, first: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(first, Tensor):
        return first if _same(value, first) else value
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        return tuple(_share(a, b) for a, b in zip(value, first, strict=True))
    return value
