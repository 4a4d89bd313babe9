"""Sweeps in processes of their own that crash, hang, are interrupted and killed: rows are kept, no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from tiny_sweeps import BLOCKS, DIES_WHEN_IMPORTED, Stop, all_gone, children, lines, saved, statuses, sweep

import longctx
from longctx.engine import preparation
from longctx.engine.process import WorkerProcess
from longctx.events import CellStarted, SweepStarted

pytestmark = pytest.mark.usefixtures("tidy")

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


def test_what_a_worker_has_loaded_is_not_searched_for_garbage_in_every_cell(tmp_path):
    """Else that is half of the time of a short cell."""
    built = "import gc\nclass Built(Plain):\n    def __init__(self, d_model):\n        super().__init__()\n"
    (tmp_path / "mine.py").write_text(BLOCKS + built + "        note('frozen', gc.get_freeze_count() > 100_000)\n")
    rows, _ = sweep([f"{tmp_path}/mine.py:Built"], tmp_path, sequence_lengths=[8, 16], isolation="worker", gate=False)
    assert {row.status for row in rows} == {"ok"}
    found = lines(tmp_path / "frozen")
    assert found[-1] == "True" and "False" in found


def test_memory_that_grows_with_every_call_stands_in_the_row(tmp_path):
    hoards = "class Hoards(Plain):\n    kept = []\n    def forward(self, x):\n"
    hoards += "        self.kept.append(torch.ones(1 << 21))\n        return super().forward(x)\n"
    (tmp_path / "mine.py").write_text(BLOCKS + hoards)
    blocks = [f"{tmp_path}/mine.py:{name}" for name in ("Hoards", "Plain")]
    how = {"isolation": "worker", "benchmark_runs": 3, "profile_memory": True, "gate": False}
    rows, _ = sweep(blocks, tmp_path, sequence_lengths=[8], **how)
    assert ["memory_grows" in row.warnings for row in rows] == [True, False]


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
