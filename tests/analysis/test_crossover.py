"""Where two curves cross, what is best, and what is said of it."""

import re

import numpy as np
import pytest

from longctx.analysis.best import best_blocks
from longctx.analysis.conclusions import about, about_range, conclude
from longctx.analysis.crossover import crossover
from longctx.analysis.curves import curves, growths
from longctx.results import BenchmarkResult
from longctx.terminal.findings import crossing_line

LENGTHS = [1024 << i for i in range(7)]


def rows(name, time, lengths=LENGTHS, *, noise=0.0, seed=0, peak=None, **fields):
    generator = np.random.default_rng(seed)
    # The rounds' shares are those of all blocks: pairs of the same round are free of them.
    found = []
    for t in lengths:
        samples = [[float(time(t) * c * (1 + noise * generator.normal()))] * 3 for c in (1.0, 1.3, 0.9)]
        middle = float(np.median([values[0] for values in samples]))
        shared = {"forward_time_median": middle, "samples": samples, "peak_memory_mb": peak and peak * t}
        found.append(BenchmarkResult(block_name=name, sequence_length=t, **(shared | fields)))
    return found


def crossing(a, b, **options):
    first, second = growths(curves([*rows("A", a, **options), *rows("Dense", b, **({"seed": 1} | options))]))
    return crossover(first, second)


def test_inside_the_range():
    found = crossing(lambda t: 1e-3 + 1e-8 * t, lambda t: 1e-7 * t)
    assert found.verdict == "crosses" and found.faster_after and not found.extrapolated
    assert found.at == pytest.approx(1e-3 / 9e-8, rel=0.05)
    other = crossing(lambda t: 1e-7 * t, lambda t: 1e-3 + 1e-8 * t)
    assert other.at == pytest.approx(found.at) and not other.faster_after


def test_a_crossing_that_the_host_decides_says_so():
    def found(bound):
        run = [*rows("A", lambda t: 1e-3 + 1e-8 * t), *rows("Dense", lambda t: 1e-7 * t)]
        for row in run:
            row.warnings = ["launch_bound"] if (row.block_name, row.sequence_length) in bound else []
        return crossover(*growths(curves(run)))

    at = crossing_line(found(set()))
    assert "launch-bound" not in at
    # It lies between 8K and 16K.
    assert crossing_line(found({("A", 8192)})) == f"{at}, launch-bound up to there"
    assert not found({("A", 1024), ("Dense", 65536)}).launch_bound


def test_a_crossing_of_one_round_says_so():
    run = [*rows("A", lambda t: 1e-3 + 1e-8 * t, noise=0.001), *rows("Dense", lambda t: 1e-7 * t, noise=0.001)]
    # Each round is a process: what differs between them is in the interval of several, and supposed in that of one.
    for row in run:
        row.warnings = ["launch_bound"]
    several = crossover(*growths(curves(run)))
    assert several.launch_bound and not several.one_round and "of one round" not in crossing_line(several)
    for row in run:
        row.samples = [[seconds * (1 + 0.001 * i) for i in range(3)] for seconds in row.samples[0][:1]]
    alone = crossover(*growths(curves(run)))
    assert alone.one_round and alone.low is not None
    line = crossing_line(alone)
    assert re.search(r"from 11K on \(95% .*, of one round\), launch-bound up to there$", line), line
    said = " ".join(conclude(run).sentences)
    assert re.search(r"It overtakes Dense at about 11K tokens \(95%: [^)]*, of one round\)\.", said), said
    # Five percent on a GPU, ten on a CPU.
    for row in run:
        row.environment = {"gpu": "a GPU"}
    narrow = crossover(*growths(curves(run)))
    assert 1 < narrow.high / narrow.low < 0.95 * alone.high / alone.low


