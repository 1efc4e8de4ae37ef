"""Layer-wise reconstruction: each block is trained by itself to give what the dense block gives.

    block i:  min over the chosen groups of  mean over tokens of |f_i(x_i; sparse) - t_i|² / |t_i|²

x_i is what the reconstructed blocks before it give. ``targets`` says what t_i is:

- ``"sparse"``: the dense block's output for x_i, the objective of SparseGPT (Frantar & Alistarh 2023, section 3.1) and
  of PERP's layer-wise reconstruction (Zimmer et al. 2023, https://arxiv.org/abs/2312.15230v3, and its published code,
  ``prune_methods.py``, which takes the plain mean of the squares instead of the error relative to each token);
- ``"dense"``: the dense model's own hidden states behind block i, so that a block also makes up for what the ones
  before it left over.

Only one block has gradients and optimizer state at a time. In memory are the model, one dense block, three sets of
hidden states of the calibration data (fp32), and the activations of one block for one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trisparse.retrain.block_training import (
    BlockTraining,
    TrainedBlock,
    hidden_dim,
    in_fp32,
    relative_errors,
    run_block,
)
from trisparse.retrain.dense_weights import DenseWeights, holding
from trisparse.retrain.groups import RECONSTRUCT_PRESETS, ParameterGroups, group_names, head_of, parameter_groups
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.precision import computing_dtype
from trisparse.retrain.reconstruct_report import BlockReport, ReconstructReport
from trisparse.retrain.report import PeakMemory
from trisparse.sparsity.batches import batch_size, calibration_batches, is_padded
from trisparse.sparsity.capture import Batch, BlockCall, BlocksNotChainedError, capture, probe
from trisparse.sparsity.mask import HoldsMask, check_masks, masks
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.targets import Block, find_blocks, is_peft_wrapped

BlockTargets = Literal["sparse", "dense"]
_TARGETS: tuple[str, ...] = get_args(BlockTargets)
OnStep = Callable[[], None]
_GROUPS = ("biases", "norms", "lora", "full")
_DTYPES = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class ReconstructConfig:
    """How to reconstruct.

    Attributes:
        groups: which of "biases", "norms" and "lora" (W + M ⊙ s·BA on every pruned linear of the block) train, or
            "full" alone: every parameter of the block, the pruned ones under their masks. A text is a preset of
            ``RECONSTRUCT_PRESETS``: "norms" is biases and norms, "perp" all three.
        targets: "sparse" (the paper's) or "dense", see the module.
        rank: rank of every LoRA.
        alpha: the LoRAs' scaling is s = alpha / rank.
        learning_rate: AdamW's peak, after a tenth of the steps; it falls linearly to 0. "full" wants about a tenth of
            what LoRAs do.
        steps: optimizer steps for each block.
        batch_size: windows per step.
        samples: windows of calibration data.
        seq_len: tokens per window.
        seed: of the choice of windows, of their order and of the LoRAs' start.
        dtype: "fp32"; "bf16" (autocast; what trains stays fp32); "auto" is bf16 where it is the faster one, or where
            the model is in bf16.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    groups: str | Sequence[str] = "perp"
    targets: BlockTargets = "sparse"
    rank: int = 16
    alpha: float = 32
    learning_rate: float = 5e-3
    steps: int = 100
    batch_size: int = 2
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", group_names(self.groups, RECONSTRUCT_PRESETS, _GROUPS))
        for name, allowed in (("targets", _TARGETS), ("dtype", _DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (
            ("rank", 1), ("steps", 1), ("batch_size", 1), ("samples", 1), ("seq_len", 2), ("seed", 0)
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.samples < self.batch_size:
            raise ValueError(f"samples must be at least batch_size={self.batch_size}, got {self.samples}")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")


_DEFAULT = ReconstructConfig()


def reconstruct(
    model: nn.Module,
    dense: nn.Module | str | Path,
    data: Any,
    config: ReconstructConfig = _DEFAULT,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> ReconstructReport:
    """Train each block of a pruned model to give what the dense one gives, in place, keeping every zero.

    A block whose error did not fall is left as it was (the report says so). Norms outside the blocks and the head are
    not touched.

    Args:
        model: any model of one stack of blocks that feed each other, with attached masks.
        dense: the same architecture from before pruning, or its checkpoint folder, of which one block is read at a
            time.
        data: calibration data: token ids or text (see :func:`trisparse.sparsity.data.token_windows`), or an iterable
            of batches, taken as they are.
        config: what trains, and how.
        tokenizer: for text.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the model, ``dense`` or the data does not fit; nothing was changed.
        BlocksNotChainedError: the model does something between its blocks.
        MaskError: a pruned weight is not zero.
        RetrainError: an error became NaN or infinite. This and what else comes up later carries a note that says up
            to where the model was reconstructed; no block is left half done.
    """
    start = time.perf_counter()
    blocks, groups, missing = _checked(model, config)
    weights = DenseWeights(dense, model)
    inside = {block.name: [f"{block.name}.{name}" for name, _ in block.module.named_parameters()] for block in blocks}
    head = head_of(model)  # it may have been untied from the embedding since, and does not matter here
    weights.check_same(model, [name for name, _ in model.named_parameters() if name.rpartition(".")[0] != head])
    batches = calibration_batches(
        model,
        data,
        tokenizer=tokenizer,
        samples=config.samples,
        seq_len=config.seq_len,
        seed=config.seed,
        rows=config.batch_size,
    )
    if any(is_padded(batch) for batch in batches):
        raise ValueError("data is padded, and padding would count in the error: pack it")
    device = next(model.parameters()).device
    rows: list[BlockReport] = []
    bar = progress_bar("reconstruction", len(blocks) * config.steps, enabled=progress)
    with evaluating(model), torch.no_grad(), PeakMemory(device) as memory, bar as advance:
        calls, hidden, wanted = _captured(model, blocks, batches, weights, inside)
        dtype = computing_dtype(config.dtype, device, {param.dtype for param in model.parameters()})
        training = BlockTraining(config.steps, config.learning_rate, config.rank, config.alpha, config.seed, dtype)
        reconstruction = _Reconstruction(
            weights, groups, config, training, hidden, wanted if config.targets == "dense" else None
        )
        try:
            for block, block_calls in zip(blocks, calls, strict=True):
                rows.append(reconstruction.run(block, block_calls, inside[block.name], lambda: advance(1)))
                block_calls.clear()
        except BaseException as error:
            done = f"reconstructed up to {rows[-1].name}" if rows else "unchanged"
            error.add_note(f"reconstruct stopped; the model is {done}")
            raise
    check_masks(model)
    return ReconstructReport(
        groups=tuple(config.groups),
        targets=config.targets,
        samples=sum(batch_size(batch) for batch in batches),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=memory.bytes,
        total_parameters=sum(param.numel() for param in model.parameters()),
        blocks=rows,
        missing=missing,
        not_covered=list(groups.not_covered) if "lora" in config.groups else [],
    )


class _Reconstruction:
    """The hidden states between two blocks, moved on block by block.

    ``hidden`` are the sparse model's, ``wanted`` the dense model's (None for ``targets="sparse"``).
    """

    def __init__(
        self,
        weights: DenseWeights,
        groups: ParameterGroups,
        config: ReconstructConfig,
        training: BlockTraining,
        hidden: list[Tensor],
        wanted: list[Tensor] | None,
    ) -> None:
        self.weights, self.groups, self.config, self.training = weights, groups, config, training
        self.hidden, self.wanted = hidden, wanted

    def run(self, block: Block, calls: Sequence[BlockCall], names: Sequence[str], on_step: OnStep) -> BlockReport:
        """Reconstruct ``block`` and pass the hidden states on through it."""
        start = time.perf_counter()
        prefix = f"{block.name}."
        dense = self.weights.read(names, self.hidden[0].device)
        with holding(block.module, {name.removeprefix(prefix): value for name, value in dense.items()}):
            # the dense model's hidden states are replaced one by one, the sparse model's are still needed
            targets = list(self.hidden) if self.wanted is None else self.wanted
            for index, call in enumerate(calls):
                targets[index] = self._output(block.module, call, targets[index])
        del dense
        before = self._error(block.module, calls, targets)
        if not math.isfinite(before):
            raise RetrainError(f"the error of {block.name} is {before} before it trains: are all weights finite?")
        direct, lora = self._trained(block.module, prefix)
        trainable, leaving = 0, None
        if before > 0 and (direct or lora):
            trainable, leaving = self._train(block, calls, targets, direct, lora, before, on_step)
        kept = leaving is not None
        if leaving is None:
            leaving = self._outputs(block.module, calls)
        after = self._mean_error(block.module, leaving, targets)
        self.hidden = leaving
        return BlockReport(block.name, trainable, before, after, time.perf_counter() - start, kept)

    def _train(
        self,
        block: Block,
        calls: Sequence[BlockCall],
        targets: Sequence[Tensor],
        direct: Sequence[str],
        lora: Sequence[str],
        before: float,
        on_step: OnStep,
    ) -> tuple[int, list[Tensor] | None]:
        """Train the block; returns how many parameters did, and what leaves the block if it is the better for it."""
        original = {name: param.data for name, param in block.module.named_parameters()}
        try:
            with in_fp32(block.module), TrainedBlock(block.module, direct, lora, self.training) as trained:
                trained.train(calls, self.hidden, targets, scale=before, on_step=on_step)
                trained.keep()
            leaving = self._outputs(block.module, calls)
            kept = self._mean_error(block.module, leaving, targets) < before
        except BaseException:
            _put_back(block.module, original)
            raise
        if kept:
            return trained.trainable, leaving
        _put_back(block.module, original)
        return trained.trainable, None

    def _trained(self, block: nn.Module, prefix: str) -> tuple[list[str], list[str]]:
        """Names in ``block`` of the parameters that train themselves, and of the layers that train by LoRA."""
        groups, wanted = self.groups, self.config.groups
        if "full" in wanted:
            return [name for name, _ in block.named_parameters()], []
        direct = [name for name in groups.biases if "biases" in wanted and name.startswith(prefix)]
        for norm in groups.norms:
            if "norms" in wanted and norm.startswith(prefix):
                own = block.get_submodule(norm.removeprefix(prefix)).named_parameters()
                direct += [f"{norm}.{name}" for name, _ in own]
        lora = [name for name in groups.lora if "lora" in wanted and name.startswith(prefix)]
        return [name.removeprefix(prefix) for name in direct], [name.removeprefix(prefix) for name in lora]

    def _output(self, block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
        with in_fp32(block):
            return run_block(block, call, hidden, self.training.dtype)

    def _outputs(self, block: nn.Module, calls: Sequence[BlockCall]) -> list[Tensor]:
        return [self._output(block, *pair) for pair in zip(calls, self.hidden, strict=True)]

    def _error(self, block: nn.Module, calls: Sequence[BlockCall], targets: Sequence[Tensor]) -> float:
        outputs = (self._output(block, *pair) for pair in zip(calls, self.hidden, strict=True))
        return self._mean_error(block, outputs, targets)

    def _mean_error(self, block: nn.Module, outputs: Iterable[Tensor], targets: Sequence[Tensor]) -> float:
        """Mean relative error over the tokens of all batches."""
        dim = hidden_dim(block, targets[0])
        errors = [relative_errors(output, target, dim) for output, target in zip(outputs, targets, strict=True)]
        return sum(float(e.sum(dtype=torch.float64)) for e in errors) / sum(e.numel() for e in errors)


def _put_back(block: nn.Module, original: Mapping[str, Tensor]) -> None:
    for name, param in block.named_parameters():
        param.data = original[name]


def _captured(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    weights: DenseWeights,
    inside: Mapping[str, Sequence[str]],
) -> tuple[list[list[BlockCall]], list[Tensor], list[Tensor]]:
    """The calls of the blocks, and what enters the first one in the sparse and in the dense model."""
    chains = probe(model, {blocks[0].stack: blocks}, batches[0])
    chain = chains.get(blocks[0].stack)
    if chain is None or chain.broken_at is not None:
        at = "they are not called" if chain is None else f"at {chain.broken_at}"
        raise BlocksNotChainedError(
            f"the model does not run its blocks one after the other, each once on the output of the one before it "
            f"({at}), so they cannot be reconstructed in turn"
        )
    calls, hidden = capture(model, blocks, batches, chain)
    # What enters the blocks comes from the embeddings, mostly: are they the dense model's?
    taken = {name for names in inside.values() for name in names}
    changed = {}
    for name, param in model.named_parameters():
        if name not in taken and weights.shape(name) == tuple(param.shape):
            value = weights.read([name], param.device)[name].to(param.dtype)
            if not torch.equal(param, value):
                changed[name] = value
    if not changed:
        return calls, hidden, list(hidden)
    with holding(model, changed):
        return calls, hidden, capture(model, blocks, batches, chain)[1]


def _checked(model: nn.Module, config: ReconstructConfig) -> tuple[list[Block], ParameterGroups, list[str]]:
    """The blocks of ``model``, its groups and those that the blocks lack; :func:`reconstruct` says what raises."""
    if is_peft_wrapped(model):
        raise ValueError("model is wrapped by PEFT: merge_and_unload() or unload() it first")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("model is on the meta device: it has no weights to reconstruct")
    if not masks(model):
        raise ValueError("model has no masks: prune it first")
    if any(isinstance(module, HoldsMask) for module in model.modules()):
        raise ValueError("model holds compressed layers, whose weights cannot train: decompress(model) first")
    check_masks(model)
    masked = set(masks(model))
    pruned = [block for block in find_blocks(model) if any(name.startswith(f"{block.name}.") for name in masked)]
    stacks = {block.stack for block in pruned}
    if not stacks:
        raise ValueError("model has no repeated blocks with masks: reconstruction goes block by block")
    if len(stacks) > 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model has pruned blocks in several stacks ({pruned[0].name}, {pruned[-1].name}): one is needed"
        )
    blocks = [block for block in find_blocks(model) if block.stack in stacks]
    owners: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(param), name)
        if first != name and any(n.startswith(f"{block.name}.") for block in blocks for n in (first, name)):
            raise ValueError(f"{name} is shared with {first}: a block that trains would change another")
    groups = parameter_groups(model)
    members = {"biases": groups.biases, "norms": groups.norms, "lora": groups.lora, "full": groups.full}
    inside = tuple(f"{block.name}." for block in blocks)
    missing = [group for group in config.groups if not any(name.startswith(inside) for name in members[group])]
    if len(missing) == len(config.groups):
        raise ValueError(f"model has nothing to train in groups={tuple(config.groups)} inside its blocks")
    return blocks, groups, missing
