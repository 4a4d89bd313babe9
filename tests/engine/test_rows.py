"""The arithmetic of a row: rounds put together, figures derived from all samples, null where nothing is known."""

from __future__ import annotations

import statistics

import pytest

from longctx.config import BlockRequest, Cell
from longctx.engine.rows import add_memory, add_round, fault, new_row

STEADY = [1.0, 1.001, 1.002, 1.003, 1.004, 1.005]


def cell_of(**values) -> Cell:
    return Cell(block=BlockRequest.parse("BLADE:chunk_size=8"), **{"length": 100, "batch_size": 2, **values})


def found(*samples: float, **values) -> dict:
    """What a worker says of one round that went well."""
    return {
        "status": "ok",
        "error": None,
        "warnings": [],
        "samples_round": list(samples),
        "host_time_median": None,
        **values,
    }


def row_of(*rounds: dict, cell: Cell | None = None):
    cell = cell or cell_of()
    row = new_row(cell, key="k")
    for each in rounds:
        add_round(row, cell, each)
    return row


def test_a_new_row_is_named_after_its_cell_and_knows_no_number():
    row = new_row(cell_of(dtype="bf16", mode="prefill"), key="k", environment={"cpu": "one"}, command="longctx sweep")
    assert (row.block_name, row.block_target) == ("BLADE:chunk_size=8", "BLADE")
    assert (row.sequence_length, row.batch_size, row.dtype, row.mode) == (100, 2, "bf16", "prefill")
    assert (row.key, row.environment, row.command) == ("k", {"cpu": "one"}, "longctx sweep")
    assert row.samples == []
    numbers = [value for name, value in row.to_json().items() if isinstance(value, float) or name.endswith("_mb")]
    assert set(numbers) == {None}


def test_two_rows_share_nothing_that_one_of_them_could_change():
    first, second = row_of(found(1.0)), row_of(found(2.0))
    assert (first.samples, second.samples) == ([[1.0]], [[2.0]])


def test_the_value_is_the_median_of_round_medians_beside_mean_std_min_and_max():
    rounds = [[1.0, 2.0, 9.0], [4.0, 4.0, 4.0], [3.0, 3.0, 30.0]]
    row = row_of(*(found(*samples) for samples in rounds))
    pooled = [value for samples in rounds for value in samples]
    assert row.samples == rounds
    assert row.forward_time_median == 3.0
    assert row.time_s == 3.0
    assert row.forward_time_mean == pytest.approx(statistics.fmean(pooled))
    assert row.forward_time_std == pytest.approx(statistics.stdev(pooled))
    assert (row.forward_time_min, row.forward_time_max) == (1.0, 30.0)
    assert row.throughput_tokens_per_sec == pytest.approx(200 / statistics.fmean(pooled))


def test_decode_counts_the_tokens_of_one_step():
    row = row_of(found(0.5), cell=cell_of(mode="decode"))
    assert row.throughput_tokens_per_sec == pytest.approx(2 / 0.5)


def test_one_sample_has_no_spread_and_under_six_have_no_interval():
    row = row_of(found(2.0))
    assert (row.forward_time_mean, row.forward_time_median, row.forward_time_std) == (2.0, 2.0, None)
    assert row_of(found(*STEADY[:5])).forward_time_ci95 is None
    assert row_of(found(*STEADY)).forward_time_ci95 == [STEADY[0], STEADY[-1]]
    # Samples of all rounds count.
    assert row_of(found(*STEADY[:3]), found(*STEADY[3:])).forward_time_ci95 == [STEADY[0], STEADY[-1]]


def test_a_round_of_many_samples_counts_as_much_as_one_of_few():
    row = row_of(found(*[1.0] * 50), found(*[2.0] * 6))
    assert (row.forward_time_mean, row.forward_time_median) == (1.5, 1.5)
    assert row.throughput_tokens_per_sec == pytest.approx(200 / 1.5)
    # The time is always in it: of all samples together it would be [1, 1].
    assert row.forward_time_ci95 == [1.0, 2.0]
    seven = row_of(*(found(*[float(i)] * 6) for i in range(1, 8)))
    assert seven.forward_time_ci95 == [1.0, 7.0]


def test_rounds_that_disagree_are_unstable():
    row = row_of(found(*STEADY))
    assert row.warnings == []
    add_round(row, cell_of(), found(*(1.5 * value for value in STEADY)))
    assert row.warnings == ["unstable"]


def test_unstable_is_said_of_all_samples_and_taken_back_when_more_of_them_agree():
    row = row_of(found(1.0, 1.0, 1.0, 1.0, 1.0, 1.2, warnings=["contended", "unstable"]))
    assert row.warnings == ["contended", "unstable"]
    add_round(row, cell_of(), found(*[1.0] * 6))
    assert row.warnings == ["contended"]