def test_the_interval_holds_the_crossing():
    # Power laws: straight on log-log axes, so that interpolation is exact and noise alone is left.
    true = 1024 * 2**3.3
    held = []
    for seed in range(100):
        pair = [
            *rows("A", lambda t: 1e-3, noise=0.02, seed=seed),
            *rows("Dense", lambda t: 1e-3 * t / true, noise=0.02, seed=seed + 1000),
        ]
        found = crossover(*growths(curves(pair)))
        held.append(found.low <= true <= found.high)
    assert 0.90 <= np.mean(held) <= 1.0


def test_always_and_level():
    assert crossing(lambda t: 1e-8 * t, lambda t: 1e-7 * t).verdict == "below"
    assert crossing(lambda t: 1e-7 * t, lambda t: 1e-8 * t).verdict == "above"
    assert crossing(lambda t: 1e-7 * t, lambda t: 1e-7 * t * 1.001, noise=0.02).verdict == "level"


def test_blocks_far_apart_are_not_level_for_their_noise():
    run = []
    for length in (1024, 8192):
        for name, times in (("A", (0.7, 3.0, 1.9)), ("Dense", (1.0, 1.0, 1.0))):
            samples = [[time] for time in times]
            fields = {"samples": samples, "forward_time_median": sorted(times)[1]}
            run.append(BenchmarkResult(block_name=name, sequence_length=length, **fields))
    found = crossover(*growths(curves(run)))
    assert found.verdict == "noisy"
    assert crossing_line(found) == "A: too noisy to tell from Dense at any length, 1K to 8K"


def test_a_length_that_noise_hides_is_not_claimed():
    # Three rounds that agree at long lengths, and at short ones not even on who is faster.
    run = []
    for length, ratios in ((1024, (0.6, 1.9, 1.6)), (8192, (0.9, 1.5, 1.1)), (65536, (0.14, 0.14, 0.14))):
        for name, times in (("A", ratios), ("Dense", (1.0, 1.0, 1.0))):
            samples = [[time] for time in times]
            row = {"block_name": name, "sequence_length": length, "samples": samples}
            run.append(BenchmarkResult(**row, forward_time_median=sorted(times)[1]))
    ((a, dense),) = [growths(curves(run))]
    found = crossover(a, dense)
    assert (found.verdict, found.untold) == ("below", (1024, 8192))
    assert crossing_line(found) == "A: below Dense at 64K, too noisy to tell at 1K, 8K"


def test_a_noisy_host_at_short_lengths_does_not_hide_what_the_gpu_shows():
    # As on an H200 behind a slow host: short lengths differ by a third from round to round, the long ones by 0.1%.
    run = []
    for length, ratios in ((2048, (0.9, 1.6)), (8192, (0.8, 1.4)), (65536, (0.6, 0.601)), (131072, (0.6, 0.599))):
        for name, times in (("A", ratios), ("Dense", (1.0, 1.0))):
            row = {"block_name": name, "sequence_length": length, "samples": [[time] for time in times]}
            warnings = ["launch_bound"] if length < 65536 else []
            run.append(BenchmarkResult(**row, forward_time_median=sum(times) / 2, warnings=warnings))
    found = crossover(*growths(curves(run)))
    assert (found.verdict, found.told, found.untold) == ("below", (65536, 131072), (2048, 8192))
    assert "is the fastest mixing block, 1.67x faster than Dense." in conclude(run).sentences[0]


@pytest.mark.parametrize("rounds", [1, 3])
def test_equal_blocks_are_level(rounds):
    # Processes 1% apart, samples 0.2%: of one round nothing tells the 1%, and of seven lengths each may be the odd one.
    verdicts = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        run = []
        for name in ("A", "Dense"):
            for length in LENGTHS:
                middles = 1e-7 * length * np.exp(generator.normal(0, 0.01, rounds))
                samples = [list(middle * np.exp(generator.normal(0, 0.002, 15))) for middle in middles]
                middle = float(np.median([np.median(values) for values in samples]))
                row = {"block_name": name, "sequence_length": length, "samples": samples}
                run.append(BenchmarkResult(**row, forward_time_median=middle))
        verdicts.append(crossover(*growths(curves(run))).verdict)
    assert verdicts.count("level") >= 36


