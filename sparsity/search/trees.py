"""Random trees, subtree crossover and node mutation: the genetic operators of Pruner-Zero (section 3.2, appendix D).

Every function takes the random generator that it draws from, so that an offspring depends on nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS
from trisparse.sparsity.search.settings import SearchSettings

Path = tuple[int, ...]  # which operand to take at each level, from the root

# Chance that a node above the least depth is a leaf. With 19 operations, half of them unary, trees of depth 3
# to 5 then have 4 to 15 nodes.
_LEAF_PROBABILITY = 0.3


def random_tree(rng: random.Random, settings: SearchSettings) -> Node:
    """A tree of a depth drawn from least_depth to most_depth, with no X directly under a unary operation.

    Every tree has a branch of exactly that depth. Its value need not have W's shape: see :func:`problem`.
    """
    return _grow(rng, settings, rng.randint(settings.least_depth, settings.most_depth))


def problem(tree: Node, settings: SearchSettings) -> str | None:
    """Why ``tree`` cannot be a metric of this search, in a word, or None."""
    if not all(tree.shape):
        return "shape"
    if tree.depth > settings.most_depth:
        return "depth"
    return None


def crossover(rng: random.Random, first: Node, second: Node) -> Node:
    """``first`` with one of its subtrees, drawn at random, replaced by one of ``second``.

    The paper exchanges the two subtrees; the other half of the exchange is the crossover of (second, first), which
    is as likely to be drawn.
    """
    place = rng.choice([path for path, _ in _places(first)])
    graft = rng.choice([node for _, node in _places(second)])
    return _replaced(first, place, graft)


def mutated(rng: random.Random, tree: Node, settings: SearchSettings) -> Node:
    """``tree`` with one node, or each, changed with the mutation probability: an operation into another one of its
    arity, a leaf into another leaf."""
    places = [path for path, _ in _places(tree)]
    if settings.mutation == "one-node":
        places = [rng.choice(places)]
    for place in places:  # the paths stay valid: a mutation keeps the arity
        if rng.random() < settings.mutation_probability:
            tree = _replaced(tree, place, _mutated_node(rng, _at(tree, place), settings))
    return tree


def repaired(rng: random.Random, tree: Node, settings: SearchSettings) -> Node:
    """``tree`` with every X that is the operand of a unary operation replaced by another leaf, as in the paper."""
    for path, node in list(_places(tree)):
        if len(node.operands) == 1 and node.left.data == "X":
            tree = _replaced(tree, (*path, 0), _leaf(rng, settings, under_unary=True))
    return tree


def operation_counts(tree: Node) -> dict[str, int]:
    """How often each operation and input occurs, by name; numbers as "number"."""
    counts: dict[str, int] = {}
    for node in tree.walk():
        counts[node.data or "number"] = counts.get(node.data or "number", 0) + 1
    return dict(sorted(counts.items()))


def _grow(rng: random.Random, settings: SearchSettings, depth: int, *, full: bool = True, unary: bool = False) -> Node:
    """A tree of at most ``depth`` levels, of exactly so many if ``full``; ``unary`` if a unary operation is above."""
    if depth == 1 or (not full and rng.random() < _LEAF_PROBABILITY):
        return _leaf(rng, settings, under_unary=unary)
    names = (*settings.unary, *settings.binary)
    operation = OPERATIONS[rng.choice(names)]
    if operation.arity == 1:
        return Node(operation.name, (_grow(rng, settings, depth - 1, full=full, unary=True),))
    deep = rng.randrange(2)
    operands = (_grow(rng, settings, depth - 1, full=full and side == deep) for side in range(2))
    return Node(operation.name, tuple(operands))


def _leaf(rng: random.Random, settings: SearchSettings, *, under_unary: bool = False, other_than: str = "") -> Node:
    if settings.numbers and rng.random() < settings.numbers:
        return Node("", number=round(rng.choice((-1, 1)) * 10 ** rng.uniform(-2, 1), 3))
    names = [name for name in INPUTS if name in settings.inputs and not (under_unary and name == "X")]
    names = [name for name in names if name != other_than] or names
    return Node(rng.choice(names))


def _mutated_node(rng: random.Random, node: Node, settings: SearchSettings) -> Node:
    if not node.operands:
        return _leaf(rng, settings, other_than=node.data)
    names = settings.unary if len(node.operands) == 1 else settings.binary
    return Node(rng.choice([name for name in names if name != node.data]), node.operands)


def _places(tree: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    yield path, tree
    for index, operand in enumerate(tree.operands):
        yield from _places(operand, (*path, index))


def _at(tree: Node, path: Path) -> Node:
    for index in path:
        tree = tree.operands[index]
    return tree


def _replaced(tree: Node, path: Path, subtree: Node) -> Node:
    if not path:
        return subtree
    operands = list(tree.operands)
    operands[path[0]] = _replaced(operands[path[0]], path[1:], subtree)
    return Node(tree.data, tuple(operands))
