"""Real sweeps in tiny shapes: every fault is a row, nothing measured is lost, and nothing is measured twice.

Sweeps run in this process (`isolation="none"`) unless processes are the point; the blocks are the tests' own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

import longctx
from longctx import results as results_module
from longctx.config import BenchmarkConfig
from longctx.engine import preparation, runner, timing
from longctx.engine.process import WorkerProcess
from longctx.engine.runner import results_path, run_sweep
from longctx.errors import LongctxError, ResultsError, UsageError
from longctx.events import CellFinished, CellPhase, CellStarted, RoundStarted, SweepFinished, SweepStarted

BLOCKS = '''
import os, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from longctx.engine import timing

# A test needs no steady clock.
timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0, "cuda": 0.0}, {"cpu": 0.05, "cuda": 0.05}
HERE = Path(__file__).parent


def note(name, text):
    with open(HERE / name, "a") as file:
        file.write(f"{text}\\n")


class Plain(nn.Module):
    causal = True

    def forward(self, x):
        return x.cumsum(1) / 7


class Counted(Plain):
    """Leaves a line for every call."""

    def forward(self, x):
        note("calls", x.shape[1])
        return super().forward(x)


class Slow(Plain):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


class Raises(Plain):
    def forward(self, x):
        raise ValueError("what is this?")


class NotFinite(Plain):
    def forward(self, x):
        return x / 0


class Quits(Plain):
    def forward(self, x):
        sys.exit(4)


class TooLarge(Plain):
    def forward(self, x):
        raise MemoryError


class TooLargeToBuild(Plain):
    def __init__(self):
        super().__init__()
        raise MemoryError


class Short(Plain):
    def forward(self, x):
        return x[:, :-1]


class Segfault(Plain):
    def forward(self, x):
        print("last words", flush=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)


class Hang(Plain):
    def forward(self, x):
        time.sleep(3600)


class DiesWhenBuilt(Plain):
    def __init__(self):
        super().__init__()
        os._exit(5)


class Vandal(Plain):
    def __init__(self):
        super().__init__()
        torch.manual_seed(99)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)

    def forward(self, x):
        torch.manual_seed(99)
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        os.environ["LONGCTX_TEST_VANDAL"] = "1"
        os.chdir("/")
        return super().forward(x)


class Careful(Plain):
    """Says how it finds its process."""

    def __init__(self):
        super().__init__()
        state = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), os.getcwd()]
        state += [os.environ.get("LONGCTX_TEST_VANDAL"), sys.float_info.min / 2, torch.rand(()).item()]
        note("found" if (HERE / "measuring").exists() else "described", state)


class Flaky(Plain):
    """Fails at 16 tokens once there is a file that says so."""

    def forward(self, x):
        if x.shape[1] == 16 and (HERE / "raise").exists():
            raise ValueError("not today")
        if x.shape[1] == 16 and (HERE / "oom").exists():
            raise MemoryError
        return super().forward(x)


class Priced(Plain):
    def __init__(self, width=1.0):
        super().__init__()

    def cost(self, cell, options):
        return {"flops": float("nan"), "bytes": float("inf"), "state_bytes": 8.0}


class Where(Plain):
    """Tells which process runs it."""

    def forward(self, x):
        note("processes", f"{os.getpid()} {'MALLOC_TRIM_THRESHOLD_' in os.environ}")
        return super().forward(x)


note("imports", os.getpid())
'''

DIES_WHEN_IMPORTED = "import os\nprint('so long', flush=True)\nos._exit(6)\n"


class Stop(Exception):
    """A test has seen enough."""


@pytest.fixture(scope="module", autouse=True)
def brief(tmp_path_factory):
    """Short warm-ups, and locks of this module's own: other sweeps on this machine have nothing to do with it."""
    folder = str(tmp_path_factory.mktemp("locks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0, "cuda": 0.0})
        patch.setattr(timing, "MAX_WARM_S", {"cpu": 0.05, "cuda": 0.05})
        # Each cell collects garbage, and a test process holds much that is none.
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(autouse=True)
def tidy(brief):
    """A process that a fault of ours leaves behind does not disturb the next test."""
    gc.freeze()
    before = children()
    yield
    for process in children() - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def mine(tmp_path):
    """Names a block of the tests' own: `mine("Counted")`."""
    (tmp_path / "mine.py").write_text(BLOCKS)
    return lambda name: f"{tmp_path}/mine.py:{name}"


def config_of(folder: Path, **values) -> BenchmarkConfig:
    shared = {
        "d_model": 32,
        "n_heads": 2,
        "sequence_lengths": [16],
        "device": "cpu",
        # One: others may be at work on this machine, and two threads would wait for each other.
        "threads": 1,
        "rounds": 1,
        "warmup_runs": 1,
        "benchmark_runs": 2,
        "fixed_runs": True,
        "profile_memory": False,
        "isolation": "none",
        "results_dir": str(folder / "out"),
        "output_file": "run.json",
    }
    return BenchmarkConfig(**{**shared, **values})


def sweep(blocks, folder: Path, *, on_event=None, **values):
    """(results, events) of a sweep that saves to `saved(folder)`."""
    events = []

    def receive(event):
        events.append(event)
        if on_event is not None:
            on_event(event)

    return run_sweep(blocks, config_of(folder, **values), on_event=receive), events


def saved(folder: Path) -> Path:
    return folder / "out" / "run.json"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def statuses(rows) -> dict[tuple[str, int], str]:
    return {(row.block_name, row.sequence_length): row.status for row in rows}


def edit(path: Path, **by_cell) -> None:
    """Change records of a results file: `edit(path, Counted_16={"status": "crashed"})`."""
    records = json.loads(path.read_text())
    for record in records:
        record |= by_cell.get(f"{record['block_name']}_{record['sequence_length']}", {})
    path.write_text(json.dumps(records))


def children() -> set[psutil.Process]:
    """Processes that this one has, ended ones aside."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child)
    return found


def all_gone(processes, within_s: float = 10.0) -> bool:
    """Whether the processes end. One that nobody has reaped yet has."""
    deadline = time.monotonic() + within_s
    left = set(processes)
    while left and time.monotonic() < deadline:
        for process in list(left):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            left.remove(process)
        time.sleep(0.02)
    return not left


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


# -- what is refused before anything is measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("BLAED", "Did you mean 'BLADE'"),
        ("BLADE:chunk_sise=4", "chunk_size"),
        ("BLADE:chunk_size=0", "chunk_size"),
        ("nowhere.py:Block", "no file"),
        ("no_such_package:Block", "no_such_package"),
        ("{mine}:Plane", "Did you mean 'Plain'"),
        ("{mine}:Plain:width=3", "no option 'width'"),
        ("{mine}:HERE", "not something to build"),
    ],
)
def test_a_block_that_cannot_be_is_refused_and_no_file_is_made(tmp_path, mine, block, words):
    events = []
    with pytest.raises(LongctxError, match=words) as caught:
        target = block.replace("{mine}", mine("").rstrip(":"))
        run_sweep(["Identity", target], config_of(tmp_path), on_event=events.append)
    assert caught.value.exit_code == 2
    assert events == []
    assert not saved(tmp_path).exists()


def test_two_blocks_of_one_name_are_refused(tmp_path, mine):
    (tmp_path / "other.py").write_text(BLOCKS)
    with pytest.raises(LongctxError, match="same name"):
        sweep([mine("Plain"), f"{tmp_path}/other.py:Plain"], tmp_path)
    assert not saved(tmp_path).exists()


@pytest.mark.parametrize(
    ("name", "value"), [("d_model", 33), ("num_kv_heads", 3), ("timeout", math.inf), ("max_time", math.inf)]
)
def test_an_impossible_configuration_is_refused(tmp_path, name, value):
    with pytest.raises(UsageError, match=name):
        sweep(["Identity"], tmp_path, **{name: value})
    assert not saved(tmp_path).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_ends_in_five(tmp_path):
    with pytest.raises(LongctxError) as caught:
        sweep(["Identity"], tmp_path, device="cuda")
    assert caught.value.exit_code == 5
    assert not saved(tmp_path).exists()


def test_a_file_that_is_in_the_way_is_refused_and_left_alone(tmp_path, mine):
    saved(tmp_path).parent.mkdir()
    saved(tmp_path).write_text("[]")
    with pytest.raises(ResultsError, match="exists"):
        sweep([mine("Counted")], tmp_path)
    saved(tmp_path).write_text("damaged")
    with pytest.raises(ResultsError, match="not a results file"):
        sweep([mine("Counted")], tmp_path, resume=True)
    assert saved(tmp_path).read_text() == "damaged"
    assert lines(tmp_path / "calls") == []
    (row,), _ = sweep([mine("Counted")], tmp_path, force=True)
    assert longctx.load(saved(tmp_path)) == [row]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, mine):
    (tmp_path / "out").write_text("a file in the place of the folder")
    with pytest.raises(ResultsError, match="cannot write"):
        sweep([mine("Counted")], tmp_path)
    assert lines(tmp_path / "calls") == []


# -- where results go ----------------------------------------------------------------------------------------------


def test_a_name_lies_under_the_results_folder_and_a_path_where_it_says():
    def place(output_file):
        return results_path(BenchmarkConfig(results_dir="results", output_file=output_file))

    assert place("run.json") == Path("results/run.json")
    assert place("./run.json") == Path("run.json")
    assert place("here/run.json") == Path("here/run.json")
    assert place("/tmp/run.json") == Path("/tmp/run.json")
    assert place(None).parent == Path("results")
    assert place(None).suffix == ".json"


def test_a_file_in_the_working_directory_stays_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, events = sweep(["Identity"], tmp_path, output_file="./here.json")
    assert longctx.load("here.json") == rows
    assert events[0].path == "here.json"
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]


def test_nothing_is_written_where_nothing_is_to_be_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, events = sweep(["Identity"], tmp_path, save_results=False)
    assert statuses(rows) == {("Identity", 16): "ok"}
    assert events[0].path is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_sweep_and_keeps_what_was_saved(tmp_path, monkeypatch):
    write, writes = results_module.write_atomically, []

    def fill_up(path, text):
        writes.append(path)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(results_module, "write_atomically", fill_up)
    with pytest.raises(ResultsError, match="disk is full"):
        sweep(["Identity"], tmp_path, sequence_lengths=[8, 16, 24, 32])
    monkeypatch.undo()
    assert len(longctx.load(saved(tmp_path))) == 2
    rows, events = sweep(["Identity"], tmp_path, sequence_lengths=[8, 16, 24, 32], resume=True)
    assert len(rows) == 4
    assert len(of_kind(events, CellStarted)) == 2


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


# -- resuming ------------------------------------------------------------------------------------------------------


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


# -- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survived(tmp_path_factory, brief):
    """A sweep over blocks that take their process with them: (folder, results, processes left)."""
    folder = tmp_path_factory.mktemp("survived")
    (folder / "mine.py").write_text(BLOCKS)
    (folder / "dies.py").write_text(DIES_WHEN_IMPORTED)
    blocks = ["Identity", f"{folder}/dies.py:Anything"]
    blocks += [f"{folder}/mine.py:{name}" for name in ("DiesWhenBuilt", "Segfault", "Hang", "Plain")]
    before = children()
    results, _ = sweep(blocks, folder, sequence_lengths=[16, 24], isolation="worker", timeout=5.0)
    return folder, results, children() - before


def test_a_crash_or_a_hang_costs_its_own_rows_and_no_other(survived):
    folder, rows, _ = survived
    found = statuses(rows)
    expected = {
        "Identity": ("ok", "ok"),
        "Anything": ("crashed", "crashed"),
        "DiesWhenBuilt": ("crashed", "crashed"),
        "Segfault": ("crashed", "crashed"),
        "Hang": ("timeout", "skipped"),
        "Plain": ("ok", "ok"),
    }
    assert {name: (found[name, 16], found[name, 24]) for name in expected} == expected
    assert longctx.load(saved(folder)) == rows


def test_what_became_of_a_process_stands_in_its_row(survived):
    _, rows, _ = survived
    errors = {row.block_name: row.error for row in rows if row.sequence_length == 16}
    assert errors["Segfault"]["type"] == "SIGSEGV"
    assert "last words" in errors["Segfault"]["log_tail"]
    assert "5 s" in errors["Hang"]["message"]
    assert "while it was loaded" in errors["Anything"]["message"]
    assert "exit code 6" in errors["Anything"]["message"]
    assert "so long" in errors["Anything"]["log_tail"]
    assert "exit code 5" in errors["DiesWhenBuilt"]["message"]


def test_no_process_is_left(survived):
    _, _, left = survived
    assert left == set()


def test_each_round_is_a_fresh_process_and_memory_has_one_of_its_own(tmp_path, mine):
    before = children()
    rows, _ = sweep([mine("Where")], tmp_path, isolation="worker", rounds=2, profile_memory=True)
    assert statuses(rows) == {("Where", 16): "ok"}
    assert [len(samples) for samples in rows[0].samples] == [2, 2]
    assert rows[0].peak_memory_mb is not None
    assert rows[0].allocated_memory_mb > 0
    ran = {tuple(line.split()) for line in lines(tmp_path / "processes")}
    assert Counter(malloc for _, malloc in ran) == {"False": 2, "True": 1}
    # Looking at the block had a process of its own too.
    imported = set(lines(tmp_path / "imports"))
    assert len(imported) == 4
    assert str(os.getpid()) not in imported
    assert not children() - before


def test_the_process_that_looks_at_users_code_measures_nothing_and_is_gone_before_the_first_cell(
    tmp_path, mine, monkeypatch
):
    before, jobs, left = children(), {}, set()

    class Watched(WorkerProcess):
        def ask(self, job, **kwargs):
            jobs.setdefault(self.pid, []).append(job["job"])
            return super().ask(job, **kwargs)

    def look(event):
        if isinstance(event, SweepStarted):
            left.update(children() - before)
            raise Stop

    monkeypatch.setattr(preparation, "WorkerProcess", Watched)
    with pytest.raises(Stop):
        sweep([mine("Plain"), "Identity", mine("Counted")], tmp_path, on_event=look, isolation="worker")
    assert not children() - before
    looked = set(map(int, lines(tmp_path / "imports")))
    assert len(looked) == 1
    assert len(left) == 1
    assert not looked & {process.pid for process in left}
    # Starting up is no part of the time that a block may take.
    assert {names[0] for names in jobs.values()} == {"hello"}


def test_an_interrupt_while_a_worker_starts_leaves_none_behind(tmp_path):
    before, timers = children(), []

    def interrupt(event):
        if isinstance(event, CellStarted):
            # The worker that measures memory loads torch now.
            timers.append(threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)))
            timers[0].start()

    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(["Identity"], tmp_path, on_event=interrupt, isolation="worker", profile_memory=True)
    finally:
        for timer in timers:
            timer.cancel()
    assert all_gone(children() - before, within_s=1.0)


def test_a_hang_is_ended_by_the_time_for_the_whole_and_has_no_row(tmp_path, mine):
    before = children()
    rows, events = sweep([mine("Hang")], tmp_path, isolation="worker", max_time=4.0)
    assert rows == []
    assert not events[-1].complete
    assert not saved(tmp_path).exists()
    assert not children() - before


# -- the command, interrupted and killed ---------------------------------------------------------------------------


KILLS, MANY = 25, 40
"""Kills at random moments, and cells enough for an end to come before the last of them."""


@pytest.fixture
def command(tmp_path, mine):
    """Starts `longctx sweep` over so many lengths, saved to `saved(tmp_path)`."""
    with contextlib.ExitStack() as stack:

        def start(*words: str, cells: int) -> subprocess.Popen:
            call = [sys.executable, "-m", "longctx", "sweep", "--blocks", mine("Counted"), "--sequence-lengths"]
            call += [str(8 * index) for index in range(1, cells + 1)]
            shape = "--d-model 32 --n-heads 2 --rounds 1 --warmup-runs 1 --benchmark-runs 4 --device cpu --threads 1"
            call += [*shape.split(), "--no-memory-profile", "--output-file", str(saved(tmp_path)), *words]
            started = subprocess.Popen(
                call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            stack.callback(started.communicate)
            stack.callback(started.kill)
            return started

        yield start


def rows_on_disk(path: Path) -> list[dict]:
    """The records, each time from a whole file: what is not valid JSON raises.

    Without warnings: whether a time is suspect shows only beside longer ones.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    return [{name: value for name, value in row.items() if name != "warnings"} for row in rows]


def wait_for_rows(process: subprocess.Popen, path: Path, count: int) -> None:
    while len(rows_on_disk(path)) < count and process.poll() is None:
        time.sleep(0.005)


def test_ctrl_c_ends_in_130_with_all_finished_rows_on_disk_and_no_worker_left(command, tmp_path):
    process = command(cells=MANY)
    wait_for_rows(process, saved(tmp_path), 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    before = rows_on_disk(saved(tmp_path))
    # As a terminal does it: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert workers
    assert all_gone(workers)
    rows = rows_on_disk(saved(tmp_path))
    assert 1 <= len(before) <= len(rows) < MANY
    assert rows[: len(before)] == before
    assert {row["status"] for row in rows} == {"ok"}
    assert "--resume" in said
    assert list((tmp_path / "out").iterdir()) == [saved(tmp_path)]


def test_a_sweep_that_is_killed_again_and_again_loses_and_repeats_nothing(command, tmp_path):
    chance = random.Random()
    finished: list[dict] = []
    for _ in range(KILLS):
        process = command("--resume", cells=MANY)
        # Anywhere in its life: while it starts, while it measures, while it saves.
        end = time.monotonic() + chance.random() * 3.0
        workers = []
        while time.monotonic() < end:
            rows_on_disk(saved(tmp_path))
            workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else workers
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert all_gone(workers)
        rows = rows_on_disk(saved(tmp_path))
        assert rows[: len(finished)] == finished
        assert {row["status"] for row in rows} <= {"ok"}
        finished = rows
    done = {str(row["sequence_length"]) for row in finished}
    calls = Counter(lines(tmp_path / "calls")) if finished else Counter()
    process = command("--resume", cells=MANY)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    rows = rows_on_disk(saved(tmp_path))
    assert rows[: len(finished)] == finished
    assert [row["sequence_length"] for row in rows] == list(range(8, 8 * MANY + 8, 8))
    assert len({row["key"] for row in rows}) == MANY
    assert {row["status"] for row in rows} == {"ok"}
    assert all(len(row["samples"]) == 1 and len(row["samples"][0]) == 4 for row in rows)
    after = Counter(lines(tmp_path / "calls"))
    assert {length: after[length] for length in done} == {length: calls[length] for length in done}
    # A file that was being written when the end came may lie beside it, under a name that no reader looks at.
    assert [path for path in (tmp_path / "out").glob("*.json") if not path.name.startswith(".")] == [saved(tmp_path)]


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


def test_a_batch_that_does_not_fit_spares_the_larger_ones(tmp_path, mine):
    rows = run_sweep([mine("TooLarge")], config_of(tmp_path, sequence_lengths=[16, 24]), vary={"batch_size": [1, 2]})
    assert [row.status for row in rows] == ["oom", "skipped", "skipped", "skipped"]
    assert "ran out of memory at 16 tokens" in rows[-1].error["message"]
