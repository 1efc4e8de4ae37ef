"""The pool: the best, each of its own kind."""

from trisparse.sparsity.search import SearchSettings
from trisparse.sparsity.search.population import Population


def record(text, *segments, stopped=None):
    return {
        "kind": "evaluation",
        "simplified": text,
        "segments": list(segments),
        "perplexity": None if stopped else sum(segments),
        "stopped": stopped,
        "dropped": None,
        "tokens": 64 * len(segments),
        "full_tokens": 128,
        "skipped": {"form": 2},
        "seconds": 1.0,
    }


def test_pool_is_sorted_bounded_and_without_the_stopped():
    population = Population(SearchSettings(population=3, top=2))
    assert population.bar is None
    population.apply([record("W", 3.0, 3.0), record("G", 9.0, stopped="paired"), record("abs(W)", 1.0, 1.0)])
    population.apply([record("-W", 2.0, 2.0), record("abs(G)", 4.0, 4.0)])
    assert [(one.expression, one.number) for one in population.pool] == [("abs(W)", 2), ("-W", 3), ("W", 0)]
    assert [one.expression for one in population.parents] == ["abs(W)", "-W"]
    assert population.bar.segments == (2.0, 2.0)
    assert (population.evaluations, population.tokens, population.full_tokens) == (5, 64 * 9, 128 * 5)
    assert population.counts == {"full": 4, "paired": 1, "skipped form": 10}
    assert Population(SearchSettings(race=False, top=2), pool=population.pool).bar is None


def test_a_twin_does_not_enter_the_pool():
    population = Population(SearchSettings(population=3, top=2))
    population.apply([record("G", 2.0, 1.0), record("tanh(G)", 2.0, 1.0), record("W", 1.0, 2.0)])
    assert [one.expression for one in population.pool] == ["G", "W"]
    assert population.counts["twin"] == 1
