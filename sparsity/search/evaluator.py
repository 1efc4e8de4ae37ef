"""The fitness of a metric: perplexity of the model with each row pruned by it, measured in place and undone.

The dense weights stay as they are. While an evaluator is open, the model computes with other tensors in its
parameters: buffers of the compute dtype that each evaluation fills with the masked weights. Closing puts the dense
tensors back, whatever happened in between, so no evaluation can damage the model and nothing is ever reloaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trisparse.kernels.select import select_rows
from trisparse.sparsity.hardware import bf16_is_fast
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.mask import from_matrix, masks, to_matrix
from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.pattern import kept_of
from trisparse.sparsity.search.measure import Statistics
from trisparse.sparsity.search.race import Reference, raced
from trisparse.sparsity.targets import Target

SEGMENT = 64  # tokens; a window of 512 gives the paired comparison of race.py its 8 differences
_GREATEST_MEAN = 700.0  # nats a token; exp of more is no float
_DECIMALS = 4  # of a segment's nats, which are about 200: below the noise of bf16, and a third of the log's size


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        segments: negative log-likelihood of each segment measured, in nats.
        stopped: why the race was over ("total" or "paired"), or None: measured on the whole text.
        dropped: why the metric cannot be used, or None.
        tokens: spent on it.
        seconds: from the first score to the last window.
        pruning_seconds: scores, masks and weights alone.
    """

    segments: tuple[float, ...] = ()
    stopped: str | None = None
    dropped: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    pruning_seconds: float = 0.0


@dataclass(frozen=True)
class _Layer:
    target: Target
    dense: Tensor  # the parameter's own tensor
    g: Sequence[Tensor | None]  # [rows of a part, cols], one for each part
    x: Tensor  # [parts, cols]


