"""A sweep that is resumed loses nothing that was measured, and measures nothing twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny_sweeps import BLOCKS, edit, lines, of_kind, saved, statuses, sweep

import longctx
from longctx.events import CellStarted, RoundStarted

pytestmark = pytest.mark.usefixtures("tidy")


def test_resume_measures_nothing_twice(tmp_path, mine):
    blocks = [mine("Counted"), "Identity"]
    first, _ = sweep(blocks, tmp_path, sequence_lengths=[16, 24], rounds=2, profile_memory=True)
    calls, text = lines(tmp_path / "calls"), saved(tmp_path).read_text()
    assert {"16", "24"} <= set(calls)
    again, events = sweep(blocks, tmp_path, sequence_lengths=[16, 24], rounds=2, profile_memory=True, resume=True)
    assert again == first
    assert list(events[0].reused.values()) == first
    assert of_kind(events, CellStarted) == []
    assert events[-1].complete
    assert lines(tmp_path / "calls") == calls
    assert saved(tmp_path).read_text() == text


def test_resume_measures_the_lengths_and_blocks_that_are_missing(tmp_path, mine):
    first, _ = sweep([mine("Counted")], tmp_path, sequence_lengths=[24])
    calls = Counter(lines(tmp_path / "calls"))
    rows, events = sweep([mine("Counted"), "Identity"], tmp_path, sequence_lengths=[16, 24], resume=True)
    started = {(event.cell.block.name, event.cell.length) for event in of_kind(events, CellStarted)}
    assert started == {("Counted", 16), ("Identity", 16), ("Identity", 24)}
    assert Counter(lines(tmp_path / "calls"))["24"] == calls["24"]
    assert [row.sequence_length for row in rows] == [16, 16, 24, 24]
    assert rows[2] == first[0]
    assert longctx.load(saved(tmp_path)) == rows


def test_resume_measures_the_rounds_that_are_missing(tmp_path, mine):
    (first,), _ = sweep([mine("Counted")], tmp_path)
    (row,), events = sweep([mine("Counted")], tmp_path, rounds=3, resume=True)
    assert [event.index for event in of_kind(events, RoundStarted)] == [1, 2]
    assert row.samples[0] == first.samples[0]
    assert len(row.samples) == 3
    assert row.first_call_s == first.first_call_s
    assert row.key == first.key
    # It tells how it came to be what it is: by asking for three.
    assert (first.config["rounds"], row.config["rounds"]) == (1, 3)
    assert row.command != first.command
    (fewer,), events = sweep([mine("Counted")], tmp_path, rounds=2, resume=True)
    assert fewer == row
    assert of_kind(events, CellStarted) == []


def test_resume_without_a_file_is_a_fresh_start(tmp_path):
    rows, _ = sweep(["Identity"], tmp_path, resume=True)
    assert longctx.load(saved(tmp_path)) == rows


def test_resume_keeps_what_it_does_not_know_in_front_and_unchanged(tmp_path):
    foreign = [
        {"block_name": "Theirs", "sequence_length": 16, "forward_time_mean": 0.5, "extra": {"deep": [1, "\u001b"]}},
        {"block_name": "Identity", "sequence_length": 16, "key": "of another machine", "samples": [[9.0]]},
    ]
    saved(tmp_path).parent.mkdir()
    saved(tmp_path).write_text(json.dumps(foreign))
    rows, _ = sweep(["Identity"], tmp_path, resume=True)
    records = json.loads(saved(tmp_path).read_text())
    assert records[:2] == foreign
    assert longctx.load(saved(tmp_path))[2:] == rows


LOST = {"samples": [], "forward_time_median": None, "forward_time_mean": None, "error": {"type": "T", "message": "m"}}


def test_crashed_and_timed_out_rows_are_tried_again_only_when_asked(tmp_path, mine):
    blocks, lengths = [mine("Counted"), mine("Plain")], [16, 24]
    sweep(blocks, tmp_path, sequence_lengths=lengths)
    crashed, late, skipped = ({"status": status, **LOST} for status in ("crashed", "timeout", "skipped"))
    edit(saved(tmp_path), Counted_16=crashed, Plain_16=late, Plain_24=skipped)
    before = lines(tmp_path / "calls")
    rows, _ = sweep(blocks, tmp_path, sequence_lengths=lengths, resume=True)
    assert statuses(rows) == {
        ("Counted", 16): "crashed",
        ("Plain", 16): "timeout",
        ("Counted", 24): "ok",
        ("Plain", 24): "skipped",
    }
    assert lines(tmp_path / "calls") == before
    rows, events = sweep(blocks, tmp_path, sequence_lengths=lengths, resume=True, retry=True)
    assert set(statuses(rows).values()) == {"ok"}
    assert all(row.error is None for row in rows)
    assert len(of_kind(events, CellStarted)) == 3
    assert longctx.load(saved(tmp_path)) == rows


def test_a_skipped_row_is_looked_at_again_and_other_faults_stand(tmp_path, mine):
    blocks = [mine("Counted"), mine("Plain")]
    sweep(blocks, tmp_path)
    edit(saved(tmp_path), Counted_16={"status": "skipped", **LOST}, Plain_16={"status": "wrong", **LOST})
    rows, _ = sweep(blocks, tmp_path, resume=True, retry=True)
    assert statuses(rows) == {("Counted", 16): "ok", ("Plain", 16): "wrong"}


def test_a_changed_source_file_is_measured_again_and_the_old_row_kept(tmp_path, mine):
    blocks = [mine("Counted")]
    (old,), _ = sweep(blocks, tmp_path)
    before = len(lines(tmp_path / "calls"))
    (tmp_path / "mine.py").write_text(BLOCKS.replace("/ 7", "/ 9"))
    (new,), events = sweep(blocks, tmp_path, resume=True)
    assert events[0].reused == {}
    assert len(lines(tmp_path / "calls")) > before
    assert new.source_hash != old.source_hash
    assert longctx.load(saved(tmp_path)) == [old, new]


def test_another_configuration_is_another_row(tmp_path):
    for values in ({}, {"seed": 1}, {"dtype": "fp64"}, {"batch_size": 2}, {"num_kv_heads": 1}):
        _, events = sweep(["Identity"], tmp_path, resume=True, **values)
        assert len(of_kind(events, CellStarted)) == 1
    assert len({row.key for row in longctx.load(saved(tmp_path))}) == 5


def test_two_rows_of_the_same_options_are_both_kept(tmp_path):
    blocks = ["BLADE", "BLADE:chunk_size=512"]
    first, _ = sweep(blocks, tmp_path)
    assert [row.block_name for row in first] == blocks
    assert first[0].block_options == first[1].block_options
    again, events = sweep(blocks, tmp_path, resume=True)
    assert again == first
    assert of_kind(events, CellStarted) == []
    assert longctx.load(saved(tmp_path)) == first


def test_resume_measures_the_memory_that_is_missing(tmp_path):
    (first,), _ = sweep(["Identity"], tmp_path)
    assert first.allocated_memory_mb is None
    (row,), _ = sweep(["Identity"], tmp_path, profile_memory=True, resume=True)
    assert row.allocated_memory_mb > 0
    assert row.samples == first.samples
