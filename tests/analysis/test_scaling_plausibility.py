"""Local slopes and the two questions of plausibility."""

import pytest

from longctx.analysis.plausibility import is_flat, is_impossible, least_time, mark_suspects, suspects
from longctx.analysis.scaling import fit_slope, local_slope
from longctx.results import BenchmarkResult

LENGTHS = (1024, 2048, 4096, 8192)


def row(length, time_s, **fields):
    return BenchmarkResult(block_name="X", sequence_length=length, forward_time_median=time_s, **fields)


@pytest.mark.parametrize(
    ("exponent", "word"),
    [(0.2, "below linear"), (1.0, "linear"), (1.5, "between"), (2.0, "quadratic"), (3.0, "above quadratic")],
)
def test_slope_of_a_power(exponent, word):
    found = fit_slope((length, 3e-6 * length**exponent) for length in LENGTHS)
    assert found.slope == pytest.approx(exponent)
    assert (found.word, found.shortest, found.longest, found.count) == (word, 1024, 8192, 4)


def test_slope_needs_two_lengths():
    assert fit_slope([(1024, 1.0)]) is None
    assert fit_slope([(1024, 1.0), (1024, 2.0)]) is None
    assert fit_slope([]) is None


def test_slope_leaves_out_what_is_no_figure():
    points = [(1024, 1.0), (2048, float("nan")), (4096, None), (8192, 8.0), (16384, 0.0)]
    assert fit_slope(points).slope == pytest.approx(1.0)


def test_local_slope_reads_ok_rows_only():
    rows = [row(1024, 1.0), row(2048, 2.0), row(4096, 1.0, status="wrong")]
    assert local_slope(rows).slope == pytest.approx(1.0)


def test_least_time_is_the_larger_bound():
    assert least_time(flops=100.0, bytes=10.0, peak_flops=10.0, peak_bytes=10.0) == 10.0
    assert least_time(flops=None, bytes=10.0, peak_flops=10.0, peak_bytes=5.0) == 2.0
    assert least_time(flops=100.0, bytes=None, peak_flops=None, peak_bytes=5.0) == 0.0


@pytest.mark.parametrize(("device", "margin"), [("cuda", 1.05), ("cpu", 1.30)])
def test_impossible_has_a_margin(device, margin):
    assert not is_impossible(1.0 / margin * 1.001, 1.0, device=device)
    assert is_impossible(1.0 / margin * 0.999, 1.0, device=device)


def test_flat_needs_eightfold_work():
    assert is_flat(1.0, 1.0, 8.0, 1.0)
    assert not is_flat(1.0, 1.0, 7.9, 1.0)
    assert not is_flat(1.0, 1.0, 8.0, 1.3)


def test_a_flat_stretch_is_suspect():
    # Four rows of a published bug: the same time from 64K to 512K tokens.
    rows = [row(length, 0.0143) for length in (65536, 131072, 262144, 524288)]
    assert [r.sequence_length for r in suspects(rows)] == [65536, 524288]


def test_honest_and_launch_bound_rows_are_not_suspect():
    assert suspects([row(length, length * 1e-6) for length in LENGTHS]) == []
    assert suspects([row(length, 1e-4, warnings=["launch_bound"]) for length in LENGTHS]) == []


def test_decoding_in_constant_work_is_not_suspect():
    assert suspects([row(length, 1e-4, mode="decode") for length in (1024, 65536)]) == []


def published(length, time_s, **fields):
    return BenchmarkResult(block_name="A", sequence_length=length, forward_time_mean=time_s, **fields)


def test_a_published_table_that_is_flat_is_suspect():
    # 14.3 ms from 65K to 524K tokens, as a widely read table had it.
    rows = [published(length, 14.3e-3) for length in (65536, 131072, 262144, 524288)]
    rows += [
        BenchmarkResult(block_name="B", sequence_length=r.sequence_length, forward_time_mean=1.0) for r in rows[:1]
    ]
    mark_suspects(rows)
    assert [r.warnings for r in rows] == [["suspect"], [], [], ["suspect"], []]


def test_suspicion_is_taken_back_and_spares_what_the_host_bounds():
    rows = [published(1024, 1e-3, warnings=["suspect"]), published(8192, 8e-3, warnings=["suspect", "unstable"])]
    mark_suspects(rows)
    assert [r.warnings for r in rows] == [[], ["unstable"]]
    bound = [published(length, 2e-4, warnings=["launch_bound"]) for length in (1024, 8192)]
    mark_suspects(bound)
    assert all(r.warnings == ["launch_bound"] for r in bound)
