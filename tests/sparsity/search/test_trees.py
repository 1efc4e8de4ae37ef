"""Random trees, crossover and mutation."""

import random

import pytest

from trisparse.sparsity.metric import Node, parse
from trisparse.sparsity.metric.operations import OPERATIONS
from trisparse.sparsity.search import SearchSettings
from trisparse.sparsity.search.trees import crossover, mutated, operation_counts, problem, random_tree, repaired

SETTINGS = SearchSettings()


def x_under_unary(tree):
    return any(len(node.operands) == 1 and node.left.data == "X" for node in tree.walk())


def forest(settings=SETTINGS, count=400):
    return [random_tree(random.Random(seed), settings) for seed in range(count)]


def test_random_trees_have_every_depth_of_the_range_and_no_other():
    assert {tree.depth for tree in forest()} == {3, 4, 5}


def test_random_trees_have_no_x_under_a_unary_operation():
    assert not any(map(x_under_unary, forest()))
    assert any("X" in tree.inputs for tree in forest())


def test_random_trees_use_the_whole_published_vocabulary_and_nothing_else():
    used = {node.data for tree in forest() for node in tree.walk()}
    assert used == {name for name, operation in OPERATIONS.items() if operation.published} | {"W", "G", "X"}


def test_extended_vocabulary_numbers_and_inputs_are_options():
    trees = forest(SearchSettings(operations="extended", numbers=0.2, inputs="WX"))
    used = {node.data for tree in trees for node in tree.walk()}
    assert {"ratio", "rowsum", "colsum", ""} <= used
    assert "G" not in used


def test_the_same_seed_gives_the_same_tree():
    assert forest(count=20) == forest(count=20)
    assert len(set(forest(count=20))) == 20


def test_crossover_grafts_a_subtree_of_the_second_into_the_first():
    first, second = parse("abs(W) * X"), parse("sqr(G) + log(G)")
    children = {crossover(random.Random(seed), first, second) for seed in range(300)}
    subtrees = list(second.walk())
    expected = {
        *subtrees,
        *(Node("mul", (graft, first.right)) for graft in subtrees),
        *(Node("mul", (first.left, graft)) for graft in subtrees),
        *(Node("mul", (Node("abs", (graft,)), first.right)) for graft in subtrees),
    }
    assert children == expected


def test_mutation_changes_one_node_within_its_arity():
    tree = parse("abs(W) * X")
    settings = SearchSettings(mutation_probability=1.0)
    for seed in range(100):
        changed = mutated(random.Random(seed), tree, settings)
        pairs = list(zip(tree.walk(), changed.walk(), strict=True))
        assert [len(a.operands) for a, _ in pairs] == [len(b.operands) for _, b in pairs]
        assert sum(a.data != b.data for a, b in pairs) == 1


def test_mutation_happens_with_its_probability():
    tree = parse("abs(W) * X")
    changes = sum(mutated(random.Random(seed), tree, SETTINGS) != tree for seed in range(1000))
    assert 440 < changes < 560  # four standard deviations of a fair coin
    assert mutated(random.Random(0), tree, SearchSettings(mutation_probability=0.0)) == tree


def test_mutation_of_each_node_changes_half_of_them():
    tree = parse("(abs(W) * X + sqrt(G)) * tanh(W - G)")
    nodes = sum(1 for _ in tree.walk())
    settings = SearchSettings(mutation="each-node")
    changed = [mutated(random.Random(seed), tree, settings) for seed in range(400)]
    differing = sum(a.data != b.data for new in changed for a, b in zip(tree.walk(), new.walk(), strict=True))
    assert 0.45 < differing / (400 * nodes) < 0.55


def test_repair_replaces_x_under_unary_operations_only():
    tree = parse("abs(X) + sqrt(X * W)")
    fixed = repaired(random.Random(1), tree, SETTINGS)
    assert not x_under_unary(fixed)
    assert fixed.right == tree.right
    assert fixed.left.data == "abs"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("abs(W) * X", None), ("norm2(W)", "shape"), ("X + X", "shape"), ("abs(abs(abs(abs(abs(W)))))", "depth")],
)
def test_problem_names_what_keeps_a_tree_out(text, reason):
    tree = parse(f"W + ({text})").right  # by itself, parse refuses a value of another shape
    assert problem(tree, SETTINGS) == reason


def test_operation_counts():
    assert operation_counts(parse("abs(W * W) * mms(G) * 2")) == {
        "G": 1,
        "W": 2,
        "abs": 1,
        "mms": 1,
        "mul": 3,
        "number": 1,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"population": 1}, "population must be an integer of at least 2"),
        ({"top": 1}, "top must be"),
        ({"batch": 0}, "batch must be"),
        ({"least_depth": 5, "most_depth": 4}, "most_depth must be an integer of at least 5"),
        ({"strategy": "annealing"}, "strategy must be one of evolution, random"),
        ({"mutation": "all"}, "mutation must be one of"),
        ({"operations": "all"}, "operations must be one of"),
        ({"mutation_probability": 1.5}, "mutation_probability must be between 0 and 1"),
        ({"numbers": -0.1}, "numbers must be between 0 and 1"),
        ({"sparsity": "2:4"}, "sparsity must be a share of each row"),
        ({"inputs": "GX"}, "inputs must be W with"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**wrong)


def test_defaults_are_the_papers():
    assert (SETTINGS.population, SETTINGS.iterations, SETTINGS.top) == (50, 300, 10)
    assert (SETTINGS.least_depth, SETTINGS.most_depth, SETTINGS.mutation_probability) == (3, 5, 0.5)
    assert SETTINGS.share == 0.5
    assert SearchSettings(sparsity="60%").share == 0.6