def test_quiet_rounds_still_hold_the_crossing():
    # Hardly any noise: what the grid leaves open is part of the interval.
    true = 1024 * 2**2.3
    held = 0
    for seed in range(20):
        found = crossing(lambda t: 1e-3, lambda t: 1e-3 * t / true, noise=0.0005, seed=2 * seed)
        held += found.low <= true <= found.high
        assert found.high < 1.1 * found.low
    assert held >= 18


def test_beyond_the_range_it_is_an_extrapolation_or_refused():
    at = 3 * LENGTHS[-1]
    found = crossing(lambda t: 1e-8 * t * at, lambda t: 1e-8 * t**2, noise=0.01)
    assert found.extrapolated and found.faster_after
    assert found.low <= at <= found.high and found.at == pytest.approx(at, rel=0.05)
    far = crossing(lambda t: 1e-8 * t * 40 * LENGTHS[-1], lambda t: 1e-8 * t**2, noise=0.01)
    assert far.verdict == "above" and far.at is None and "8 times" in far.reason
    parallel = crossing(lambda t: 3e-8 * t, lambda t: 1e-8 * t**1.001, noise=0.02)
    assert parallel.verdict == "above" and any(word in parallel.reason for word in ("overlap", "slowly"))
    few = crossing(lambda t: 1e-8 * t * at, lambda t: 1e-8 * t**2, lengths=LENGTHS[-3:])
    assert few.verdict == "above" and "few lengths" in few.reason


def test_the_interval_of_an_extrapolation_holds_the_crossing():
    held, lengths = [], LENGTHS[:6]
    for seed in range(120):
        pair = [
            *rows("A", lambda t: 8e-5 * t, lengths, noise=0.02, seed=seed),
            *rows("Dense", lambda t: 1e-9 * t * t, lengths, noise=0.02, seed=seed + 1000),
        ]
        found = crossover(*growths(curves(pair)))
        assert found.extrapolated
        held.append(found.low <= 80_000 <= (found.high or np.inf))
    assert 0.93 <= np.mean(held) <= 1.0, np.mean(held)


def test_curves_of_different_settings_do_not_mix():
    run = [*rows("A", lambda t: 1e-7 * t, dtype="fp32"), *rows("Dense", lambda t: 1e-8 * t, dtype="bf16")]
    assert conclude(run).crossovers == []
    assert [c.name for c in curves(run)] == ["A fp32", "Dense bf16"]


def test_a_run_says_who_is_best():
    run = [
        *rows("Dense", lambda t: 1e-11 * t**2, peak=1.0, joules_per_token=2.0),
        *rows("BLADE", lambda t: 1e-7 * t, peak=0.1, joules_per_token=1.0),
        *rows("Big", lambda t: 2e-7 * t, peak=2.0),
        *rows("Identity", lambda t: 1e-9 * t, peak=0.01),
    ]
    best = best_blocks(run)
    assert [b.time for b in best] == [["Dense"]] * 3 + [["Dense"]] + [["BLADE"]] * 3
    assert all(b.memory == ["BLADE"] and b.energy == ["BLADE"] for b in best)
    assert best[0].pareto == ["Dense", "BLADE"] and best[-1].pareto == ["BLADE"]
    said = " ".join(found := conclude(run).sentences)
    assert 1 <= len(found) <= 4
    for words in ("BLADE is the fastest", "overtakes Dense at about 9.8K", "T^1.00 (linear)", "T^2.00 (quadratic)"):
        assert words in said, said
    assert "least memory there, 0.1 of Dense's" in said


def test_doubts_close_the_summary():
    run = [*rows("Dense", lambda t: 1e-7 * t), *rows("A", lambda t: 1e-8 * t, warnings=["contended"])]
    said = conclude(run).sentences
    assert said[-1] == "This is not a firm result: contended." and len(said) <= 4
    assert conclude([]).sentences == []


