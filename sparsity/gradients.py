"""The gradient statistic G of pruning metrics (Pruner-Zero, GBLM, SNIP).

    G = sqrt( sum over calibration sequences s of (dL_s / dW)^2 ),    L_s = mean token loss of sequence s

(Pruner-Zero, appendix; GBLM-Pruner, section 3: the l2 norm over samples.) Each sequence has a backward pass of its
own: the gradient of a batch's mean loss would add the sequences up before the square.

The sum is always kept in fp32. A running sum in bf16 would stop growing: a term under 1/512 of the sum is rounded
away, which is most terms after a few hundred sequences. So ``dtype=torch.bfloat16`` means that each finished norm is
rounded once (relative error at most 2^-9), which only ``mode="block"`` can do without an fp32 sum of the whole model.

Both modes compute each block twice forward and once backward. ``"block"`` needs less memory where the logits are large:
they are gone before the first sum is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trisparse.sparsity.batches import accepts, batch_size
from trisparse.sparsity.capture import Batch, BlocksNotChainedError
from trisparse.sparsity.gradient_passes import Computing, Loss, block_by_block, whole_model
from trisparse.sparsity.gradient_statistics import GradientInfo, GradientStatistics, NormsWriter, writing
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.mask import to_matrix
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.targets import Target, Targets

Mode = Literal["whole", "block"]
MODES: tuple[str, ...] = get_args(Mode)

_HEAD_TOKENS = 128  # that have their logits in memory at once, where the model can give a choice of them
_IGNORED = -100  # the label that transformers' losses leave out


def gradient_norms(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    mode: Mode | None = None,
    path: str | Path | None = None,
    compute_dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> GradientStatistics:
    """Measure G of ``targets``, with the model in eval mode; it is left as it came, with the user's own ``.grad``.

    Memory above the model, in mode ``"whole"``: G, the greatest gradient of one weight, and for one sequence the
    hidden states that enter each block and one block's activations. In mode ``"block"``: G, or nothing of it with
    ``path``; one block's G in fp32, the greatest gradient of one weight, and one block's activations for one sequence;
    the hidden states wait in a temporary file (sequences x tokens x hidden size x blocks; in ``path``'s folder, else
    where ``$TMPDIR`` says). The logits of one sequence come on top in mode ``"whole"``; in mode ``"block"`` they are
    gone before the first G is there, and most models give them a few tokens at a time.

    Args:
        model: any module for ``"whole"``; one whose blocks feed each other for ``"block"``.
        targets: from ``find_targets``.
        batches: from ``calibration_batches``; those of several sequences are split.
        dtype: of storage: float32, or bfloat16 with mode ``"block"``.
        mode: how the backward pass goes, not what comes out; None takes ``"block"`` where the model allows it, else
            ``"whole"``.
        path: keep the norms in this safetensors file, as ``GradientStatistics.save`` writes it; the result reads them
            from there. Mode ``"whole"`` has them in memory until it is done, ``"block"`` a block's at a time.
        compute_dtype: bfloat16 computes an fp32 model under autocast; None does so where the device is fast at it and
            the model can. A model in bf16 computes in bf16.
        loss: (model, batch of one sequence) -> scalar tensor; None takes the model's own: the mean loss over the
            predicted tokens with ``labels=input_ids`` (or the batch's labels). Tokens of padding are not predicted,
            and nothing is predicted from them.

    Raises:
        BlocksNotChainedError: mode ``"block"`` cannot go through this model; ``"whole"`` can.
        ValueError: another argument is wrong, or a loss or gradient is not finite (with the layer's name).
    """
    _check_arguments(model, targets, batches, dtype, mode, compute_dtype)
    sequences = [sequence for batch in batches for sequence in split_batch(batch)]
    if loss is None:
        sequences = [_with_labels(model, sequence) for sequence in sequences]
    elif accepts(model, "use_cache"):  # a checkpointed block would put its keys into the cache twice
        sequences = [{"use_cache": False} | sequence for sequence in sequences]
    path = None if path is None else Path(path)
    with evaluating(model), _frozen(model), ExitStack() as stack:
        computing, computed = _computing(model, sequences[0], loss or _own_loss, compute_dtype)
        info = GradientInfo(
            loss="language model loss" if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
            sequences=len(sequences),
            tokens=sum(_tokens(sequence) for sequence in sequences),
            dtype=str(dtype).removeprefix("torch."),
            compute_dtype=str(computed).removeprefix("torch."),
        )
        store = _Store(targets.found, dtype)
        if path is not None:
            store.writer = stack.enter_context(writing(path, store.shapes, info))
        advance = stack.enter_context(progress_bar("gradients", 100, enabled=progress))
        passes = (model, targets, sequences, loss or _own_loss, computing, store, lambda share: advance(100 * share))
        used = mode or "block"
        if used == "block":
            try:
                parts = _own_loss_in_parts if loss is None and accepts(model, "logits_to_keep") else None
                block_by_block(*passes, parts, folder=path.parent if path else None)
            except BlocksNotChainedError:
                if mode == "block" or dtype != torch.float32:
                    raise
                used = "whole"
        if used == "whole":
            whole_model(*passes)
        if len(store.reached) == 0:
            raise ValueError("no gradient reaches any of the targets: the model's forward does not use them")
        info = replace(info, mode=used, unreached=tuple(name for name in store.shapes if name not in store.reached))
        if store.writer is not None:
            store.writer.finish(info)
    return GradientStatistics(path or store.norms, store.shapes, info)


class _Store:
    """Takes finished norms in the parameters' layout, and keeps or writes them as matrices in the storage dtype."""

    def __init__(self, targets: Sequence[Target], dtype: torch.dtype) -> None:
        self.shapes = {t.name: torch.Size((t.weight.numel() // t.cols, t.cols)) for t in targets}
        self.dtype = dtype
        self.norms: dict[str, Tensor] = {}
        self.reached: set[str] = set()
        self.writer: NormsWriter | None = None

    def __call__(self, target: Target, norm: Tensor | None) -> None:
        if norm is None:
            return
        matrix = to_matrix(norm, target.cols, transposed=target.transposed).to(self.dtype).contiguous()
        self.reached.add(target.name)
        if self.writer is None:
            self.norms[target.name] = matrix
        else:
            self.writer.write(target.name, matrix)


def split_batch(batch: Batch) -> list[Batch]:
    """Batches of one sequence each; tensors with a first dimension of 1 and other values go to every one.

    Raises:
        ValueError: the tensors of the batch have different numbers of sequences.
    """
    size = batch_size(batch)
    odd = [k for k, v in batch.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] not in (1, size)]
    if odd:
        raise ValueError(
            f"batches of {size} sequences have {odd[0]} of shape {list(batch[odd[0]].shape)}: cannot split"
        )

    def part(value: Any, index: int) -> Any:
        is_split = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return value[index : index + 1] if is_split else value

    return [{name: part(value, index) for name, value in batch.items()} for index in range(size)]


def _with_labels(model: nn.Module, sequence: Batch) -> Batch:
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    if "labels" in sequence:
        return extra | sequence
    ids = sequence.get("input_ids")
    if not accepts(model, "labels") or not isinstance(ids, Tensor):
        raise ValueError(
            f"{type(model).__name__} with a batch of {', '.join(sequence)} has no language model loss of its own: "
            "put labels into the batches if it takes them, or pass loss=(a function of the model and a batch)"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder model needs labels in the batches: its input is not what it predicts")
    labels = ids
    mask = sequence.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        valid = mask.bool()
        predicted = valid.clone()
        predicted[:, 1:] &= valid[:, :-1]  # the first token behind left padding is predicted from padding
        labels = ids.masked_fill(~predicted, _IGNORED)
    if not bool((labels[:, 1:] != _IGNORED).any()):
        raise ValueError(f"a sequence of {ids.shape[1]} tokens, or all of it padding, predicts nothing: leave it out")
    return extra | sequence | {"labels": labels}


def _own_loss(model: nn.Module, sequence: Batch) -> Tensor:
    loss = getattr(model(**sequence), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(model).__name__} returns no .loss for labels: pass loss=(function of model and batch)")
    return loss


def _own_loss_in_parts(model: nn.Module, sequence: Batch) -> Iterator[Tensor]:
    """The mean cross entropy of the labels, from the logits of a few positions at a time."""
    following = sequence["labels"][0, 1:]
    (positions,) = (following != _IGNORED).nonzero(as_tuple=True)
    inputs = {name: value for name, value in sequence.items() if name != "labels"}
    for part in positions.split(_HEAD_TOKENS):
        logits = model(**inputs, logits_to_keep=part).logits[0]
        yield F.cross_entropy(logits.float(), following[part], reduction="sum") / len(positions)


def _tokens(sequence: Batch) -> int:
    mask, ids = sequence.get("attention_mask"), sequence.get("input_ids")
    if not isinstance(ids, Tensor):
        return 0
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _computing(
    model: nn.Module, sequence: Batch, loss: Loss, dtype: torch.dtype | None
) -> tuple[Computing, torch.dtype]:
    """A context to compute in, and the dtype of its matrix products."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    own = parameters[0].dtype
    device = parameters[0].device
    if own != torch.float32 or dtype == torch.float32:
        return nullcontext, own

    def autocast() -> AbstractContextManager[Any]:
        # Without the cache, which would hold bf16 copies of all weights until the context closes.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    if dtype is None:
        if not bf16_is_fast(device) or any(p.dtype != own for p in parameters):
            return nullcontext, own
        try:
            with torch.no_grad(), autocast():
                loss(model, sequence)
        except RuntimeError:  # the model's own code mixes dtypes; in fp32 it is as exact as can be, and says so
            return nullcontext, own
    return autocast, torch.bfloat16


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient or holds one while open; flags and gradients come back."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(False)
        yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


def _check_arguments(
    model: nn.Module,
    targets: Targets,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    mode: str | None,
    compute_dtype: torch.dtype | None,
) -> None:
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}: small norms vanish in others")
    if mode == "whole" and dtype == torch.bfloat16:
        raise ValueError("dtype=torch.bfloat16 needs mode='block': a sum of the whole model in bf16 loses small terms")
    if not batches:
        raise ValueError("batches is empty: gradients need calibration data")
    halves = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if halves:
        raise ValueError(
            f"gradients of a float16 model underflow ({halves[0]}): load it with dtype=torch.bfloat16 or torch.float32"
        )
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if compute_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"compute_dtype must be None, torch.float32 or torch.bfloat16, got {compute_dtype}")
    if compute_dtype is not None and torch.float32 not in own and compute_dtype not in own:
        raise ValueError(f"compute_dtype={compute_dtype} on a model in {own.pop()}: load the model in that dtype")
    for target in targets.found:
        if not isinstance(target.weight, nn.Parameter):
            raise ValueError(f"{target.name} is computed from other parameters: it has no gradient of its own")
