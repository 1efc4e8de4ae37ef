"""Random inputs and random trees."""

import random

import pytest
import torch

from trisparse.sparsity.metric.expression import Node, number
from trisparse.sparsity.metric.operations import OPERATIONS


@pytest.fixture
def inputs():
    """W, G and X of a 16 x 24 matrix, heavy-tailed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 24, generator=generator)
    g = 0.3 * torch.randn(16, 24, generator=generator).exp()
    return w, g, torch.randn(24, generator=generator).exp()


@pytest.fixture
def random_trees():
    """Function (count, seed) -> trees over the whole vocabulary whose value has W's shape."""

    def tree(choose, depth):
        if depth == 0 or choose.random() < 0.15:
            is_number = choose.random() < 0.15
            return number(choose.choice([0, 1, -1, 2, 0.5, -3])) if is_number else Node(choose.choice("WWGX"))
        often = ["mul", "add", "abs", "sqr", "sqrt", "neg", "sub", "mms"]
        name = choose.choice(list(OPERATIONS) if choose.random() < 0.5 else often)
        return Node(name, tuple(tree(choose, depth - 1) for _ in range(OPERATIONS[name].arity)))

    def trees(count, seed=0):
        choose, found = random.Random(seed), []
        while len(found) < count:
            node = tree(choose, choose.randint(1, 5))
            if all(node.shape):
                found.append(node)
        return found

    return trees
