"""Which metric is evaluated next: a random tree, or an offspring of two of the best, that is new.

A tree that simplifies to one seen before, or whose masks on a small sample are those of one seen before, is never
evaluated; the next attempt draws another. Every attempt has a random generator of its own, made from the seed and its
place in the search, so there is no hidden state to save.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.fingerprint import fingerprint
from trisparse.sparsity.metric.simplify import simplify
from trisparse.sparsity.metric.text import infix
from trisparse.sparsity.search.population import Population
from trisparse.sparsity.search.settings import SearchSettings
from trisparse.sparsity.search.trees import crossover, mutated, problem, random_tree, repaired

# Then the search passes over this place: the space around its parents holds nothing new.
_ATTEMPTS = 500


@dataclass(frozen=True)
class Proposal:
    """A metric to evaluate.

    Attributes:
        iteration, slot: its place in the search; iteration 0 is the first population.
        origin: "random", "crossover", "crossover and mutation", or "given".
        parents: numbers of the parents' evaluations.
        tree: as it was made; None where no attempt found anything new.
        root: simplified; what is evaluated and inherited.
        form: ``root`` as text.
        fingerprint: of ``root``.
        skipped: attempts before it, by reason: "shape", "depth", "form" or "fingerprint".
    """

    iteration: int
    slot: int
    origin: str = ""
    parents: tuple[int, ...] = ()
    tree: Node | None = None
    root: Node | None = None
    form: str = ""
    fingerprint: str = ""
    skipped: dict[str, int] = field(default_factory=dict)


def propose(population: Population, given: list[Node], iteration: int, slot: int) -> Proposal:
    """The metric for a place in the search; it is marked as seen in ``population``.

    Args:
        population: at the start of the round, with what the round proposed before.
        given: metrics to start from, for the first slots of iteration 0.
        iteration, slot: the place.
    """
    settings = population.settings
    skipped: dict[str, int] = {}
    parents: tuple[int, ...]
    for attempt in range(_ATTEMPTS):
        rng = random.Random(f"{settings.seed} {iteration} {slot} {attempt}")
        if iteration == 0 and attempt == 0 and slot < len(given):
            tree, origin, parents = given[slot], "given", ()
        else:
            tree, origin, parents = _made(rng, population, iteration)
        reason: str | None = None if all(tree.shape) else "shape"
        if reason is None:
            root = simplified(tree, settings)
            form = infix(root)
            reason = _seen(population, root, form, origin)
        if reason is None:
            mark = fingerprint(root)
            reason = "fingerprint" if mark in population.fingerprints else None
            population.forms.add(form)
        if reason is None:
            population.fingerprints.add(mark)
            return Proposal(iteration, slot, origin, parents, tree, root, form, mark, skipped)
        skipped[reason] = skipped.get(reason, 0) + 1
    return Proposal(iteration, slot, skipped=skipped)


def simplified(tree: Node, settings: SearchSettings) -> Node:
    """The tree that is evaluated and inherited: for row-wise masks, with opposing operations cancelled if so set."""
    return simplify(tree, opposing=settings.opposing)


def _made(rng: random.Random, population: Population, iteration: int) -> tuple[Node, str, tuple[int, ...]]:
    settings = population.settings
    parents = population.parents
    if iteration == 0 or settings.strategy == "random" or len(parents) < 2:
        return random_tree(rng, settings), "random", ()
    first, second = rng.sample(parents, 2)
    child = crossover(rng, first.root, second.root)
    changed = mutated(rng, child, settings)
    origin = "crossover" if changed == child else "crossover and mutation"
    return repaired(rng, changed, settings), origin, (first.number, second.number)


def _seen(population: Population, root: Node, form: str, origin: str) -> str | None:
    # A given metric may be deeper than the offspring may.
    if (reason := problem(root, population.settings)) is not None and (reason != "depth" or origin != "given"):
        return reason
    return "form" if form in population.forms else None