def test_launch_bound_rows_give_no_exponent():
    run = [
        *rows("A", lambda t: 1e-4, warnings=["launch_bound"]),
        *rows("Dense", lambda t: 2e-4, warnings=["launch_bound"]),
    ]
    found = conclude(run)
    assert [g.said for g in found.growths] == ["launch-bound"] * 2 and found.growths[0].time is None
    assert min(found.growths[0].missing) > LENGTHS[-1]
    assert "launching kernels" in " ".join(found.sentences)


def test_lengths_in_words():
    assert (about(900), about(6963), about(13312), about(3 << 20)) == ("900", "6.8K", "13K", "3.0M")
    assert about_range(13312, 15000) == "13K to 15K" and about_range(32600, 32900) == "31.8K to 32.1K"
    assert about_range(1024, None) == "1.0K or more"


def test_the_best_the_undominated_and_the_sentence_go_by_the_same_figure():
    # Ratios within rounds say A, medians of times B: the ratios are the steadier ones.
    peaks = {"A": 10.0, "B": 10.0, "Dense": 30.0}
    times = {"A": [[1.0], [2.0], [4.2]], "B": [[1.1], [1.9], [4.0]], "Dense": [[2.0], [3.0], [9.0]]}
    run = [
        BenchmarkResult(
            block_name=name,
            sequence_length=1024,
            samples=rounds,
            forward_time_median=rounds[1][0],
            peak_memory_mb=peaks[name],
        )
        for name, rounds in times.items()
    ]
    (best,) = best_blocks(run)
    assert best.time[0] in best.pareto and set(best.time) == {"A", "B"}
    assert f"{best.time[0]} and {best.time[1]} are level, the fastest mixing blocks" in conclude(run).sentences[0]


def test_two_devices_in_one_run_are_told_apart():
    run = []
    for gpu, slower in (("Card one", 1.0), ("Card two", 10.0)):
        run += rows("A", lambda t, s=slower: s * (1e-3 + 1e-8 * t), environment={"gpu": gpu})
        run += rows("Dense", lambda t: 1e-7 * t, environment={"gpu": gpu}, seed=1)
    lines = [crossing_line(found) for found in conclude(run).crossovers]
    assert len(set(lines)) == 2 and "Card one" in lines[0] and "Card two" in lines[1]


def test_where_dense_ends_the_summary_says_how_far_ahead_the_winner_was_there():
    run = [
        *rows("Dense", lambda t: 1e-9 * t**2, LENGTHS[:5]),
        *rows("A", lambda t: 1e-6 * t),
        *rows("B", lambda t: 3e-6 * t),
    ]
    said = conclude(run).sentences
    assert "At 65,536 tokens A is the fastest mixing block." in said[0]
    assert said[1] == "At 16,384, the longest that Dense has here, it is 16.38x faster than Dense."


def test_slopes_of_time_and_memory_are_of_the_same_lengths():
    run = rows("A", lambda t: 1e-8 * t, [2048, 65536, 1 << 20])
    run[0].warnings = ["launch_bound"]
    for row, peak in zip(run, (10.0, 100.0, 1600.0), strict=True):
        row.peak_memory_mb = peak
    (found,) = growths(curves(run))
    assert (found.memory.shortest, found.memory.exponent) == (65536, pytest.approx(1.0))


def test_a_length_of_one_round_beside_others_of_three_is_as_sure_as_those():
    run = [
        *rows("A", lambda t: 1e-8 * t, LENGTHS[:3], noise=0.001),
        *rows("Dense", lambda t: 2e-8 * t, LENGTHS[:3], noise=0.001),
    ]
    for row in run:
        if row.sequence_length == LENGTHS[0]:
            row.samples, row.warnings = row.samples[:1], ["launch_bound"]
    found = crossover(*growths(curves(run)))
    assert (found.verdict, found.untold) == ("below", ())
