"""Every fault of a block is a row, and a sweep that ends early keeps all that it has measured."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tiny_sweeps import BLOCKS, config_of, lines, of_kind, saved, statuses, sweep

import longctx
from longctx.engine.runner import run_sweep
from longctx.errors import LongctxError
from longctx.events import CellStarted, RoundStarted, SweepFinished, SweepStarted

pytestmark = pytest.mark.usefixtures("tidy")

# -- faults --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, brief):
    """A sweep over blocks that fail without taking their process with them: (folder, results, events)."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "mine.py").write_text(BLOCKS)
    names = ["Careful", "Raises", "NotFinite", "Quits", "TooLarge", "Short", "Vandal"]

    def mark(event):
        if isinstance(event, SweepStarted):
            (folder / "measuring").touch()

    blocks = [*(f"{folder}/mine.py:{name}" for name in names), "Identity"]
    results, events = sweep(blocks, folder, on_event=mark, sequence_lengths=[16, 24], rounds=2)
    return folder, results, events


def test_every_fault_is_a_row_and_the_sweep_goes_on(faulty):
    folder, rows, events = faulty
    expected = {
        "Careful": ("ok", "ok"),
        "Raises": ("failed", "failed"),
        "NotFinite": ("wrong", "wrong"),
        "Quits": ("failed", "failed"),
        "TooLarge": ("oom", "skipped"),
        "Short": ("failed", "failed"),
        "Vandal": ("ok", "ok"),
        "Identity": ("ok", "ok"),
    }
    found = statuses(rows)
    assert {name: (found[name, 16], found[name, 24]) for name in expected} == expected
    assert longctx.load(saved(folder)) == rows
    assert events[-1].complete


def test_a_fault_says_what_happened_and_has_no_number(faulty):
    _, rows, _ = faulty
    words = {
        "Raises": "what is this?",
        "NotFinite": "NaN",
        "Quits": "exit code 4",
        "TooLarge": "MemoryError",
        "Short": "shape",
    }
    by_cell = {(row.block_name, row.sequence_length): row for row in rows}
    for name, text in words.items():
        row = by_cell[name, 16]
        assert text in f"{row.error['type']}: {row.error['message']}"
        assert (row.samples, row.time_s, row.throughput_tokens_per_sec) == ([], None, None)
    assert "16 tokens" in by_cell["TooLarge", 24].error["message"]
    assert "ValueError" in by_cell["Raises", 16].error["log_tail"]


def test_a_cell_that_was_not_ok_is_not_run_again(faulty):
    _, rows, events = faulty
    second = {(cell.block.name, cell.length) for cell in of_kind(events, RoundStarted)[1].cells}
    assert second == {cell for cell, status in statuses(rows).items() if status == "ok"}


def test_a_block_that_changes_its_process_harms_no_other_row(faulty, global_state):
    folder, _, _ = faulty
    # Built at both lengths in both rounds: before, between and after the block that changes everything.
    found = lines(folder / "found")
    assert len(found) >= 4
    assert len(set(found)) == 1
    assert found[0].startswith("[torch.float32, ")
    assert global_state()["default dtype"] == torch.float32
    assert "LONGCTX_TEST_VANDAL" not in os.environ


def test_a_cell_that_cannot_fit_is_not_tried(tmp_path, mine):
    rows, _ = sweep([mine("Counted")], tmp_path, sequence_lengths=[16, 1 << 30], batch_size=64)
    assert statuses(rows) == {("Counted", 16): "ok", ("Counted", 1 << 30): "skipped"}
    assert "GiB" in rows[1].error["message"]


def test_a_fault_in_a_later_round_keeps_the_samples_of_the_first(tmp_path, mine):
    def fail_later(event):
        if isinstance(event, RoundStarted) and event.index == 1:
            (tmp_path / "raise").touch()

    rows, _ = sweep([mine("Flaky")], tmp_path, on_event=fail_later, rounds=3)
    assert rows[0].status == "failed"
    assert [len(samples) for samples in rows[0].samples] == [2]
    assert rows[0].forward_time_median > 0


