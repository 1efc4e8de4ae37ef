"""Pruning as it is usually written, for comparison: sample by sample; Wanda and SparseGPT in two passes of each block.

Wanda: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3. SparseGPT:
Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", algorithm 1, with
one Hessian and one factorisation for each linear layer, blocks of 128 columns, and one step of Python per column.
Magnitude: the layer-wide threshold of Wanda's code. Pruner-Zero: Dong et al. 2024, Eq. 2, with gradients of the whole
model, one backward pass for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trisparse.bench.families.usual_selection import published_metric, usual_nm, usual_rows

_BLOCK = 128
_DAMPING = 0.01


class Layer(Protocol):
    """What a method keeps of one linear layer."""

    def add(self, x: Tensor) -> None:
        """Take the layer's input for one sample, [tokens, cols]."""

    def prune(self) -> None:
        """Prune the layer's weight in place."""


class WandaLayer:
    """Sum of squares of each input; the lowest |W| · ‖X‖ of every row are pruned.

    Args:
        linear: the layer.
        sparsity: pruned share of each row.
        n_of_m: (kept, group) instead, or None.
    """

    def __init__(self, linear: nn.Linear, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        self.linear, self.sparsity, self.n_of_m = linear, sparsity, n_of_m
        self.squares = torch.zeros(linear.in_features, device=linear.weight.device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Update the running mean over samples of the squared norm of each input."""
        self.squares *= self.samples / (self.samples + 1)
        self.samples += 1
        self.squares += torch.norm(x.float().t(), p=2, dim=1) ** 2 / self.samples

    def prune(self) -> None:
        """Sort every row, stably, and set the lowest to zero."""
        weight = self.linear.weight.data
        scores = weight.abs() * self.squares.sqrt().reshape(1, -1)
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        if self.n_of_m is None:
            order = torch.sort(scores, dim=-1, stable=True)[1]
            pruned.scatter_(1, order[:, : int(scores.shape[1] * self.sparsity)], True)
        else:
            n, m = self.n_of_m
            for start in range(0, scores.shape[1], m):
                lowest = torch.topk(scores[:, start : start + m], m - n, dim=1, largest=False)[1]
                pruned.scatter_(1, start + lowest, True)
        weight[pruned] = 0


class SparseGPTLayer:
    """The Hessian of one layer; masks are chosen block by block, and the columns after take up the error.

    Args: as for :class:`WandaLayer`.
    """

    def __init__(self, linear: nn.Linear, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        self.linear, self.sparsity, self.n_of_m = linear, sparsity, n_of_m
        self.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Update the running mean over samples of 2 x xᵀ."""
        self.hessian *= self.samples / (self.samples + 1)
        self.samples += 1
        columns = (2 / self.samples) ** 0.5 * x.float().t()
        self.hessian += columns.matmul(columns.t())

    def prune(self) -> None:
        """Solve the layer, a column at a time."""
        weight, hessian = self.linear.weight.data.clone().float(), self.hessian
        columns = weight.shape[1]
        dead = torch.diag(hessian) == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        diagonal = torch.arange(columns, device=weight.device)
        hessian[diagonal, diagonal] += _DAMPING * torch.mean(torch.diag(hessian))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            block = weight[:, start:end].clone()
            done, errors = torch.zeros_like(block), torch.zeros_like(block)
            inside = factor[start:end, start:end]
            pruned = torch.zeros_like(block, dtype=torch.bool)
            if self.n_of_m is None:
                saliency = block**2 / torch.diag(inside).reshape(1, -1) ** 2
                threshold = torch.sort(saliency.flatten())[0][int(saliency.numel() * self.sparsity)]
                pruned = saliency <= threshold
            for column in range(end - start):
                value, scale = block[:, column], inside[column, column]
                if self.n_of_m is not None and column % self.n_of_m[1] == 0:
                    n, m = self.n_of_m
                    group = slice(column, column + m)
                    saliency = block[:, group] ** 2 / torch.diag(inside)[group].reshape(1, -1) ** 2
                    lowest = torch.topk(saliency, m - n, dim=1, largest=False)[1]
                    pruned.scatter_(1, column + lowest, True)
                kept = value.clone()
                kept[pruned[:, column]] = 0
                done[:, column] = kept
                error = (value - kept) / scale
                block[:, column:] -= error.unsqueeze(1).matmul(inside[column, column:].unsqueeze(0))
                errors[:, column] = error
            weight[:, start:end] = done
            weight[:, end:] -= errors.matmul(factor[start:end, end:])
        self.linear.weight.data = weight.to(self.linear.weight.dtype)


METHODS: dict[str, Callable[[nn.Linear, float, tuple[int, int] | None], Layer]] = {
    "wanda": WandaLayer,
    "sparsegpt": SparseGPTLayer,
}


@torch.no_grad()
def prune_as_usual(
    model: Any, windows: Tensor, method: str, sparsity: float, n_of_m: tuple[int, int] | None = None
) -> None:
    """Prune a Llama-like ``model`` in place, block by block, each run on every sample before and after it is pruned.

    Args:
        model: with its blocks in ``model.model.layers``, in fp32.
        windows: token ids [samples, seq_len].
        method: of :data:`METHODS`.
        sparsity: pruned share.
        n_of_m: (kept, group) instead, or None.
    """
    model.eval()
    model.config.use_cache = False
    hidden, arguments = _inputs_of_the_first_block(model, windows)
    leaving = torch.zeros_like(hidden)
    for block in model.model.layers:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        layers = [METHODS[method](linear, sparsity, n_of_m) for linear in linears]
        handles = [
            linear.register_forward_hook(lambda _, args, __, layer=layer: layer.add(args[0].flatten(0, -2)))
            for linear, layer in zip(linears, layers, strict=True)
        ]
        for sample in range(len(hidden)):
            leaving[sample] = _run(block, hidden[sample], arguments)
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.prune()
        for sample in range(len(hidden)):
            leaving[sample] = _run(block, hidden[sample], arguments)
        hidden, leaving = leaving, hidden


@torch.no_grad()
def prune_magnitude_as_usual(model: Any, sparsity: float) -> None:
    """Prune the linear layers of the blocks of ``model`` in place by a threshold in each: the sorted |W|'s.

    Args: as for :func:`prune_as_usual`.
    """
    for linear in _linears(model):
        weight = linear.weight.data
        size = weight.abs()
        threshold = torch.sort(size.flatten())[0][int(weight.numel() * sparsity)]
        weight[size <= threshold] = 0


def prune_by_gradients_as_usual(
    model: Any, windows: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None
) -> None:
    """Prune by Pruner-Zero's published metric |W · W| · mms(G), in place.

    G is the root of the sum over samples of the squared gradient of the language-model loss.

    Args: as for :func:`prune_as_usual`.
    """
    linears = _linears(model)
    squares = [torch.zeros_like(linear.weight, dtype=torch.float32) for linear in linears]
    for window in windows.to(model.device):
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for linear, total in zip(linears, squares, strict=True):
            total += linear.weight.grad.float() ** 2  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for linear, total in zip(linears, squares, strict=True):
            metric = published_metric(linear.weight, total.sqrt())
            kept = (
                usual_rows(metric, metric.shape[1] - int(metric.shape[1] * sparsity))
                if n_of_m is None
                else usual_nm(metric, *n_of_m)
            )
            linear.weight[~kept] = 0


def _linears(model: Any) -> list[nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


class _FirstBlockReached(Exception):  # noqa: N818 - control flow, not an error
    pass


def _inputs_of_the_first_block(model: Any, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    entering: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0])
        arguments.update(kwargs)
        raise _FirstBlockReached

    handle = model.model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    for window in windows.to(model.device):
        try:
            model(window[None])
        except _FirstBlockReached:
            continue
    handle.remove()
    return torch.cat(entering), arguments


def _run(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = block(hidden[None], **arguments)
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first
