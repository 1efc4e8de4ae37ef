"""The parts of a model, one after the other: loaded, measured, pruned, written, freed, and noted in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trisparse.sparsity.batches import accepts
from trisparse.sparsity.calibration import BlockRunner, stacks_with_targets, valid_tokens
from trisparse.sparsity.capture import Batch, BlockCall, BlocksNotChainedError, Chain, capture, probe, replaced_forward
from trisparse.sparsity.distributed import Processes
from trisparse.sparsity.hardware import return_freed_memory
from trisparse.sparsity.mask import masks
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.progress import Advance
from trisparse.sparsity.pruning import Pruning
from trisparse.sparsity.sparsify import check_finite
from trisparse.sparsity.statistics import InputStatistics, experts_one_by_one
from trisparse.sparsity.streaming.hidden_states import HiddenStates, InMemory, OnDisk
from trisparse.sparsity.streaming.journal import Journal
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk
from trisparse.sparsity.streaming.output import Output
from trisparse.sparsity.targets import Block, Target, Targets

_OUTSIDE = 0  # the part that holds embeddings, final norm and head; block i is part i + 1


class BlockSteps:
    """One streamed prune; every part is a step that is done or not.

    Attributes:
        done: the journal's line of each part that is finished.
    """

    def __init__(
        self,
        source: ModelOnDisk,
        targets: Targets,
        pruning: Pruning,
        output: Output,
        settings: Mapping[str, Any],
        processes: Processes,
        advance: Advance,
    ) -> None:
        """Open the journal, on the first process.

        Raises:
            JournalError: it is of other settings, or another process is at work.
        """
        self.source = source
        self.targets = targets
        self.pruning = pruning
        self.output = output
        self.processes = processes
        self.advance = advance
        self._journal: Journal | None = None
        self.done: dict[int, dict[str, Any]] = {}
        for line in processes.from_first(lambda: self._open(settings)):
            self.done[line["part"]] = line
            self.advance(len(line["rows"]) + len(line["unreached"]))
        self._groups: dict[int, list[Target]] = {}
        for target in targets.found:
            self._groups.setdefault(_OUTSIDE if target.block is None else target.block + 1, []).append(target)

    def close(self) -> None:
        """Let another process have the journal; it goes if nothing is finished."""
        if self._journal is None:
            return
        if not self.done and self.output.work.is_dir():
            self.output.clean_up()
        self._journal.close()

    def how_far(self) -> str:
        """A sentence on what is finished."""
        return (
            f"{len(self.done)} of {len(self.source.parts)} parts are finished, in {self.output.work}; the same call "
            "goes on from there"
        )

    def prune_without_data(self) -> None:
        """Prune by a metric that reads no inputs."""
        for part in range(len(self.source.parts)):
            if part not in self.done:
                with self.source.loaded(part):
                    self._prune(part, None)
                    self._write(part)

    def calibrate(self, batches: Sequence[Batch], runner: BlockRunner, *, on_disk: bool) -> None:
        """Measure and prune block by block, as :func:`trisparse.sparsity.calibration.walk` does.

        Raises:
            ValueError: the model does not simply run one chain of blocks.
        """
        hidden: HiddenStates = InMemory()
        if on_disk:
            hidden = OnDisk(self.output.work / f"hidden-states-{self.processes.rank}", self.source.device)
        if len(self.done) == len(self.source.parts):
            return  # a run before this one was cut off at the very end
        return_freed_memory()  # of tokenizing
        with evaluating(self.source.model), experts_one_by_one(self.source.model), torch.no_grad():
            self._calibrate(batches, runner, hidden)

    def finish(self, *, tokenizer: Any, recipe: Sequence[Mapping[str, Any]]) -> None:
        """Complete the folder, put it in place and remove the folder of work."""
        self.processes.from_first(lambda: self._finish(tokenizer, recipe))

    def _calibrate(self, batches: Sequence[Batch], runner: BlockRunner, hidden: HiddenStates) -> None:
        stacks, _ = stacks_with_targets(self.targets)
        with self._on_call(), self.source.loaded(_OUTSIDE):
            if _OUTSIDE not in self.done:
                stack, chain = self._probe(stacks, batches[0])
                returned = [[issubclass(kind, Tensor), len(rest)] for kind, rest in chain.returned]
                self._write(_OUTSIDE, stack=stack, returned=returned)
            stack = self.done[_OUTSIDE]["stack"]
            returned = self.done[_OUTSIDE]["returned"]
            chain = Chain([(Tensor if is_tensor else tuple, (None,) * rest) for is_tensor, rest in returned])
            blocks = stacks[stack]
            parts = [1 + index for index, block in enumerate(self.targets.blocks) if block.stack == stack]
            finished = sum(part in self.done for part in parts)  # the first ones: they are finished in turn
            there = finished > 0 and hidden.go_on_behind(finished - 1)
            enter: Callable[[Tensor], None] = (lambda tensor: None) if there else hidden.append
            calls, _ = capture(self.source.model, blocks, batches, chain, enter=enter)
        if finished < len(parts):
            if not there:
                self._run_finished(blocks[:finished], parts, calls, runner, hidden)
            if finished:
                runner.dtype = _dtype(self.done[parts[finished - 1]]["dtype"])
            valid = [valid_tokens(batch) for batch in batches]
            for index in range(finished, len(parts)):
                self._step(index, len(parts), parts[index], blocks[index], calls[index], runner, hidden, valid)
                calls[index] = []
        for part in range(1, len(self.source.parts)):
            if part not in self.done:  # a stack without targets, or one that the data does not reach
                with self.source.loaded(part):
                    self._prune(part, InputStatistics(self._groups.get(part, [])))
                    self._write(part)

    def _step(
        self,
        index: int,
        count: int,
        part: int,
        block: Block,
        calls: Sequence[BlockCall],
        runner: BlockRunner,
        hidden: HiddenStates,
        valid: Sequence[Tensor | None],
    ) -> None:
        """Measure, prune and write a block, which becomes finished together with the hidden states that leave it."""
        group = self._groups.get(part, [])
        with self.source.loaded(part):
            statistics = runner.measure(block.module, group, calls, hidden, valid)
            self._prune(part, statistics)
            if index + 1 < count:
                if runner.runs_again(group):
                    runner.run(block.module, calls, hidden)
                hidden.leave(index)
            self._write(part, dtype=str(runner.dtype))
        hidden.forget_before(index)

    def _run_finished(
        self,
        blocks: Sequence[Block],
        parts: Sequence[int],
        calls: Sequence[Sequence[BlockCall]],
        runner: BlockRunner,
        hidden: HiddenStates,
    ) -> None:
        """Compute the hidden states behind finished blocks anew, as they were: the same blocks in the same dtype."""
        for index, block in enumerate(blocks):
            runner.dtype = _dtype(self.done[parts[index]]["dtype"])
            shard = None if runner.propagate == "dense" else self.output.shard(parts[index])
            with self.source.loaded(parts[index], shard):
                runner.run(block.module, calls[index], hidden)
            hidden.leave(index)
            hidden.forget_before(index)

    def _probe(self, stacks: Mapping[int, Sequence[Block]], batch: Batch) -> tuple[int, Chain]:
        """The one chain of blocks that the model runs."""
        model = self.source.model
        if accepts(model, "logits_to_keep"):
            batch = {**batch, "logits_to_keep": 1}  # nobody looks at them
        chains = probe(model, stacks, batch)
        if not chains:
            raise ValueError("data reaches none of the weights to prune: the model's forward does not use them")
        if len(chains) > 1:
            raise ValueError(
                f"the model runs {len(chains)} stacks of blocks, and each batch would have to read the first one again "
                "to reach the next: prune it in memory, or exclude all but one"
            )
        ((stack, chain),) = chains.items()
        try:
            chain.check()
        except BlocksNotChainedError as error:
            error.add_note("streaming needs blocks that are run in turn: propagate='dense' works in memory")
            raise
        if not chain.passes_through:
            raise ValueError(
                "the blocks return more than hidden states, so the model cannot be passed through without running "
                "them, and each batch would have to read them all: prune it in memory"
            )
        return stack, chain

    @contextmanager
    def _on_call(self) -> Iterator[None]:
        """Let every block load when it is called, be checked before anything is written, and be freed after."""

        def run(part: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.source.loaded(part):
                check_finite(self._groups.get(part, []))
                return real(*args, **kwargs)

        with ExitStack() as stack:
            for part, block in enumerate(self.targets.blocks, start=1):
                stack.enter_context(replaced_forward(block.module, partial(run, part)))
            yield

    def _prune(self, part: int, statistics: InputStatistics | None) -> None:
        group = self._groups.get(part, [])
        if statistics is None:
            check_finite(group)
        self.pruning.prune(group, statistics)
        self.advance(len(group))

    def _write(self, part: int, **notes: Any) -> None:
        """Make the loaded ``part`` a finished one."""
        rows, self.pruning.rows = self.pruning.rows, []
        unreached, self.pruning.unreached = self.pruning.unreached, []
        line = {
            "part": part,
            **notes,
            "rows": [asdict(row) for row in rows],
            "unreached": [[item.name, list(item.shape), item.reason] for item in unreached],
        }
        self.processes.wait()  # until the hidden states of all of them are on disk
        if self._journal is not None:
            line |= self.output.write_part(part, self.source.tensors(part), masks(self.source.model))
            self._journal.write(line)
        self.processes.wait()
        self.done[part] = line

    def _open(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        self._journal = Journal(self.output.work, settings)
        if not self._journal.lines:
            self.output.clear()
        return self._journal.lines

    def _finish(self, tokenizer: Any, recipe: Sequence[Mapping[str, Any]]) -> None:
        if not self.output.is_in_place():
            self.output.finish(self.source.model, self.done, tokenizer=tokenizer, recipe=recipe)
        self.output.clean_up()


def _dtype(name: str) -> torch.dtype | None:
    """The dtype whose ``str`` is ``name``."""
    dtype: torch.dtype | None = None if name == "None" else getattr(torch, name.removeprefix("torch."))
    return dtype