def test_a_length_that_was_measured_is_not_skipped_because_a_shorter_one_fails_later(tmp_path, mine):
    def fail_later(event):
        if isinstance(event, RoundStarted) and event.index == 1:
            (tmp_path / "oom").touch()

    rows, _ = sweep([mine("Flaky")], tmp_path, on_event=fail_later, rounds=2, sequence_lengths=[16, 24, 32, 40, 48])
    assert [row.status for row in rows] == ["oom", "ok", "ok", "ok", "ok"]


@pytest.mark.parametrize("block", ["Priced", "Priced:width=nan", "Priced:width=inf"])
def test_a_figure_that_is_no_number_is_null_and_ends_nothing(tmp_path, mine, block):
    rows, _ = sweep([mine(block), "Identity"], tmp_path)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert (rows[0].flops, rows[0].bytes, rows[0].state_bytes) == (None, None, 8.0)
    records = json.loads(saved(tmp_path).read_text(), parse_constant=pytest.fail)
    assert [record["flops"] is None for record in records] == [True, False]


def test_a_block_that_is_too_large_to_build_keeps_its_row(tmp_path, mine):
    rows, _ = sweep([mine("TooLargeToBuild"), "Identity"], tmp_path, sequence_lengths=[16, 24])
    assert [row.status for row in rows] == ["oom", "ok", "skipped", "ok"]


def test_a_batch_that_does_not_fit_spares_the_larger_ones(tmp_path, mine):
    rows = run_sweep([mine("TooLarge")], config_of(tmp_path, sequence_lengths=[16, 24]), vary={"batch_size": [1, 2]})
    assert [row.status for row in rows] == ["oom", "skipped", "skipped", "skipped"]
    assert "ran out of memory at 16 tokens" in rows[-1].error["message"]


# -- how a sweep ends early ----------------------------------------------------------------------------------------


def test_an_interrupt_keeps_all_finished_rows_and_lets_go_of_the_locks(tmp_path):
    lengths, events = [8, 16, 24, 32], []

    def interrupt(event):
        events.append(event)
        if isinstance(event, CellStarted) and event.cell.length == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(["Identity"], tmp_path, on_event=interrupt, sequence_lengths=lengths)
    assert isinstance(events[-1], SweepFinished)
    assert not events[-1].complete
    assert events[-1].reason == "interrupted"
    assert longctx.load(saved(tmp_path)) == list(events[-1].results)
    assert [row.sequence_length for row in events[-1].results] == [8, 16]
    rows, _ = sweep(["Identity"], tmp_path, sequence_lengths=lengths, resume=True)
    assert [row.status for row in rows] == ["ok"] * 4


def test_the_time_for_the_whole_ends_a_sweep_early_with_what_was_measured(tmp_path, mine):
    lengths = list(range(8, 808, 8))
    rows, events = sweep([mine("Slow")], tmp_path, sequence_lengths=lengths, max_time=2.0)
    assert 1 <= len(rows) < len(lengths)
    assert not events[-1].complete
    assert "2 s" in events[-1].reason
    assert list(events[-1].results) == rows
    assert longctx.load(saved(tmp_path)) == rows


def test_a_second_sweep_on_the_same_file_or_device_is_refused_until_the_first_has_ended(tmp_path):
    refused = []

    def second(event):
        if isinstance(event, SweepStarted):
            for file in ("run.json", "other.json"):
                with pytest.raises(LongctxError) as caught:
                    sweep(["Identity"], tmp_path, output_file=file, resume=True)
                refused.append(caught.value)

    first, _ = sweep(["Identity"], tmp_path, on_event=second)
    on_file, on_device = refused
    assert "run.json" in on_file.message
    assert "device cpu" in on_device.message
    for error in refused:
        assert error.message.startswith("another sweep is using")
        assert str(os.getpid()) in error.message
        assert error.exit_code == 2
    assert longctx.load(saved(tmp_path)) == first
    assert not (tmp_path / "out" / "other.json").exists()
    sweep(["Identity"], tmp_path, output_file="other.json")
