"""Who evaluates the metrics of a round: this process, or Ray actors on one machine or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.search.evaluator import Evaluator, Outcome
from trisparse.sparsity.search.measure import Statistics
from trisparse.sparsity.search.race import Reference
from trisparse.sparsity.targets import Target, find_targets

Engine = Literal["local", "ray"]
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True)
class Task:
    """What an evaluator is made of, without the model.

    Attributes:
        targets: names of the weights to prune.
        statistics: X and G.
        windows: int64 [windows, seq_len].
        sparsity: share of each row.
        dtype: compute dtype.
    """

    targets: tuple[str, ...]
    statistics: Statistics
    windows: Tensor
    sparsity: float
    dtype: torch.dtype

    def evaluator(self, model: nn.Module) -> Evaluator:
        """An evaluator of ``model``."""
        found: list[Target] = find_targets(model, include=self.targets).found
        return Evaluator(model, found, self.statistics, self.windows, sparsity=self.sparsity, dtype=self.dtype)


class Workers(Protocol):
    """Evaluates metrics."""

    def evaluate(self, roots: Sequence[Node], bar: Reference | None) -> Iterator[Outcome]:
        """Outcomes in the order of ``roots``, each raced against ``bar``."""
        ...


class _Local:
    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def evaluate(self, roots: Sequence[Node], bar: Reference | None) -> Iterator[Outcome]:
        for root in roots:
            yield self._evaluator.evaluate(root, bar)


class _Ray:
    def __init__(self, actors: Sequence[Any]) -> None:
        from ray.util import ActorPool

        self._pool = ActorPool(actors)

    def evaluate(self, roots: Sequence[Node], bar: Reference | None) -> Iterator[Outcome]:
        yield from self._pool.map(lambda actor, root: actor.evaluate.remote(root, bar), roots)


class _Actor:
    """Lives in a Ray worker with its own copy of the model, which stays open until the actor ends."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._evaluator = task.evaluator(model.to(device)).__enter__()

    def evaluate(self, root: Node, bar: Reference | None) -> Outcome:
        return self._evaluator.evaluate(root, bar)


def working(engine: Engine, model: nn.Module, task: Task, count: int) -> AbstractContextManager[Workers]:
    """Workers while open: this process, or ``count`` Ray actors.

    Ray is started on this machine if it runs nowhere: ``ray.init`` joins the cluster at ``$RAY_ADDRESS``. Model and
    statistics go through its object store, once a node. The actors share the cluster's processors evenly, and take one
    GPU each if it has as many.

    Raises:
        ValueError: an unknown engine.
        ModuleNotFoundError: Ray is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"workers must be one of {', '.join(ENGINES)}, got {engine!r}")
    return _local(model, task) if engine == "local" else _ray(model, task, count)


def default_batch(engine: str) -> int:
    """One for "local"; for "ray" one for each GPU of the cluster, or each machine if it has no GPU.

    A worker takes all processors of its machine: torch computes with them, and each worker holds a model.
    """
    if engine != "ray":
        return 1
    ray, started = _joined()
    try:
        return max(1, int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes()))
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _local(model: nn.Module, task: Task) -> Iterator[Workers]:
    with task.evaluator(model) as evaluator:
        yield _Local(evaluator)


@contextmanager
def _ray(model: nn.Module, task: Task, count: int) -> Iterator[Workers]:
    ray, started = _joined()
    actors: list[Any] = []
    try:
        resources = ray.cluster_resources()
        gpus = 1 if resources.get("GPU", 0) >= count else 0
        actor = ray.remote(num_cpus=max(1, int(resources["CPU"]) // count), num_gpus=gpus)(_Actor)
        held = [ray.put(model), ray.put(task)]  # once, not once for each actor
        actors = [actor.remote(*held) for _ in range(count)]
        yield _Ray(actors)
    finally:
        for member in actors:
            ray.kill(member)
        if started:
            ray.shutdown()


def _joined() -> tuple[Any, bool]:
    """Ray, initialised, and whether that was done here."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("workers='ray' needs Ray: run `pip install 'trisparse[search]'`") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    return ray, started
