"""Medians over rounds, exact intervals, and when a cell is unstable."""

import math
import random

import pytest

from longctx.analysis import statistics as st


def exact_rank(n):
    """The definition with whole numbers: the largest k whose two tails together stay within 5%."""
    tail, rank = 0, None
    for k in range(n // 2 + 1):
        tail += math.comb(n, k)
        if 2 * tail > 0.05 * 2**n:
            break
        rank = k + 1
    return rank


def test_round_median_is_the_median_of_round_medians():
    assert st.round_median([[1.0, 2.0, 9.0], [5.0], [3.0, 3.0]]) == 3.0
    assert st.round_median([[], [4.0]]) == 4.0
    assert st.round_median([]) is None
    assert st.median([]) is None


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 20, 33, 50, 131, 400])
def test_interval_is_exact(n):
    rank = exact_rank(n)
    assert st.median_ci95(range(n)) == [rank - 1, n - rank]


def test_no_interval_under_six_samples():
    assert st.median_ci95([1.0] * 5) is None
    assert st.median_ci95([]) is None


def test_interval_covers_the_median_about_95_times_in_100():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = st.median_ci95([rng.expovariate(1.0) for _ in range(20)])
        hits += low <= math.log(2) <= high
    assert 0.94 <= hits / 2000 <= 0.985


def test_interval_of_many_samples_is_found():
    low, high = st.median_ci95(range(100_001))
    assert low + high == 100_000
    assert 500 < high - low < 700


def test_spread():
    assert st.spread([1.0, 1.1, 0.9]) == pytest.approx(0.2)
    assert st.spread([1.0]) is None
    assert st.spread([0.0, 0.0]) is None


@pytest.mark.parametrize(
    ("samples", "unstable"),
    [
        ([[1.0, 1.001, 0.999, 1.0, 1.0, 1.002, 1.0, 0.999, 1.0, 1.0]] * 3, False),
        ([[1.0] * 10, [1.2] * 10, [1.0] * 10], True),
        ([[1.0] * 7 + [2.0] * 5] * 3, True),
        ([[0.7, 1.3, 0.8, 1.2, 1.0, 0.9, 1.1, 1.0]], True),
        ([[1.0, 2.0]], False),
        ([], False),
    ],
    ids=["steady", "rounds apart", "two modes", "wide", "too few to tell", "none"],
)
def test_unstable(samples, unstable):
    assert st.is_unstable(samples) is unstable


@pytest.mark.parametrize("value", [None, True, "3", float("nan"), float("inf"), 0, -1.0, 10**400, [1], 1e40])
def test_positive_refuses(value):
    assert st.positive(value) is None


def test_positive_passes_numbers_on():
    assert st.positive(3) == 3.0