def test_other_warnings_of_any_round_stay_and_stand_once():
    row = row_of(found(1.0, warnings=["throttled"]), found(1.0, warnings=["contended", "throttled"]), found(1.0))
    assert row.warnings == ["contended", "throttled"]


def test_what_only_the_first_round_knows_stays():
    gate = {"error": 1e-7, "tolerance": 1e-5, "passed": True, "reason": None}
    first = found(1.0, gate=gate, gate_s=0.5, first_call_s=3.0, flops=1e12, bytes=8.0, path="compiled")
    later = found(1.0, gate=None, gate_s=None, first_call_s=0.1, flops=9e12, bytes=9.0, path="other")
    row = row_of(first, later)
    assert (row.gate, row.gate_s, row.first_call_s) == (gate, 0.5, 3.0)
    assert (row.flops, row.bytes, row.path) == (1e12, 8.0, "compiled")


def test_operations_a_second_follow_from_the_median():
    assert row_of(found(1.0, 1.0, 4.0, flops=2e12)).tflops == pytest.approx(2.0)
    assert row_of(found(1.0)).tflops is None


def test_resolved_options_take_the_place_of_those_that_were_asked_for():
    row = row_of(found(1.0, block_options={"chunk_size": 8, "state_dim": 64}))
    assert row.block_options == {"chunk_size": 8, "state_dim": 64}
    add_round(row, cell_of(), fault("crashed", "SIGSEGV", "ended"))
    assert row.block_options == {"chunk_size": 8, "state_dim": 64}


def test_a_fault_has_no_number_and_says_what_happened():
    row = row_of(fault("crashed", "SIGSEGV", "the process ended by SIGSEGV", "last words"))
    assert (row.status, row.ok, row.samples) == ("crashed", False, [])
    assert row.error == {"type": "SIGSEGV", "message": "the process ended by SIGSEGV", "log_tail": "last words"}
    assert row.time_s is None
    assert row.throughput_tokens_per_sec is None
    assert row.forward_time_ci95 is None
    assert row.warnings == []


def test_a_fault_in_a_later_round_keeps_what_was_measured():
    row = row_of(found(1.0, 3.0), fault("timeout", "Timeout", "no result within 5 s"))
    assert row.status == "timeout"
    assert row.error["type"] == "Timeout"
    assert (row.samples, row.forward_time_median) == ([[1.0, 3.0]], 2.0)


def test_the_hosts_time_is_the_median_of_all_rounds():
    row = row_of(*(found(1.0, host_time_median=value) for value in (1.0, 1.0, 100.0)))
    assert row.host_time_median == 1.0
    assert row_of(found(1.0), found(1.0, host_time_median=2.0)).host_time_median == 2.0
    assert row_of(found(1.0)).host_time_median is None


READING = {
    "peak_memory_mb": 4.0,
    "allocated_memory_mb": 10.0,
    "reserved_memory_mb": None,
    "total_memory_mb": 12.0,
    "peak_bytes_per_token": 7.0,
}


def test_memory_comes_with_the_round_or_by_itself():
    together = row_of(found(1.0, **READING))
    apart = row_of(found(1.0, **dict.fromkeys(READING)))
    assert apart.memory_efficiency_mb_per_token is None
    add_memory(apart, {**READING, "warnings": ["memory_grows"]})
    assert apart.warnings == ["memory_grows"]
    for row in (together, apart):
        assert (row.peak_memory_mb, row.allocated_memory_mb, row.reserved_memory_mb) == (4.0, 10.0, None)
        assert (row.total_memory_mb, row.peak_bytes_per_token) == (12.0, 7.0)
        assert row.memory_efficiency_mb_per_token == pytest.approx(10.0 / 200)


def test_a_reading_that_does_not_exist_is_null():
    row = row_of(found(1.0))
    add_memory(row, {**dict.fromkeys(READING), "warnings": []})
    assert row.memory_efficiency_mb_per_token is None
    assert row.peak_memory_mb is None


def test_a_training_step_has_two_parts_which_are_the_whole():
    row = row_of(found(1.0, 1.0, forward_share=0.25), found(3.0, 3.0, forward_share=0.35), cell=cell_of(mode="train"))
    assert row.forward_shares == [0.25, 0.35]
    assert row.forward_part_s == pytest.approx(0.3 * 2.0)
    assert row.forward_part_s + row.backward_part_s == pytest.approx(row.forward_time_median)
    other = row_of(found(1.0))
    assert (other.forward_part_s, other.backward_part_s, other.forward_shares) == (None, None, [])
