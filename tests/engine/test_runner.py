"""Real sweeps in tiny shapes in which all is well: what is measured, in which order, and what is told and saved.

They run in this process (`isolation="none"`).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter

import pytest
import torch
from tiny_sweeps import BLOCKS, Stop, config_of, of_kind, saved, sweep
from typer.testing import CliRunner

import longctx
from longctx.engine import runner
from longctx.engine.runner import run_sweep
from longctx.errors import UsageError
from longctx.events import CellFinished, CellPhase, CellStarted, RoundStarted, SweepFinished, SweepStarted

pytestmark = pytest.mark.usefixtures("tidy")

# -- a sweep in which all is well ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory, brief):
    """A whole sweep: (folder, results, events, what of each finished cell was on disk when it was announced)."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "mine.py").write_text(BLOCKS)
    on_disk = []

    def look(event):
        if isinstance(event, CellFinished):
            rows = {record["key"]: record["samples"] for record in json.loads(saved(folder).read_text())}
            on_disk.append(rows.get(event.result.key) == event.result.samples)

    blocks = ["Identity", "Dense", f"{folder}/mine.py:Plain"]
    results, events = sweep(
        blocks, folder, on_event=look, sequence_lengths=[24, 16], rounds=3, profile_memory=True, seed=5
    )
    return folder, results, events, on_disk


def test_there_is_one_row_a_cell_in_cell_order(plain):
    _, rows, events, _ = plain
    names = ["Identity", "Dense", "Plain"]
    assert [(row.sequence_length, row.block_name) for row in rows] == [(n, name) for n in (16, 24) for name in names]
    assert [cell.label for cell in events[0].cells] == [
        f"{row.block_name} at {row.sequence_length} tokens" for row in rows
    ]


def test_rows_are_complete(plain):
    folder, rows, _, _ = plain
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert (row.status, row.error) == ("ok", None)
        assert [len(samples) for samples in row.samples] == [2, 2, 2]
        assert row.forward_time_min <= row.forward_time_median <= row.forward_time_max
        assert row.forward_time_ci95 is not None
        assert row.throughput_tokens_per_sec == pytest.approx(row.sequence_length / row.forward_time_mean)
        assert row.allocated_memory_mb > 0
        assert row.memory_efficiency_mb_per_token == pytest.approx(row.allocated_memory_mb / row.sequence_length)
        assert row.reserved_memory_mb is None
        assert row.first_call_s > 0
        assert row.gate["passed"]
        assert len(row.source_hash) == 64
        assert (row.dtype, row.mode, row.batch_size) == ("fp32", "forward", 1)
        assert row.environment["torch"] == torch.__version__
        assert row.environment["threads"] == row.environment["flags"]["threads"]
        assert row.config["d_model"] == 32
        assert row.config["seed"] == 5
        assert row.command.startswith("longctx sweep --blocks Identity Dense ")
        if row.block_name != "Plain":
            assert row.flops > 0
            assert row.gate["error"] < row.gate["tolerance"]
    assert rows[0].block_target == "Identity"
    assert rows[2].block_target == f"{folder}/mine.py:Plain"


def test_the_file_holds_what_was_returned(plain):
    folder, rows, _, _ = plain
    assert longctx.load(saved(folder)) == rows
    assert list((folder / "out").iterdir()) == [saved(folder)]


def test_events_begin_with_the_plan_and_end_with_the_results(plain):
    folder, rows, events, _ = plain
    first, last = events[0], events[-1]
    assert isinstance(first, SweepStarted)
    assert (first.rounds, first.path, first.reused) == (3, str(saved(folder)), {})
    assert set(first.weights) == set(first.cells)
    assert isinstance(last, SweepFinished)
    assert (last.complete, last.reason) == (True, None)
    assert list(last.results) == rows
    assert len(of_kind(events, SweepStarted)) == len(of_kind(events, SweepFinished)) == 1


def test_every_cell_is_announced_once_a_round_and_is_on_disk_by_then(plain):
    _, _, events, on_disk = plain
    rounds = of_kind(events, RoundStarted)
    assert [event.index for event in rounds] == [0, 1, 2]
    for event in rounds:
        assert Counter(event.cells) == Counter(events[0].cells)
    order = [(cell, event.index) for event in rounds for cell in event.cells]
    assert [(event.cell, event.round) for event in of_kind(events, CellStarted)] == order
    assert [(event.cell, event.round) for event in of_kind(events, CellFinished)] == order
    assert on_disk == [True] * len(order)
    phases = {event.phase for event in of_kind(events, CellPhase)}
    assert phases == {"build", "gate", "warmup", "timing", "memory"}


def test_the_gate_and_memory_are_the_first_rounds_alone(plain):
    _, _, events, _ = plain
    second = events.index(of_kind(events, RoundStarted)[1])
    assert {event.phase for event in of_kind(events[second:], CellPhase)} == {"build", "warmup", "timing"}


def test_the_first_round_goes_up_in_length(plain):
    _, _, events, _ = plain
    lengths = [cell.length for cell in of_kind(events, RoundStarted)[0].cells]
    assert lengths == sorted(lengths)


def test_later_rounds_are_shuffled_by_the_seed(tmp_path):
    def orders(seed: int):
        seen = []

        def look(event):
            if isinstance(event, RoundStarted):
                seen.append(event.cells)
                if event.index == 1:
                    raise Stop

        with pytest.raises(Stop):
            values = {"sequence_lengths": [8, 16, 24], "rounds": 2, "force": True}
            sweep(["Identity", "Dense"], tmp_path, on_event=look, seed=seed, **values)
        return seen

    one, same, other = orders(0), orders(0), orders(1)
    assert one == same
    assert one[1] != other[1]
    assert set(one[1]) == set(other[1]) == set(one[0])
    assert [cell.length for cell in one[1]] != sorted(cell.length for cell in one[1])


