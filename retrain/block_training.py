"""Train the parameters of one block so that its outputs come near to given ones.

    min over the trained parameters of  mean over tokens of |block(x) - t|² / |t|²

x [batch, tokens, hidden] are the hidden states that enter the block and t the outputs wanted. The error is relative to
each token, as a few tokens of a language model have hidden states a thousand times greater than the others' (Sun et
al. 2024, https://arxiv.org/abs/2402.17762), and their errors would be the whole mean. Weights under a mask
train as W + M ⊙ s·BA (PERP, section 3.2; kernels/masked_lora.py) or directly, with the gradient under the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.masked_lora import effective_weight, mask_lora
from trisparse.retrain.loop import RetrainError, autocast
from trisparse.sparsity.capture import BlockCall, replaced_forward
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import mask_of


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


def relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|² / |target|² of each token; both are [..., hidden]."""
    return (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


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
    """A block with what trains in it: some parameters themselves, and LoRAs under masks.

    The block computes in fp32 (:func:`in_fp32`). :meth:`keep` and :meth:`undo` end it, one of the two.

    Args:
        block: the block.
        direct: names of the parameters that train themselves; those with a mask train under it.
        lora: names of the pruned nn.Linear and Conv1D in ``block`` that train by LoRA.
        training: rank and seed.

    Attributes:
        trainable: how many numbers train.
    """

    def __init__(self, block: nn.Module, direct: Sequence[str], lora: Sequence[str], training: BlockTraining) -> None:
        self.block = block
        self._hooks: list[Any] = []
        self._requires_grad = [(param, param.requires_grad) for param in block.parameters()]
        block.requires_grad_(False)
        self._direct = [block.get_parameter(name) for name in direct]
        self._before = [param.data for param in self._direct]
        for name, param in zip(direct, self._direct, strict=True):
            param.data = param.data.clone()
            param.requires_grad_(True)
            owner, _, attribute = name.rpartition(".")
            mask = mask_of(block.get_submodule(owner), attribute)
            if mask is not None:
                pruned = ~mask.dense(param.device)
                self._hooks.append(param.register_post_accumulate_grad_hook(partial(_zero_gradient, pruned)))
        generator = torch.Generator().manual_seed(training.seed)
        self._adapters: list[_Adapter] = []
        try:
            for name in lora:
                self._adapters.append(_Adapter(block.get_submodule(name), training.rank, training.alpha, generator))
        except BaseException:
            self.undo()
            raise
        self.parameters = [*self._direct, *(factor for adapter in self._adapters for factor in (adapter.a, adapter.b))]
        self.trainable = sum(param.numel() for param in self.parameters)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Let the block compute with its LoRAs while open."""
        with ExitStack() as replaced:
            for adapter in self._adapters:
                replaced.enter_context(replaced_forward(adapter.layer, adapter.forward))
            yield

    def train(
        self,
        calls: Sequence[BlockCall],
        hidden: Sequence[Tensor],
        targets: Sequence[Tensor],
        training: BlockTraining,
        *,
        scale: float,
        on_step: Callable[[], None],
    ) -> None:
        """Minimise the error over batches of ``hidden`` -> ``targets``; the loss is divided by ``scale``.

        Raises:
            RetrainError: the loss became NaN or infinite.
        """
        optimizer = torch.optim.AdamW(self.parameters, lr=training.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=training.steps))
        generator = torch.Generator().manual_seed(training.seed)
        order: list[int] = []
        with self.adapted(), torch.enable_grad():
            for step in range(1, training.steps + 1):
                order = order or torch.randperm(len(hidden), generator=generator).tolist()
                batch = order.pop()
                output = run_block(self.block, calls[batch], hidden[batch], training.dtype)
                loss = relative_errors(output, targets[batch]).mean() / scale
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
        """Merge the LoRAs into the weights; what is pruned stays exactly zero."""
        merged = [adapter.merged() for adapter in self._adapters]
        with interrupt_after():
            for adapter, weight in zip(self._adapters, merged, strict=True):
                adapter.layer.weight.data = weight
            self._release()

    def undo(self) -> None:
        """Put every parameter back as it was."""
        with interrupt_after():
            for param, before in zip(self._direct, self._before, strict=True):
                param.data = before
            self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for param, flag in self._requires_grad:
            param.requires_grad_(flag)
            param.grad = None


class _Adapter:
    """W + M ⊙ s·BA of one layer; A [rank, in] uniform as PEFT starts it, B [out, rank] zero."""

    def __init__(self, layer: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
        self.layer = layer
        self.transposed = isinstance(layer, Conv1D)
        weight: Tensor = layer.weight
        mask = mask_of(layer)
        assert mask is not None
        self.packed = pack_bits(mask.dense(weight.device).contiguous())
        outputs, inputs = weight.shape[::-1] if self.transposed else weight.shape
        start = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Stands for the layer's own forward, which takes the input alone."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        layer = self.layer
        return mask_lora(
            x, layer.weight, self.packed, self.a, self.b, layer.bias, scale=self.scale, transposed=self.transposed
        )

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The layer's weight with the update."""
        up, down = self.b.detach() * self.scale, self.a.detach()
        left, right = (down.t(), up.t()) if self.transposed else (up, down)
        return effective_weight(self.layer.weight.detach(), self.packed, left, right)


def _rate(step: int, *, steps: int) -> float:
    """Share of the peak rate in the step after ``step`` done ones: up over a tenth of the steps, then down to 0."""
    warmup = math.ceil(steps / 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _zero_gradient(pruned: Tensor, param: Tensor) -> None:
    assert param.grad is not None
    param.grad.masked_fill_(pruned, 0)
