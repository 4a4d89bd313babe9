"""Ratios within rounds, and who is ranked."""

import pytest

from longctx.analysis.ranking import base_of, level_with_first, rank, ratio, ratio_over_rounds
from longctx.results import BenchmarkResult


def row(name, samples=(), length=1024, **fields):
    samples = [list(values) for values in samples]
    flat = [value for values in samples for value in values]
    fields.setdefault("forward_time_median", sorted(flat)[len(flat) // 2] if flat else None)
    return BenchmarkResult(block_name=name, sequence_length=length, samples=samples, **fields)


def test_ratio_is_taken_within_rounds():
    # The machine was three times slower in round 2: the ratio must not see it.
    dense = row("Dense", [[2.0, 2.0], [6.0, 6.0], [2.2, 2.2]])
    blade = row("BLADE", [[1.0, 1.0], [3.3, 3.3], [1.1, 1.1]])
    found = ratio_over_rounds(blade, dense)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high, found.rounds) == (pytest.approx(0.5), pytest.approx(0.55), 3)
    assert ratio(dense, blade) == pytest.approx(2.0)


def test_a_round_missing_on_one_side_is_left_out():
    found = ratio_over_rounds(row("A", [[1.0], [], [4.0]]), row("B", [[2.0], [9.0], [4.0]]))
    assert (found.low, found.high, found.rounds) == (0.5, 1.0, 2)


def test_records_without_samples_are_divided_by_their_means():
    found = ratio_over_rounds(row("A", forward_time_mean=1.0), row("B", forward_time_mean=4.0))
    assert (found.value, found.rounds) == (0.25, 0)


def test_no_ratio_without_two_ok_times():
    assert ratio(row("A", [[1.0]], status="wrong"), row("B", [[1.0]])) is None
    assert ratio(row("A", [[1.0]]), row("B")) is None
    assert ratio(row("A", [[float("nan")]]), row("B", [[1.0]])) is None


def test_rank_orders_ok_rows_and_leaves_the_others_out():
    rows = [
        row("Slow", [[3.0]]),
        row("Dense", [[2.0]]),
        row("Fast", [[1.0]]),
        row("Wrong", [[0.1]], status="wrong"),
        row("Elsewhere", [[0.5]], length=2048),
    ]
    ranked = rank(rows, 1024)
    assert [(r.place, r.result.block_name) for r in ranked] == [(1, "Fast"), (2, "Dense"), (3, "Slow")]
    assert [r.ratio.value for r in ranked] == [0.5, 1.0, 1.5]


def test_base_is_only_one_that_may_be_compared():
    rows = [row("Dense", [[2.0]], dtype="bf16"), row("BLADE", [[1.0]], dtype="fp32")]
    assert base_of(rows[1], rows) is None
    assert rank(rows, 1024)[0].ratio is None


def test_rank_goes_by_ratios_where_times_of_a_noisy_machine_disagree():
    # B ran in the machine's slow round, but beside a Dense that was slower still.
    dense, a, b = row("Dense", [[1.0], [9.0]]), row("A", [[0.8], [7.2]]), row("B", [[0.7], [6.3]])
    a.forward_time_median, b.forward_time_median = 0.8, 6.3
    assert [r.result.block_name for r in rank([dense, a, b], 1024)] == ["B", "A", "Dense"]


def test_a_ratio_of_two_rounds_is_the_inverse_of_the_inverse():
    one, other = row("A", [[0.35], [0.38]]), row("Dense", [[0.48], [0.22]])
    forth, back = ratio_over_rounds(one, other), ratio_over_rounds(other, one)
    assert forth.value == pytest.approx(1 / back.value) and forth.low < 1 < forth.high


def test_level_rows_are_those_that_the_rounds_do_not_tell_from_the_first():
    first, near, far = row("A", [[1.0], [2.0]]), row("B", [[1.04], [1.98]]), row("C", [[1.3], [2.6]])
    assert [found.block_name for found in level_with_first([first, near, far])] == ["A", "B"]
