"""The sparsity of each cycle, against values computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trisparse.retrain.sparsity_schedule import SCHEDULES, pattern_schedule, sparsity_schedule
from trisparse.sparsity.pattern import NM, Rows, Unstructured


@pytest.mark.parametrize(
    ("schedule", "start", "target", "cycles", "expected"),
    [
        ("linear", 0.0, 0.9, 3, [0.3, 0.6, 0.9]),
        ("linear", 0.5, 0.9, 4, [0.6, 0.7, 0.8, 0.9]),
        # 0.8 - 0.8 (1 - i/4)³: 27/64, 8/64 and 1/64 of 0.8 are still missing
        ("cubic", 0.0, 0.8, 4, [0.4625, 0.7, 0.7875, 0.8]),
        # 0.9 - 0.4 (1/2)³
        ("cubic", 0.5, 0.9, 2, [0.85, 0.9]),
        # half of what is left goes each time
        ("geometric", 0.0, 0.875, 3, [0.5, 0.75, 0.875]),
        # 0.5 kept -> 0.08 kept in two steps of 0.4
        ("geometric", 0.5, 0.92, 2, [0.8, 0.92]),
        ("geometric", 0.0, 0.5, 1, [0.5]),
    ],
)
def test_by_hand(schedule, start, target, cycles, expected):
    assert sparsity_schedule(schedule, start, target, cycles) == pytest.approx(expected, abs=1e-12)


@given(st.sampled_from(SCHEDULES), st.floats(0, 0.5), st.floats(0.51, 0.999), st.integers(1, 20))
def test_rises_to_exactly_the_target(schedule, start, target, cycles):
    values = sparsity_schedule(schedule, start, target, cycles)
    assert len(values) == cycles
    assert values[-1] == target
    assert all(a < b for a, b in zip([start, *values], values, strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square", 0.0, 0.5, 3), "schedule must be one of linear, cubic, geometric, got 'square'"),
        (("linear", 0.0, 0.5, 0), "cycles must be an integer of at least 1, got 0"),
        (("linear", 0.0, 0.5, True), "cycles must be an integer of at least 1, got True"),
        (("linear", 0.5, 0.4, 3), r"target must be above the present sparsity 50\.0000% .* got 40\.0000%"),
        (("linear", 0.5, 0.5, 3), "target must be above the present sparsity"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsity_schedule(*arguments)


def test_patterns_keep_their_kind():
    assert pattern_schedule("linear", 0.0, Unstructured(0.5, "layer"), 2) == [
        Unstructured(0.25, "layer"),
        Unstructured(0.5, "layer"),
    ]
    assert pattern_schedule("linear", 0.0, Rows(0.5), 2) == [Rows(0.25), Rows(0.5)]


@pytest.mark.parametrize(
    ("schedule", "start", "target", "cycles", "expected"),
    [
        ("linear", 0.0, NM(2, 4), 2, [NM(3, 4), NM(2, 4)]),
        ("linear", 0.0, NM(4, 8), 4, [NM(7, 8), NM(6, 8), NM(5, 8), NM(4, 8)]),
        # 8 · 0.5 (1 - 1/8) = 3.5, to the even 4, is the target already: two cycles are too many; see below
        # 8 · (1 - 0.5^(1/2)) = 2.34
        ("geometric", 0.0, NM(4, 8), 2, [NM(6, 8), NM(4, 8)]),
        # 16 · 0.5 (1 - 1/8) = 7
        ("cubic", 0.0, NM(8, 16), 2, [NM(9, 16), NM(8, 16)]),
        ("linear", 0.5, NM(1, 4), 1, [NM(1, 4)]),
    ],
)
def test_n_of_m_falls(schedule, start, target, cycles, expected):
    assert pattern_schedule(schedule, start, target, cycles) == expected


@pytest.mark.parametrize(
    ("schedule", "start", "cycles", "message"),
    [
        (
            "linear",
            0.0,
            3,
            "target 2:4 has no 3 ascending steps by the linear .* 3:4 -> 3:4 -> 2:4; use at most 2 cycles",
        ),
        ("cubic", 0.0, 2, "from 0 sparsity it would go 2:4 -> 2:4"),
        ("linear", 0.3, 2, "from 0.3 sparsity it would go 2:4 -> 2:4; use at most 1 cycles"),
    ],
)
def test_n_of_m_without_steps(schedule, start, cycles, message):
    with pytest.raises(ValueError, match=message):
        pattern_schedule(schedule, start, NM(2, 4), cycles)