class Evaluator(AbstractContextManager["Evaluator"]):
    """Measures metrics on one model and text. Open it (``with``) around all evaluations.

    Args:
        model: a causal language model without masks.
        targets: its weights to prune; those without statistics stay dense.
        statistics: X and G from the dense model.
        windows: int64 [windows, seq_len], in the order in which they are measured.
        sparsity: share of each row to prune.
        dtype: compute dtype; None takes bf16 for an fp32 model where the device is fast at it.

    Raises:
        ValueError: a model that is pruned already or has weights that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        statistics: Statistics,
        windows: Tensor,
        *,
        sparsity: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        if masks(model):
            raise ValueError("model is pruned already: search on the dense model")
        device = next(model.parameters()).device
        self.model: Any = model
        self.windows = windows.to(device)
        self.dtype = dtype or compute_dtype(model)
        self.sparsity = sparsity
        self._layers: list[_Layer] = []
        for target in targets:
            if not bool(torch.isfinite(target.weight).all()):
                raise ValueError(f"model has NaN or Inf weights: {target.name}")
            if target.name in statistics.x:
                g: Sequence[Tensor | None] = [None] * target.parts
                if statistics.g is not None:
                    g = statistics.g[target.name].to(device).chunk(target.parts)
                dense = target.weight.data
                self._layers.append(_Layer(target, dense, g, statistics.x[target.name].to(device)))
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        self._buffers: dict[str, Tensor] = {}  # what the model computes with, by the targets' names
        self._pool: ThreadPoolExecutor | None = None
        self._mode = evaluating(model)

    def __enter__(self) -> Evaluator:
        self._mode.__enter__()
        self._originals = [(parameter, parameter.data) for parameter in self.model.parameters()]
        pruned = {id(layer.target.weight): layer.target.name for layer in self._layers}
        try:
            for parameter, dense in self._originals:
                if id(parameter) in pruned:  # its buffer is written before each use
                    parameter.data = torch.empty_like(dense, dtype=self.dtype)
                    self._buffers[pruned[id(parameter)]] = parameter.data
                elif dense.is_floating_point():
                    parameter.data = dense.to(self.dtype)
            if self.windows.device.type == "cpu":
                self._pool = ThreadPoolExecutor(torch.get_num_threads())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with interrupt_after():
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
            for parameter, dense in self._originals:
                parameter.data = dense
            self._originals = []
            self._buffers.clear()
            self._mode.__exit__(None, None, None)

    @torch.no_grad()
    def evaluate(self, root: Node, reference: Reference | None = None) -> Outcome:
        """Prune by ``root`` and measure the segments, until ``reference`` shows that it is out.

        A metric that gives a score or a likelihood that is not finite is dropped with the reason, not raised.
        """
        if not self._originals:
            raise RuntimeError("the evaluator is not open: use it in a with statement")
        start = time.perf_counter()
        dropped = self._prune(root)
        pruning = time.perf_counter() - start
        if dropped is not None:
            return Outcome(dropped=dropped, seconds=pruning, pruning_seconds=pruning)
        segments, count, stopped = raced(map(self._losses, self.windows), reference)
        tokens = count * self.windows.shape[1]
        if not math.isfinite(math.fsum(segments)):
            dropped, segments = "the pruned model gives NaN", []
        return Outcome(tuple(segments), stopped, dropped, tokens, time.perf_counter() - start, pruning)

    def _prune(self, root: Node) -> str | None:
        """Write the weights pruned by ``root`` into the parameters; the reason if a score is not finite.

        On a CPU the layers are spread over threads and each operation takes one: a layer's tensors stay in the cache of
        one core, selection (which has no threads of its own below a million weights) runs on all cores, and sums do
        not depend on how many there are.
        """
        if self._pool is None:
            return next(filter(None, (self._prune_layer(layer, root) for layer in self._layers)), None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            futures = [self._pool.submit(self._prune_layer, layer, root) for layer in self._layers]
            try:
                return next(filter(None, (future.result() for future in futures)), None)
            finally:  # after a reason or an error none may write on into the buffers
                for future in futures:
                    future.cancel()
                wait(futures)
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()  # threads do not inherit it
    def _prune_layer(self, layer: _Layer, root: Node) -> str | None:
        target = layer.target
        dense = to_matrix(layer.dense, target.cols, transposed=target.transposed).contiguous()
        k = kept_of(target.cols, self.sparsity)
        keep = []
        for weight, g, x in zip(dense.chunk(target.parts), layer.g, layer.x, strict=True):
            score = root.evaluate(weight, g, x)
            # One sum tells; only where it is not finite (it may overflow by itself) is every score looked at.
            if not math.isfinite(float(score.sum())) and not bool(torch.isfinite(score).all()):
                return f"a score of {target.name} is not finite"
            keep.append(select_rows(score.contiguous(), k, absolute=False))
        masked = dense * (keep[0] if len(keep) == 1 else torch.cat(keep))
        self._buffers[target.name].copy_(from_matrix(masked, layer.dense.shape, transposed=target.transposed))
        return None

    def _losses(self, window: Tensor) -> list[float]:
        """Negative log-likelihood of each segment of ``window`` [seq_len], summed in fp64 over its tokens."""
        logits = self.model(input_ids=window[None], use_cache=False).logits[0, :-1]  # [seq_len - 1, vocabulary]
        losses = []
        for part, following in zip(logits.split(SEGMENT), window[1:].split(SEGMENT), strict=True):
            # In fp32 a segment at a time: the logits of a whole window would be another 100 MB.
            loss = F.cross_entropy(part.float(), following.to(part.device), reduction="none")
            losses.append(round(float(loss.double().sum()), _DECIMALS))
        return losses


def perplexity_of(segments: Sequence[float], windows: Tensor) -> float:
    """exp of the mean over all predicted tokens of ``windows``; a lower bound if ``segments`` are not all of them."""
    mean = math.fsum(segments) / (len(windows) * (windows.shape[1] - 1))
    return math.exp(min(mean, _GREATEST_MEAN))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """bf16 for an fp32 model where its device is fast at it, else the model's own dtype."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    fast = parameter.dtype == torch.float32 and bf16_is_fast(parameter.device)
    return torch.bfloat16 if fast else parameter.dtype
