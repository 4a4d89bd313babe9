"""Exponents of made-up curves with known noise: how far off they are, and how often their interval holds the truth."""

import numpy as np
import pytest

from longctx.analysis.laws import Law, fit, missing_lengths

EIGHT = [512 << i for i in range(8)]
FIVE = [1024 << i for i in range(5)]
SEEDS = 200


def made(seed, exponent, floor, lengths, *, rounds, noise=0.02, shared=0.0):
    """(points, samples): floor in smallest slope terms, `noise` on every sample, `shared` on a whole round."""
    generator = np.random.default_rng(seed)
    factors = np.exp(generator.normal(0, shared, max(1, rounds)))
    points, samples = {}, {}
    for t in lengths:
        y = 1e-7 * (floor * lengths[0] ** exponent + t**exponent)
        values = y * factors * (1 + noise * generator.normal(size=max(1, rounds)))
        points[t] = float(np.median(values))
        if rounds:
            samples[t] = [[float(v)] for v in values]
    return points, samples


def fitted(*arguments, seeds=SEEDS, **options):
    return [fit(*made(seed, *arguments, **options)) for seed in range(seeds)]


def coverage(found, exponent):
    return np.mean([law.low <= exponent <= law.high for law in found])


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("floor", [0, 10])
@pytest.mark.parametrize("rounds", [0, 3])
def test_exponents_and_their_intervals(exponent, floor, rounds):
    found = fitted(exponent, floor, EIGHT, rounds=rounds)
    assert max(abs(law.exponent - exponent) for law in found) <= (0.2 if floor else 0.05)
    assert 0.90 <= coverage(found, exponent) <= 0.98
    assert all(law.is_law and law.low <= law.exponent <= law.high for law in found)


@pytest.mark.parametrize("floor", [0, 10])
def test_five_lengths_and_rounds_that_share_their_noise(floor):
    found = fitted(1.0, floor, FIVE, rounds=3, shared=0.03)
    assert 0.90 <= coverage(found, 1.0) <= 0.985
    assert max(abs(law.exponent - 1.0) for law in found) <= (0.2 if floor else 0.06)


def test_a_local_slope_covers_too():
    found = fitted(1.5, 0, FIVE[:4], rounds=3)
    assert not any(law.is_law for law in found)
    assert 0.90 <= coverage(found, 1.5) <= 0.98


def test_the_floor_is_found():
    law = fit({t: 2e-4 + 3e-9 * t**1.5 for t in EIGHT})
    assert (law.exponent, law.floor, law.factor) == pytest.approx((1.5, 2e-4, 3e-9), rel=1e-3)
    assert law.at(1 << 17) == pytest.approx(2e-4 + 3e-9 * (1 << 17) ** 1.5, rel=1e-2)
    assert fit({t: 3e-9 * t**1.5 for t in EIGHT}).floor == 0.0


def test_rounds_of_different_slopes_widen_the_interval():
    tilts = (-0.05, 0.0, 0.05)
    samples = {t: [[1e-6 * t * (t / 512) ** tilt] for tilt in tilts] for t in EIGHT}
    law = fit({t: 1e-6 * t for t in EIGHT}, samples)
    assert law.high - law.low > 0.1


def test_launch_bound_lengths_are_taken_up_by_the_floor_and_left_out_of_slopes():
    points = {t: max(3e-4, 2e-8 * t) for t in (1024 << i for i in range(10))}
    bound = [t for t in points if 2e-8 * t < 3e-4]
    law = fit(points, bound=bound)
    assert law.is_law and law.exponent == pytest.approx(1.0, abs=0.02)
    assert fit(points, bound=list(points)) is None
    slope = fit({t: points[t] for t in (8192, 16384, 32768)}, bound=[8192])
    assert not slope.is_law and slope.shortest == 16384 and slope.exponent == pytest.approx(1.0, abs=0.01)


def law(low, high):
    shared = {"floor": 0.0, "factor": 1.0, "is_law": True, "shortest": 1, "longest": 2, "count": 2, "noise": 0.0}
    return Law(exponent=(low + high) / 2, low=low, high=high, **shared)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.97, 1.03, "linear"),
        (1.95, 2.10, "quadratic"),
        (1.2, 1.6, "between"),
        (0.4, 0.6, "sublinear"),
        (-0.1, 0.1, "constant"),
        (-0.8, -0.6, "falling"),
        (2.3, 2.5, "above quadratic"),
        (0.7, 1.2, "about linear"),
        (1.7, 2.2, "about quadratic"),
        (0.8, 2.1, "unclear"),
    ],
)
def test_words_come_from_the_interval(low, high, word):
    assert law(low, high).word == word


def test_the_lengths_that_make_a_law():
    assert missing_lengths([1024, 2048, 4096, 8192]) == (16384,)
    assert missing_lengths(EIGHT) == ()
    added = missing_lengths([2048, 8192, 65536])
    assert len(added) == 2 and all(2048 < t < 65536 for t in added)
    assert missing_lengths([1024, 2048, 4096, 8192], failed=[16384]) == (512,)
    assert min(missing_lengths([1024, 2048, 4096], bound=[1024, 2048, 4096])) > 4096


@pytest.mark.parametrize(
    "points",
    [
        {},
        {1024: 1.0},
        {t: float("nan") for t in EIGHT},
        dict.fromkeys(EIGHT),
        dict.fromkeys(EIGHT, 1.0),
        {t: 1.0 / t for t in EIGHT},
        {t: 1e29 if i % 2 else 1e-29 for i, t in enumerate(EIGHT)},
        {1 << 50: 1.0, 1: 2.0, 2: 1e-29, 3: 4.0, 4: 1e29},
    ],
)
def test_no_points_end_it(points):
    found = fit(points, {t: [[float("nan"), -1.0, "x"], None, [1e-29], [1e29]] for t in points}, bound=[7])
    assert found is None or (np.isfinite(found.exponent) and found.word)


def test_what_does_not_grow_is_constant_however_many_lengths_show_it():
    lengths = [1024 << i for i in range(5)]
    state = fit(dict.fromkeys(lengths, 65536.0))
    assert (state.is_law, state.word, state.missing) == (True, "constant", ()) and abs(state.exponent) < 0.01
    generator = np.random.default_rng(0)
    noisy = fit({t: 1e-4 * float(np.exp(generator.normal(0, 0.01))) for t in lengths})
    assert noisy.is_law and noisy.word == "constant"
    # A floor of thirty times the first length's work is not all there is.
    assert fit({t: 30 * 1024.0 + t for t in lengths}).word != "constant"


def test_a_slope_of_one_round_supposes_what_processes_differ_by():
    lengths = (65536, 1 << 20)
    one = {t: [[t * 1e-8 * (1 + 1e-4 * i) for i in range(20)]] for t in lengths}
    found = fit({t: t * 1e-8 for t in lengths}, one)
    assert 0.01 < found.high - found.low < 0.1 and found.word == "linear"
    three = {t: [[t * 1e-8 * (1 + 1e-4 * i)] for i in range(3)] for t in lengths}
    narrow = fit({t: t * 1e-8 for t in lengths}, three)
    assert narrow.high - narrow.low < 0.2 * (found.high - found.low)
