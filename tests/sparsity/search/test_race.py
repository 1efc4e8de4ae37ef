"""Racing: verdicts computed by hand, and searches over synthetic tables of likelihoods with and without it."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from trisparse.sparsity.search import SearchSettings
from trisparse.sparsity.search.evaluator import Outcome
from trisparse.sparsity.search.loop import Loop
from trisparse.sparsity.search.race import Reference, extrapolated, raced, student_quantile, verdict
from trisparse.sparsity.search.run import rounds


def test_student_quantile_near_the_true_one():
    # scipy.stats.t.isf(scipy.stats.norm.sf(4), degrees)
    for degrees, true in ((7, 8.46693), (15, 5.48038), (23, 4.87670)):
        assert student_quantile(degrees) == pytest.approx(true, rel=0.025)
    assert student_quantile(10**6) == pytest.approx(4, abs=1e-3)


def test_total_is_certain():
    reference = Reference((1.0,) * 10)
    assert verdict([4.0, 6.5], reference) == "total"
    assert verdict([4.0, 5.9], reference) is None


def test_paired_difference_against_its_error():
    reference = Reference((10.0,) * 16)
    # d = 1 + (+-) s: mean 1, sample deviation s * sqrt(8/7), so t = sqrt(8) / (s * sqrt(8/7)) = sqrt(7) / s
    bound = math.sqrt(7) / student_quantile(7)
    for factor, expected in ((0.99, "paired"), (1.01, None)):
        s = bound * factor
        assert verdict([11 + s, 11 - s] * 4, reference) == expected


def test_too_few_segments_or_a_full_text_give_no_verdict():
    reference = Reference((10.0,) * 9)
    assert verdict([11.0] * 7, reference) is None
    assert verdict([11.0] * 8, reference) == "paired"
    assert verdict([11.0] * 9, reference) is None
    with pytest.raises(ValueError, match="10 segments, the reference only 9"):
        verdict([11.0] * 10, reference)


def test_extrapolation_carries_the_difference_on():
    assert extrapolated([11.0, 12.0], Reference((10.0, 10.0, 20.0, 20.0))) == pytest.approx(60 + 1.5 * 4)


def test_race_reads_no_more_windows_than_it_needs():
    reference = Reference((10.0,) * 24)
    taken = []

    def windows(values):
        for value in values:
            taken.append(value)
            yield [value] * 8

    assert raced(windows([10.0, 11.5, 10.0]), None) == ([10.0] * 8 + [11.5] * 8 + [10.0] * 8, 3, None)
    taken.clear()
    segments, count, stopped = raced(windows([12.0, 10.0, 10.0]), reference)
    assert (len(segments), count, stopped, taken) == (8, 1, "paired", [12.0])
    taken.clear()
    segments, count, stopped = raced(windows([math.nan, 10.0]), reference)
    assert (count, stopped, taken[1:]) == (1, None, [])


class Unwritten:
    """A log that keeps nothing: syncing 350 lines takes longer than the search."""

    records = ()

    def append(self, record):
        json.dumps(record, allow_nan=False)


class Table:
    """Workers that read likelihoods from a synthetic table: 16 windows of 8 segments for each metric.

    A segment of 64 tokens has its own difficulty (100 to 260 nats), a metric its own loss per token, from 3.1 to 8, and
    both together a noise of 5 nats, as two pruned models differ on one segment. The quality follows the tree, so that
    offspring of good metrics are good: close races, not easy ones.
    """

    def __init__(self):
        generator = np.random.default_rng(0)
        self.difficulty = generator.uniform(-80, 80, 128)

    def segments(self, root):
        terms = [
            int.from_bytes(hashlib.sha256(repr(node).encode()).digest()[:4], "big") / 2**32 for node in root.walk()
        ]
        quality = 3.1 + 4.9 * float(np.mean(terms)) ** 1.5
        noise = np.random.default_rng(int(terms[0] * 2**32)).normal(0, 5, 128)
        return np.maximum(64 * quality + self.difficulty + noise, 1.0).round(4)

    def evaluate(self, roots, bar):
        for root in roots:
            found, count, stopped = raced((list(part) for part in self.segments(root).reshape(16, 8)), bar)
            yield Outcome(tuple(map(float, found)), stopped, None, 512 * count)


@pytest.mark.parametrize("seed", [0, 1])
def test_racing_spends_a_third_of_the_tokens_for_the_same_best(seed):
    ends = {}
    for race in (True, False):
        settings = SearchSettings(race=race, seed=seed)
        loop = Loop(settings, [], Unwritten(), Table(), torch.zeros(16, 512))
        for places in rounds(settings):
            loop.round(places)
        ends[race] = loop.population
    assert [found.expression for found in ends[True].parents] == [found.expression for found in ends[False].parents]
    assert ends[True].pool[0].perplexity == ends[False].pool[0].perplexity
    assert ends[True].full_tokens == ends[False].tokens == 512 * 16 * ends[False].evaluations
    assert 3 * ends[True].tokens <= ends[False].tokens
    assert ends[True].counts["paired"] > 0
