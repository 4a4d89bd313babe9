"""The search for the longest context on made-up memory, and what its rows are read as."""

import pytest

from longctx.analysis.frontier import (
    MEMORY,
    TIME,
    extrapolated,
    frontiers,
    is_limits_row,
    next_length,
    reached_at,
    refusals,
)
from longctx.results import MIB, BenchmarkResult

GIB = 1 << 30
LAWS = {
    "linear": lambda t: 2e8 + 4096 * t,
    "quadratic": lambda t: 1e7 + 512 * t + t**2,
    "flat, then linear": lambda t: max(5e9, 4096 * t),
    "root": lambda t: 1e6 * t**0.5,
}


def search(need, limit, *, resolution=0.05, longest=1 << 30, foresight=True):
    """(longest that fits, shortest that does not, lengths tried) on a device of `limit` bytes."""
    fits, fails, tried, points = 0, None, [], {}
    while True:
        guess = reached_at(points, limit) if foresight else None
        length = next_length(fits, fails, longest=longest, resolution=resolution, guess=guess)
        if length is None:
            return fits, fails, tried
        assert length not in tried and 1 <= length <= longest
        tried.append(length)
        if need(length) <= limit:
            fits, points[length] = length, need(length)
        else:
            fails = length


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("resolution", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("foresight", [True, False])
def test_the_search_ends_within_its_resolution_of_the_limit(law, resolution, foresight):
    fits, fails, tried = search(LAWS[law], 8 * GIB, resolution=resolution, foresight=foresight)
    assert LAWS[law](fits) <= 8 * GIB < LAWS[law](fails)
    assert fails - fits <= resolution * fits
    assert len(tried) <= 33


def test_foresight_saves_tries_where_memory_is_regular():
    with_it, without = (len(search(LAWS["linear"], 8 * GIB, foresight=f, resolution=0.01)[2]) for f in (True, False))
    assert with_it <= without - 3


def test_a_wrong_guess_only_costs_tries():
    fits, fails = 4096, 8192
    for guess in (1.0, 4096.0, 5000.0, 8192.0, 1e12):
        length = next_length(fits, fails, longest=1 << 30, guess=guess)
        assert fits < length < fails


@pytest.mark.parametrize("taken", [8, 4096, 1 << 14, 3 << 12])
@pytest.mark.parametrize("foresight", [True, False])
def test_a_block_that_takes_multiples_of_something_is_followed_as_far_as_it_goes(taken, foresight):
    limit, need, tried = 300_000, LAWS["linear"], {}
    while True:
        fits = max((t for t, status in tried.items() if status == "ok"), default=0)
        fails, refused = refusals(tried, fits)
        points = {t: need(t) for t, status in tried.items() if status == "ok"}
        guess = reached_at(points, need(limit)) if foresight else None
        length = next_length(fits, fails, longest=1 << 30, start=3 << 14, guess=guess, refused=refused)
        if length is None:
            break
        assert length not in tried
        tried[length] = "failed" if length % taken else "ok" if length <= limit else "oom"
    assert tried[fails] == "oom" and not any(length % taken == 0 for length in refused)
    # No power of two finds multiples of three times one.
    step = taken if taken & taken - 1 == 0 else fits
    assert limit - max(0.05 * limit, step) < fits <= limit
    assert len(tried) <= 25


def test_an_error_is_the_end_where_nothing_else_is():
    assert refusals({1024: "ok", 2048: "failed"}, 1024) == (2048, [])
    assert refusals({1024: "failed", 2048: "oom"}, 0) == (1024, [])
    assert refusals({1024: "ok", 1280: "failed", 1536: "crashed", 2048: "oom"}, 1024) == (1536, [1280])


def test_a_limit_below_the_first_length_is_found():
    fits, fails, _ = search(lambda t: t, 3)
    assert (fits, fails) == (3, 4)
    assert search(lambda t: 9, 3)[:2] == (0, 1)


def test_the_longest_length_that_is_asked_for_ends_the_search():
    assert search(lambda t: t, GIB, longest=5000) == (5000, None, [1024, 2048, 4096, 5000])
    assert search(lambda t: t, GIB, longest=300) == (300, None, [300])


@pytest.mark.parametrize("law", ["linear", "quadratic"])
def test_memory_one_doubling_ahead_is_rather_foreseen_too_large_than_too_small(law):
    need = LAWS[law]
    for power in range(13, 22):
        points = {1 << p: need(1 << p) for p in range(10, power + 1)}
        assert 0.95 <= extrapolated(points, 2 << power) / need(2 << power) <= 1.25
        limit = need(1.5 * (1 << power))
        assert reached_at(points, limit) == pytest.approx(1.5 * (1 << power), rel=0.08)


def test_foresight_of_little_or_nothing():
    assert extrapolated({}, 100) is None
    assert extrapolated({100: 5.0}, 300) == pytest.approx(15.0)
    assert extrapolated({100: 1.0, 400: 4.0}, 200) == pytest.approx(2.0)
    assert extrapolated({100: 1.0, 200: 1e9}, 400) < 5e9  # no block is steeper than a square
    assert reached_at({100: 5.0}, 10.0) is None
    assert reached_at({100: 5.0, 200: 5.0}, 10.0) is None
    assert reached_at({100: 5.0, 200: 50.0}, 10.0) is None


# -- rows ----------------------------------------------------------------------------------------------------------


def row(name, length, status="ok", *, kind=None, longest=None, gpu=None, resolution=0.05, **fields):
    error = None if status == "ok" else {"type": kind or "X", "message": f"{status} it was", "log_tail": None}
    total = (100 << 20) + 4096 * length
    figures = {"total_memory_mb": total / MIB, "peak_memory_mb": 2048 * length / MIB, "first_call_s": 0.5}
    return BenchmarkResult(
        block_name=name,
        sequence_length=length,
        status=status,
        error=error,
        config={"d_model": 8, "limits": {"resolution": resolution, "max_length": longest}},
        **{
            "environment": {"gpu": gpu, "gpu_memory_total_bytes": gpu and 2 * GIB},
            **(figures if status == "ok" else {}),
            **fields,
        },
    )


def found(*last, **fields):
    rows = [row("A", 1024 << i, **fields) for i in range(8)]
    (one,) = frontiers([*rows, *last])
    return one


def test_a_frontier_is_read_off_the_rows():
    one = found(row("A", 135_000, "oom"))
    assert (one.fits, one.fails, one.limit, one.tried, one.finished) == (131072, 135_000, "memory", True, True)
    assert one.said == "oom it was" and one.call_s == 0.5
    assert one.needed_bytes == (100 << 20) + 4096 * 131072
    assert one.total.is_law and one.total.exponent == pytest.approx(1.0, abs=0.01)
    assert one.peak.at(1e6) == pytest.approx(2048e6, rel=0.01)


@pytest.mark.parametrize(
    ("status", "kind", "limit", "tried"),
    [
        ("oom", None, "memory", True),
        ("skipped", MEMORY, "memory", False),
        ("timeout", None, "time", True),
        ("skipped", TIME, "time", False),
        ("crashed", None, "crashed", True),
        ("failed", None, "failed", True),
    ],
)
def test_what_ended_a_search_is_told_apart(status, kind, limit, tried):
    one = found(row("A", 135_000, status, kind=kind))
    assert (one.limit, one.tried, one.finished) == (limit, tried, True)


def test_a_search_that_was_cut_short_is_not_finished():
    assert not found(row("A", 262_144, "oom")).finished
    one = found()
    assert (one.limit, one.finished, one.fails) == ("unfinished", False, None)
    one = found(longest=131072)
    assert (one.limit, one.finished) == ("length", True)


def test_a_block_that_runs_at_no_length():
    (one,) = frontiers([row("A", 1024, "unsupported")])
    assert (one.fits, one.limit, one.finished, one.total) == (0, "unsupported", True, None)
    assert one.would_hold(80 * GIB) is None


def test_other_cards_hold_what_the_law_says_and_weights_count():
    one = found(row("A", 135_000, "skipped", kind=MEMORY))
    for gib in (1, 24, 80):
        assert one.would_hold(gib * GIB) == pytest.approx((0.9 * gib * GIB - (100 << 20)) / 4096, rel=0.02)
    assert one.would_hold(50 << 20) == 0


def test_memory_that_grew_faster_at_short_lengths_is_not_thought_to_go_on_so():
    # Work in slabs: 8 KiB a token up to a point, 2 KiB from there on.
    def rows(last):
        lengths = [1024 << i for i in range(last)]
        totals = [min(8192 * t, 3 * GIB + 2048 * t) / MIB for t in lengths]
        return [row("A", t, total_memory_mb=total) for t, total in zip(lengths, totals, strict=True)]

    for last in (11, 13, 16):
        (one,) = frontiers(rows(last))
        true = (0.9 * 80 - 3) * GIB / 2048
        assert 0.3 * true < one.would_hold(80 * GIB) < 1.05 * true


def test_a_block_that_leaps_beyond_all_memory_gets_no_forecast():
    environment = {"cpu": "C", "memory_available_bytes": 1000 * GIB}
    assert found(row("A", 135_000, "timeout"), environment=environment).would_hold(80 * GIB)
    assert found(row("A", 135_000, "oom"), environment=environment).would_hold(80 * GIB) is None
    few = frontiers([row("A", 1024 << i) for i in range(3)])[0]
    assert not few.total.is_law and few.would_hold(80 * GIB) is None


def test_a_gpu_is_expected_to_be_filled_as_this_one_was():
    # 2 GiB, of which 0.6 GiB could be used before it said no.
    one = found(row("A", 135_000, "oom", gpu="G"), gpu="G")
    assert one.share == pytest.approx(((100 << 20) + 4096 * 133_000) / (2 * GIB), rel=0.01)
    assert one.would_hold(2 * GIB) == pytest.approx(133_000, rel=0.02)
    assert found(row("A", 135_000, "timeout", gpu="G"), gpu="G").share == 0.9


def test_rows_of_a_sweep_have_no_frontier():
    plain = BenchmarkResult(block_name="A", sequence_length=1024)
    assert not is_limits_row(plain) and frontiers([plain]) == []


def test_strange_records_end_nothing():
    odd = [
        row("A", 1024, total_memory_mb=float("nan"), first_call_s=-1.0),
        row("A", 2048, "oom", resolution="x", longest=[1]),
        row("B", 1, "skipped"),
    ]
    odd[2].error, odd[2].environment = "text", {"gpu": 3, "gpu_memory_total_bytes": "x"}
    assert [one.limit for one in frontiers(odd)] == ["memory", "skipped"]


def test_lengths_that_a_block_does_not_take_are_not_what_ends_it():
    taken = [row("A", n) for n in (1024, 2048, 4096)]
    refused = [row("A", 5120, "failed"), row("A", 4608, "failed")]
    (found,) = frontiers([*taken, *refused, row("A", 6144, "oom"), row("A", 8192, "oom")])
    assert (found.fits, found.fails, found.limit, found.finished) == (4096, 6144, "memory", True)
    assert found.refused == (4608, 5120) and found.refusal == "failed it was"
    # Multiples of 2,048 are left to be tried.
    (found,) = frontiers([*taken, *refused, row("A", 8192, "oom")])
    assert found.fails == 8192 and not found.finished
    (found,) = frontiers([*taken, *refused])
    assert (found.fails, found.limit, found.refused) == (4608, "failed", ())
