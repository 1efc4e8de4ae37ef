"""How a model calls its blocks: the arguments of every call, captured from the model's own forward.

Nothing is assumed about the architecture. A probe with one sample shows what each block returns and whether
blocks feed each other; then the calibration set is passed by the blocks without computing them, and each one's
arguments (masks, position embeddings, ...) are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
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
        returned: for each block that was called, the class of its output and what follows the hidden states in it.
        passes_through: whether the model can run with the blocks left out, to record their arguments.
        broken_at: a block that is not simply fed by the one before it, once in a forward; or None.
    """

    returned: list[tuple[type, tuple[Any, ...]]] = field(default_factory=list)
    passes_through: bool = True
    broken_at: str | None = None

    def check(self) -> None:
        """Raise unless the blocks are called one after the other, each with the output of the one before it.

        Raises:
            BlocksNotChainedError: they are not.
        """
        if self.broken_at is not None:
            raise BlocksNotChainedError(
                f"the model does not run its blocks one after the other, each once on the output of the one before "
                f"it (at {self.broken_at}), so they cannot be pruned in turn; use propagate='dense'"
            )


class _LastBlockReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after the last block: what follows it is not needed."""


def probe(model: nn.Module, stacks: Mapping[int, Sequence[Block]], batch: Batch) -> dict[int, Chain]:
    """Run the first sample of ``batch`` through the model and watch what the blocks take and return.

    Returns:
        A chain for each stack that the forward calls, in the order of their first calls.
    """
    chains: dict[int, Chain] = {}
    last: dict[int, Tensor | None] = {}

    def watch(stack: int, index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chain = chains.setdefault(stack, Chain())
        name = stacks[stack][index].name
        output = real(*args, **kwargs)
        slot = _slot(args, kwargs)
        in_turn = index == len(chain.returned) and slot is not None and isinstance(output, Tensor | tuple | list)
        if not in_turn or slot is None:
            chain.broken_at = chain.broken_at or name
            return output
        hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        before = last.get(stack)
        if before is not None and not _same(hidden, before):
            chain.broken_at = chain.broken_at or name
        rest = () if isinstance(output, Tensor) else tuple(output[1:])
        chain.returned.append((type(output), rest))
        last[stack] = first_tensor(output)
        if index + 1 < len(stacks[stack]):
            chain.passes_through &= first_tensor(output).shape == hidden.shape and all(item is None for item in rest)
        return output

    with ExitStack() as replaced:
        for stack, blocks in stacks.items():
            for index, block in enumerate(blocks):
                replaced.enter_context(replaced_forward(block.module, partial(watch, stack, index)))
        model(**_first_sample(batch))
    for stack, chain in chains.items():
        if len(chain.returned) < len(stacks[stack]) and chain.broken_at is None:
            chain.broken_at = stacks[stack][len(chain.returned)].name
    return chains


def capture(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    chain: Chain,
    *,
    enter: Callable[[Tensor], None] | None = None,
) -> tuple[list[list[BlockCall]], list[Tensor]]:
    """Record every call of ``blocks``.

    Returns:
        The calls, [block][micro-batch], and the hidden states that enter the first block, one for each batch (none if
        ``enter`` takes them as they come).
    """
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    entering: list[Tensor] = []
    keep = entering.append if enter is None else enter

    def record(index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot = _slot(args, kwargs)
        if slot is None or len(calls[index]) > len(calls[-1]):
            chain.broken_at = blocks[index].name
            chain.check()
        assert slot is not None
        hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        call = BlockCall(list(args), dict(kwargs), slot)
        if isinstance(slot, int):
            call.args[slot] = None
        else:
            del call.kwargs[slot]
        calls[index].append(_shared(call, calls[index][0]) if calls[index] else call)
        if index == 0:
            keep(hidden)
        if index + 1 == len(blocks):
            raise _LastBlockReached
        if not chain.passes_through:
            return real(*args, **kwargs)
        kind, rest = chain.returned[index]
        return hidden if issubclass(kind, Tensor) else (hidden, *rest)

    with ExitStack() as replaced:
        for index, block in enumerate(blocks):
            replaced.enter_context(replaced_forward(block.module, partial(record, index)))
        for done, batch in enumerate(batches, start=1):
            with suppress(_LastBlockReached):
                model(**batch)
            if len(calls[-1]) != done:
                chain.broken_at = blocks[-1].name
                chain.check()
    return calls, entering


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Hidden states in the arguments of a call that :func:`probe` found in order."""
    slot = _slot(args, kwargs)
    hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot or ""]
    return hidden


def first_tensor(output: Any) -> Tensor:
    """Hidden states in a block's output, which is a tensor or a tuple that starts with it."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


@contextmanager
def replaced_forward(module: nn.Module, record: Callable[..., Any]) -> Iterator[None]:
    """Let ``record(real forward, args, kwargs)`` stand for the forward of ``module`` while open."""
    real = module.forward
    had_own = "forward" in module.__dict__
    module.forward = lambda *args, **kwargs: record(real, args, kwargs)
    try:
        yield
    finally:
        if had_own:
            module.forward = real
        else:
            del module.forward


def _slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the hidden states are: the first argument, or the first floating-point one by name."""
    if args and isinstance(args[0], Tensor):
        return 0
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return name
    return None


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
