"""Train the parameters of one block so that its outputs come near to given ones.

    min over the trained parameters of  mean over tokens of |block(x) - t|² / |t|²

x [batch, tokens, hidden] are the hidden states that enter the block and t the outputs wanted; of images x is
[batch, channels, height, width], and every position is a token. The error is relative to each token, as a few tokens of
a language model have hidden states a thousand times greater than the others' (Sun et al. 2024,
https://arxiv.org/abs/2402.17762), and their errors would be the whole mean. Weights under a mask train by MaskLoRA,
W + M ⊙ s·BA (PERP, section 3.2; retrain/lora.py), or directly, with the gradient under the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trisparse.retrain.held_masks import held_masks
from trisparse.retrain.layer_adapters import LayerAdapters
from trisparse.retrain.loop import RetrainError, autocast, random_state_kept
from trisparse.retrain.schedule import Linear, lr_lambda
from trisparse.sparsity.capture import BlockCall
from trisparse.sparsity.interrupt import interrupt_after


@dataclass(frozen=True)
class BlockTraining:
    """How a block trains: AdamW without weight decay, the rate falling linearly to 0 after a tenth of the steps.

    Attributes:
        steps: optimizer steps, on one batch each.
        learning_rate: the peak.
        rank, alpha: of the LoRAs; s = alpha / rank.
        seed: of the LoRAs' start and of the order of the batches.
        dtype: to compute in by autocast, or None for fp32. What trains is fp32.
    """

    steps: int
    learning_rate: float
    rank: int
    alpha: float
    seed: int
    dtype: torch.dtype | None


def relative_errors(output: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """|output - target|² / |target|² of each token, whose hidden states lie along ``dim``."""
    return (output - target).square().sum(dim) / target.square().sum(dim).clamp_min(1e-12)


def hidden_dim(block: nn.Module, hidden: Tensor) -> int:
    """The dimension of the hidden states of a token: the last one, or the channels where ``block`` convolves images."""
    images = hidden.ndim == 4 and any(isinstance(module, nn.Conv2d) for module in block.modules())
    return 1 if images else -1


def run_block(block: nn.Module, call: BlockCall, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Output of ``block``, whose parameters are fp32, in fp32."""
    fp32 = BlockCall(_as_fp32(call.args), _as_fp32(call.kwargs), call.slot)
    with autocast(hidden.device, dtype):
        return fp32.run(block, hidden.float()).float()


def _as_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_as_fp32(item) for item in value)
    if isinstance(value, dict):
        return {key: _as_fp32(item) for key, item in value.items()}
    return value


@contextmanager
def in_fp32(block: nn.Module) -> Iterator[None]:
    """Hold the parameters of ``block`` in fp32 while open; they come back rounded to their own dtypes."""
    dtypes = [(param, param.dtype) for param in block.parameters()]
    try:
        for param, _ in dtypes:
            param.data = param.data.float()
        yield
    finally:
        for param, dtype in dtypes:
            param.data = param.data.to(dtype)


class TrainedBlock:
    """Context manager: a block with what trains in it, some parameters themselves and LoRAs under masks.

    The block computes in fp32 (:func:`in_fp32`). An error puts every parameter back as it was; after :meth:`keep` the
    LoRAs are merged, and what is pruned is still exactly zero.

    Args:
        block: the block.
        direct: names of the parameters that train themselves; those with a mask train under it.
        lora: names of the pruned layers in ``block`` that train by LoRA (nn.Linear, Conv1D, nn.Conv2d).
        training: how.

    Attributes:
        trainable: how many numbers train.
    """

    def __init__(self, block: nn.Module, direct: Sequence[str], lora: Sequence[str], training: BlockTraining) -> None:
        self.block, self.training = block, training
        self._requires_grad = [(param, param.requires_grad) for param in block.parameters()]
        self._direct = [block.get_parameter(name) for name in direct]
        self._before = [param.data for param in self._direct]
        self._held = ExitStack()
        self._adapters: LayerAdapters | None = None
        try:
            block.requires_grad_(False)
            for param in self._direct:
                param.data = param.data.clone()
                param.requires_grad_(True)
            self._held.enter_context(held_masks(block, self._direct))
            with random_state_kept():
                torch.manual_seed(training.seed)
                self._adapters = LayerAdapters(block, lora, "mask_lora", training.rank, training.alpha)
        except BaseException:
            self.undo()
            raise
        self.parameters = [*self._direct, *self._adapters.parameters.values()]
        self.trainable = sum(param.numel() for param in self.parameters)

    def __enter__(self) -> TrainedBlock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()

    def train(
        self,
        calls: Sequence[BlockCall],
        hidden: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        scale: float,
        on_step: Callable[[], None],
    ) -> None:
        """Minimise the error over batches of ``hidden`` -> ``targets``; the loss is divided by ``scale``.

        Raises:
            RetrainError: the loss became NaN or infinite.
        """
        training, dim = self.training, hidden_dim(self.block, hidden[0])
        optimizer = torch.optim.AdamW(self.parameters, lr=1.0, weight_decay=0.0)  # LambdaLR multiplies by the rate
        schedule = LambdaLR(optimizer, lr_lambda(Linear(training.learning_rate), training.steps))
        generator = torch.Generator().manual_seed(training.seed)
        order: list[int] = []
        with torch.enable_grad():
            for step in range(1, training.steps + 1):
                order = order or torch.randperm(len(hidden), generator=generator).tolist()
                batch = order.pop()
                output = run_block(self.block, calls[batch], hidden[batch], training.dtype)
                loss = relative_errors(output, targets[batch], dim).mean() / scale
                if not math.isfinite(value := loss.item()):
                    raise RetrainError(
                        f"the error is {value} at step {step} of {training.steps}; a learning_rate below "
                        f"{training.learning_rate:g} may help"
                    )
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                on_step()

    def keep(self) -> None:
        """Merge the LoRAs into the weights.

        Raises:
            RetrainError: a factor of a LoRA is NaN or infinite; nothing is merged.
        """
        assert self._adapters is not None
        with interrupt_after():
            self._adapters.merge()
            self._release()

    def undo(self) -> None:
        """Put every parameter and every layer back as it was."""
        with interrupt_after():
            if self._adapters is not None:
                self._adapters.discard()
            for param, before in zip(self._direct, self._before, strict=True):
                param.data = before
            self._release()

    def _release(self) -> None:
        self._held.close()
        for param, flag in self._requires_grad:
            param.requires_grad_(flag)
            param.grad = None
