"""Proposals: new metrics only, with what was skipped on the way and how often opposing operations cancelled."""

import pytest

from trisparse.sparsity.metric import parse
from trisparse.sparsity.search import SearchSettings, propose
from trisparse.sparsity.search.population import Individual, Population
from trisparse.sparsity.search.propose import simplified


@pytest.fixture
def drawing(monkeypatch):
    """Function that makes the random trees come from a list, given as expressions."""

    def draw(*expressions):
        left = [parse(f"({text}) + W").left for text in expressions]  # also values of another shape than W
        monkeypatch.setattr(propose, "random_tree", lambda rng, settings: left.pop(0))

    return draw


def test_duplicates_and_wrong_shapes_are_skipped_and_counted(drawing):
    population = Population(SearchSettings())
    drawing("abs(W) * X", "norm2(W)", "X * abs(W)", "sqr(W) * sqr(X)", "abs(abs(abs(abs(tanh(W) * G) * X)))", "G")
    first = propose.propose(population, [], 0, 0)
    assert (first.form, first.origin, first.skipped) == ("abs(W) * X", "random", {})
    second = propose.propose(population, [], 0, 1)
    assert sum(second.skipped.values()) >= 3
    assert second.skipped["shape"] == 1
    assert second.skipped["form"] >= 1
    assert second.form not in ("abs(W) * X", "sqr(W) * sqr(X)")  # the square of Wanda ranks as Wanda does
    assert {first.form, second.form} <= population.forms
    assert {first.fingerprint, second.fingerprint} <= population.fingerprints


def test_equal_masks_are_found_by_fingerprint_where_no_rule_sees_them(drawing):
    population = Population(SearchSettings())
    drawing("abs(W)", "abs(W) + abs(W) * sqr(norm2(W))", "G")
    propose.propose(population, [], 0, 0)
    second = propose.propose(population, [], 0, 1)
    assert second.form == "G"
    assert sum(second.skipped.values()) == 1


def test_opposing_is_an_option():
    tree = parse("log(exp(W)) * G")
    assert simplified(tree, SearchSettings()).depth == 2
    assert simplified(tree, SearchSettings(opposing=False)).depth == 4


def test_offspring_are_no_deeper_than_the_limit_and_have_no_x_under_a_unary_operation():
    settings = SearchSettings(top=3, most_depth=4)
    population = Population(settings)
    for number, text in enumerate(("abs(W) * X", "sqrt(G) * (W - X)", "tanh(W * X) + mms(G)")):
        population.pool.append(Individual(number, parse(text), text, 10.0 + number, (1.0 + number,)))
    for iteration in range(1, 60):
        proposal = propose.propose(population, [], iteration, 0)
        assert proposal.root.depth <= 4
        assert all(proposal.root.shape)
        assert not any(len(n.operands) == 1 and n.left.data == "X" for n in proposal.tree.walk())
        assert proposal.origin.startswith("crossover")


def test_a_proposal_depends_on_seed_and_place_alone():
    def forms(seed):
        population = Population(SearchSettings(seed=seed))
        return [propose.propose(population, [], 0, slot).form for slot in range(5)]

    assert forms(0) == forms(0)
    assert forms(0) != forms(1)