def test_benchmark_and_load_agree(tmp_path):
    rows = longctx.benchmark(["Identity"], config_of(tmp_path))
    assert [type(row) for row in rows] == [longctx.BenchmarkResult]
    assert longctx.load(saved(tmp_path)) == rows


def test_blocks_of_the_configuration_are_measured_when_no_others_are_named(tmp_path):
    rows = longctx.benchmark(config=config_of(tmp_path, blocks=["Identity"]))
    assert [row.block_name for row in rows] == ["Identity"]


def test_names_of_ours_have_no_case_and_count_once(tmp_path):
    rows, _ = sweep(["identity", "Identity", "IDENTITY"], tmp_path)
    assert [(row.block_name, row.block_target) for row in rows] == [("Identity", "Identity")]


def test_a_sweep_in_this_process_leaves_it_as_it_was(tmp_path, global_state):
    threads = torch.get_num_threads() + 1
    before = global_state()
    sweep(["Identity"], tmp_path, threads=threads)
    assert global_state() == before


def test_modes_and_batches_are_rows_of_one_sweep(tmp_path, mine):
    vary = {"mode": ["forward", "train", "decode"], "batch_size": [1, 2]}
    events = []
    config = config_of(tmp_path, sequence_lengths=[24, 16])
    rows = run_sweep(["Identity", mine("Plain")], config, vary=vary, on_event=events.append)
    places = [(row.mode, row.batch_size, row.sequence_length, row.block_name) for row in rows]
    assert places == [
        (mode, batch, length, name)
        for mode in vary["mode"]
        for batch in (1, 2)
        for length in (16, 24)
        for name in ("Identity", "Plain")
    ]
    assert {row.status for row in rows if row.mode == "decode" and row.block_name == "Plain"} == {"unsupported"}
    assert {row.status for row in rows if row.mode != "decode" or row.block_name != "Plain"} == {"ok"}
    for row in rows:
        assert (row.config["mode"], row.config["batch_size"]) == (row.mode, row.batch_size)
        assert (row.forward_part_s is not None) == (row.mode == "train")
        assert "--batch-size 1 2" in row.command and "--mode forward train decode" in row.command
    assert len({row.key for row in rows}) == len(rows)
    order = [(event.cell.length, event.cell.batch_size) for event in of_kind(events, CellStarted)]
    assert order == sorted(order)
    events.clear()
    again = run_sweep(
        ["Identity", mine("Plain")], dataclasses.replace(config, resume=True), vary=vary, on_event=events.append
    )
    assert again == rows
    assert of_kind(events, CellStarted) == []
    # Another mode joins those that are there.
    more = run_sweep(["Identity"], dataclasses.replace(config, resume=True, mode="prefill"))
    assert {row.mode for row in more} == {"prefill"}
    assert len(longctx.load(saved(tmp_path))) == len(rows) + 2


def test_shapes_and_formats_are_rows_of_one_sweep(tmp_path):
    vary = {"dtype": ["auto", "fp32", "fp64"], "d_model": [16, 32]}
    rows = run_sweep(["Identity"], config_of(tmp_path), vary=vary)
    assert [(row.dtype, row.config["d_model"]) for row in rows] == [
        ("fp32", 16),
        ("fp32", 32),
        ("fp64", 16),
        ("fp64", 32),
    ]
    with pytest.raises(UsageError):
        run_sweep(["Identity"], config_of(tmp_path), vary={"d_model": [32, 33]})


# -- the command that reproduces a run -----------------------------------------------------------------------------

NOT_REPRODUCED = ("output_file", "results_dir", "save_results", "resume", "retry", "force", "verbose", "blocks")
"""Where a run saved, what it took over and how it spoke are no part of what it measured."""


def test_the_stored_command_measures_the_same(tmp_path, monkeypatch):
    config = config_of(
        tmp_path,
        sequence_lengths=[16, 24],
        batch_size=2,
        num_kv_heads=1,
        dtype="fp64",
        rounds=2,
        seed=3,
        threads=1,
        warmup_runs=2,
        timeout=77.5,
        gate=False,
        torch_benchmark=False,
        cudnn_benchmark=False,
        cudnn_deterministic=True,
    )
    blocks = ["Identity", "BLADE:chunk_size=8"]
    command = run_sweep(blocks, config)[0].command
    seen = []

    def see(blocks, config, **kwargs):
        seen.append((blocks, config.to_json() | {"fixed_runs": config.exact_runs}))
        return []

    from longctx.cli.main import build

    monkeypatch.setattr(runner, "run_sweep", see)
    words = shlex.split(command)
    assert words[0] == "longctx"
    ended = CliRunner().invoke(build(), [*words[1:], "--json"], prog_name="longctx")
    assert seen, ended.output
    assert seen[0][0] == blocks
    wanted = {name: value for name, value in config.to_json().items() if name not in NOT_REPRODUCED}
    assert {name: seen[0][1][name] for name in wanted} == wanted


def test_a_command_that_is_given_is_stored(tmp_path):
    (row,) = run_sweep(["Identity"], config_of(tmp_path), command="longctx quick 'as typed'")
    assert row.command == "longctx quick 'as typed'"
    assert longctx.load(saved(tmp_path))[0].command == row.command
