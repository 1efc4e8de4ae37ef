import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.sparsity.allocation.rounding import largest_remainder, spread, whole_n


def test_spread_by_hand():
    # 4c + 2c + c = 9 gives c = 9/7, and the first would be 36/7 > 3: it gets 3, and the others 3c = 6.
    assert spread([4, 2, 1], [0, 0, 0], [3, 10, 10], 9).tolist() == pytest.approx([3, 4, 2])


def test_spread_with_a_lower_bound_and_a_base_by_hand():
    # 1 + c, 5 + c, 6 + c with sum 9 gives c = -1; the first would be 0 < 2: it gets 2, and the others 11 + 2c = 7.
    assert spread([1, 1, 1], [2, 0, 0], [9, 9, 9], 9, base=[1, 5, 6]).tolist() == pytest.approx([2, 3, 4])


def test_spread_refuses_what_the_bounds_exclude():
    with pytest.raises(ValueError, match="total must be between 2 and 5, got 6"):
        spread([1, 1], [1, 1], [2, 3], 6)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_spread_holds_sum_and_bounds_and_keeps_proportions_between(layers, share):
    slope = [layer[0] for layer in layers]
    low = [layer[1] for layer in layers]
    high = [layer[1] + layer[2] for layer in layers]
    total = sum(low) + share * (sum(high) - sum(low))
    found = spread(slope, low, high, total)
    assert found.sum() == pytest.approx(total, abs=1e-6)
    assert (found >= low).all()
    assert (found <= high).all()
    free = [x / s for x, s, lo, hi in zip(found, slope, low, high, strict=True) if lo < x < hi]
    assert np.ptp(free or [0]) <= 1e-6 * max(1, *free, 1)


def test_largest_remainder_by_hand():
    # 1 + 2 + 3 = 6 of 7; both halves are equal, so the lower index gets the one that is missing
    assert largest_remainder([1.5, 2.5, 3.0], 7) == [2, 2, 3]
    # 0 + 2 + 3 = 5 of 7; the fractions 0.9 and 0.8 get one each
    assert largest_remainder([0.9, 2.3, 3.8], 7) == [1, 2, 4]
    # what a sum of floats leaves behind is no fraction
    assert largest_remainder([0.1 + 0.2 + 2.7 - 1e-15, 4.0], 7) == [3, 4]


def test_largest_remainder_refuses_another_sum():
    with pytest.raises(ValueError, match="sum up to 9, got 7"):
        largest_remainder([3.0, 4.0], 9)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=30), st.floats(0, 1))
def test_largest_remainder_meets_every_total_within_one_of_the_ideal(sizes, share):
    total = round(sum(sizes) * share)
    ideal = [size * total / sum(sizes) for size in sizes]
    counts = largest_remainder(ideal, total)
    assert sum(counts) == total
    assert all(abs(count - x) < 1 + 1e-5 for count, x in zip(counts, ideal, strict=True))


def test_whole_n_by_hand():
    # 2:4 of three layers of one size: 2.6, 1.8 and 1.6 round to 3, 2, 2 = 7 of 6, and 1.6 is the cheapest to lower
    assert whole_n([2.6, 1.8, 1.6], [5, 5, 5], 4, [1, 1, 1], 30) == [3, 2, 1]
    # equal costs: the earlier layer gets the larger n
    assert whole_n([2.5, 2.5], [7, 7], 4, [1, 1], 35) == [3, 2]
    # layers of 1 and 2 groups: 3·1 + 1.5·2 = 6 is met by 4·1 + 1·2 and by 2·1 + 2·2, equally well
    assert whole_n([3, 1.5], [1, 2], 4, [1, 1], 6) == [4, 1]


def test_whole_n_says_when_there_is_none():
    with pytest.raises(ValueError, match="no n of n:4 for each layer gives 7 kept weights"):
        whole_n([1.75, 1.75], [2, 2], 4, [1, 1], 7)
    with pytest.raises(ValueError, match="no n of n:4"):
        whole_n([2, 2], [1, 3], 4, [4, 1], 8)  # 4 + 3n is not 8


@settings(deadline=None)
@given(st.data())
def test_whole_n_is_the_best_of_all_choices(data):
    m = data.draw(st.integers(2, 5))
    layers = data.draw(st.integers(1, 4))
    groups = [data.draw(st.integers(1, 9)) for _ in range(layers)]
    n = data.draw(st.integers(1, m - 1))
    total = n * sum(groups)
    ideal = spread([g * data.draw(st.floats(0.1, 4)) for g in groups], groups, [m * g for g in groups], total) / groups
    found = whole_n(ideal, groups, m, [1] * layers, total)

    def cost(choice):
        return sum(g * (one - x) ** 2 for g, one, x in zip(groups, choice, ideal, strict=True))

    assert np.dot(found, groups) == total
    choices = itertools.product(range(1, m + 1), repeat=layers)
    best = min(cost(choice) for choice in choices if np.dot(choice, groups) == total)
    assert cost(found) == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 10**4), min_size=2, max_size=12), st.integers(1, 7), st.integers(0, 2**32))
def test_whole_n_meets_the_total_with_sizes_that_have_no_common_divisor(groups, n, seed):
    weights = np.random.default_rng(seed).uniform(0.5, 2, len(groups)) * groups
    total = n * sum(groups)
    ideal = spread(weights, groups, [8 * g for g in groups], total) / groups
    found = whole_n(ideal, groups, 8, [1] * len(groups), total)
    assert sum(one * g for one, g in zip(found, groups, strict=True)) == total


def test_whole_n_gives_up_with_a_reason_where_a_search_would_need_too_much_memory():
    groups = [10**8 + 7, 10**8 + 9, 10**8 + 13]
    with pytest.raises(ValueError, match="common divisor is 1: too many ways to share"):
        whole_n([4, 4, 4], groups, 8, [1, 1, 1], 4 * sum(groups))
