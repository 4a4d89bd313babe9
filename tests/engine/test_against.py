"""Sweeps with --against: two sides in turns, each a row of its own, whatever becomes of the other.

Most run with stand-ins for the processes, which answer at once; the real ones are few and tiny.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import longctx
from longctx.analysis.paired import judge
from longctx.config import BenchmarkConfig, BlockRequest
from longctx.engine import preparation, process, timing, turns
from longctx.engine.process import WorkerLost, WorkerProcess
from longctx.engine.run_against import opponent, run_against
from longctx.engine.timing import time_call
from longctx.engine.turns import Turns
from longctx.errors import LongctxError, UsageError
from longctx.events import CellFinished, CellStarted, Notice, SweepFinished, SweepStarted


def config_of(folder: Path, **values) -> BenchmarkConfig:
    shared = {
        "d_model": 32,
        "n_heads": 2,
        "sequence_lengths": [16],
        "device": "cpu",
        "threads": 1,
        "rounds": 5,
        "warmup_runs": 1,
        "fixed_runs": False,
        "profile_memory": False,
        "results_dir": str(folder / "out"),
        "output_file": "run.json",
    }
    return BenchmarkConfig(**(shared | values))


def saved(folder: Path) -> Path:
    return folder / "out" / "run.json"


def names_of(pairs) -> list[tuple[str, str]]:
    return [(ours.block_name, theirs.block_name) for ours, theirs in pairs]


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    """Other sweeps on this machine have nothing to do with these."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


# -- what is against what ------------------------------------------------------------------------------------------


def test_a_folder_is_told_from_a_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "dense").mkdir()
    assert opponent("old").folder == str(tmp_path / "old")
    assert opponent("./dense").folder == str(tmp_path / "dense")
    assert opponent("dense").block == BlockRequest(target="Dense")
    assert opponent("BLADE:chunk_size=8").block.options == (("chunk_size", 8),)
    assert opponent("old.py:Block").block.target == "old.py:Block"
    with pytest.raises(UsageError, match="no folder"):
        opponent("../nowhere/at/all")
    with pytest.raises(UsageError, match="Did you mean 'BLADE'"):
        opponent("BLAED")


@pytest.mark.parametrize(
    ("blocks", "other", "values", "words"),
    [
        (["BLADE"], "Dense", {"isolation": "none"}, "process for each side"),
        (["BLADE"], "{folder}", {}, "same in every checkout"),
        (None, "{folder}", {}, "same in every checkout"),
        (["/somewhere/else.py:Block"], "{folder}", {}, "does not lie in the working directory"),
        (["BLAED"], "Dense", {}, "Did you mean 'BLADE'"),
        (["one.py:Block", "two.py:Block"], "Dense", {}, "same name"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_process_starts(
    tmp_path, monkeypatch, blocks, other, values, words
):
    monkeypatch.setattr(preparation, "WorkerProcess", None)
    with pytest.raises(LongctxError, match=words) as caught:
        run_against(blocks, other.replace("{folder}", str(tmp_path)), config_of(tmp_path, **values))
    assert caught.value.exit_code == 2
    assert not saved(tmp_path).exists()


# -- turns ---------------------------------------------------------------------------------------------------------


def turns_of(*call_s: float, kind: str = "cpu", seed: str = "0", **values) -> Turns:
    return Turns(dict(enumerate(call_s)), config_of(Path("."), **values), kind=kind, seed=seed)


def take(plan: Turns, *, ratio: float = 1.0, most: int = 1000) -> list[int]:
    """Play a round with steady sides; the order in which they were asked."""
    asked = []
    while not plan.over and len(asked) < most:
        for which in plan.order():
            asked.append(which)
            plan.add(which, [0.01 * (ratio if which == 0 else 1.0)] * plan.job(which)["count"])
    return asked


def test_sides_alternate_and_neither_always_begins():
    asked = take(turns_of(0.01, 0.01))
    first, second = asked[:2]
    assert {first, second} == {0, 1}
    assert asked[:6] == [first, second, second, first, first, second]
    assert {take(turns_of(0.01, 0.01, seed=str(n)))[0] for n in range(20)} == {0, 1}


def test_a_turn_is_a_few_short_samples_and_the_same_for_both():
    assert turns_of(0.002, 0.0021).job(0) == {"job": "take", "count": 10, "calls": 1}
    assert turns_of(0.0002, 0.00021).job(1) == {"job": "take", "count": 20, "calls": 5}
    assert turns_of(0.5, 0.01).job(1)["count"] == 1
    assert turns_of(1e-6, 1e-6).job(0)["count"] <= turns.MAX_TURN
    assert turns_of(1e-5, 1e-5, kind="cuda").job(0) == {"job": "take", "count": 50, "calls": 5}
    # Speeds far apart: each side fills its own samples.
    far = turns_of(0.0001, 0.01)
    assert (far.job(0)["calls"], far.job(1)["calls"]) == (10, 1)


def test_a_round_ends_when_the_ratio_is_known_or_the_time_is_up(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(turns.time, "monotonic", lambda: 0.0)
    assert len(take(turns_of(0.01, 0.01))) == 2 * turns.LEAST_TURNS
    assert len(take(turns_of(2.0, 2.0))) == 2 * turns.LEAST_TURNS
    noisy = turns_of(0.01, 0.01)
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock) * 0.1)
    asked = 0
    while not noisy.over:
        for which in noisy.order():
            noisy.add(which, [0.01 * (1 + (asked % 7) / 7)])
            asked += 1
    assert asked > turns.LEAST_TURNS * 2
    assert next(clock) * 0.1 >= turns.MORE_S


def test_exact_runs_are_exact():
    plan = turns_of(0.002, 0.002, benchmark_runs=23, fixed_runs=True)
    take(plan)
    assert [len(samples) for samples in plan.samples.values()] == [23, 23]


def test_a_side_left_alone_takes_the_least_and_stops():
    assert len(take(turns_of(0.01))) == turns.LEAST_TURNS
    plan = turns_of(0.01, 0.01)
    take(plan, most=2)
    plan.lose(0)
    assert set(take(plan)) == {1}
    plan.lose(1)
    assert plan.over


def test_samples_come_when_they_are_ordered(monkeypatch):
    monkeypatch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0})
    monkeypatch.setattr(timing, "MAX_WARM_S", {"cpu": 0.01})
    calls, events = [], []
    orders = iter([{"job": "take", "count": 2, "calls": 3}, {"job": "take", "count": 1, "calls": 3}, {"job": "end"}, 1])

    def emit(event):
        events.append((event, len(calls)))

    plan = SimpleNamespace(warmup_runs=1, runs=50, exact=True, budget_s=9.0)
    cpu = torch.device("cpu")
    found = time_call(lambda: calls.append(time.sleep(0.001)), device=cpu, plan=plan, emit=emit, orders=orders)
    told = [(event["event"], count) for event, count in events if event["event"] != "phase"]
    warm = told[0][1]
    # Each turn begins with a call that does not count.
    assert told == [("ready", warm), ("taken", warm + 7), ("taken", warm + 11)]
    assert [len(event["samples"]) for event, _ in events if event["event"] == "taken"] == [2, 1]
    assert len(found.samples) == 3
    assert (found.calls_per_sample, found.contention) == (3, None)
    assert list(orders) == [1]


def test_threads_of_a_side_do_not_spin_while_the_other_has_its_turn(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinite")
    shared = {"memory": False, "elsewhere": False}
    assert process._environment(2, in_turns=False, **shared)["GOMP_SPINCOUNT"] == "infinite"
    assert int(process._environment(2, in_turns=True, **shared)["GOMP_SPINCOUNT"]) <= 10_000


def test_both_sides_keep_the_memory_that_they_free_except_to_measure_it(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    found = process._environment(1, memory=False, in_turns=True, elsewhere=False)
    assert process.TURNS_ENVIRONMENT.items() <= found.items()
    found = process._environment(1, memory=True, in_turns=True, elsewhere=False)
    assert process.MALLOC_ENVIRONMENT.items() <= found.items()


# -- a sweep with stand-ins for its processes ----------------------------------------------------------------------


class Stage:
    """Stands in for `WorkerProcess`: every side takes `seconds[target]` a call, and fails as `faults` says."""

    def __init__(self) -> None:
        self.seconds: dict[str, float | Callable[[int], float]] = {}
        """Of a call, or a function of the round."""
        self.faults: dict[tuple[str, str], object] = {}
        """(target, job) -> a status that ends the cell, or an exception."""
        self.jobs: list[tuple[int, str, str]] = []
        """(process, target, job)"""
        self.open: set[int] = set()
        self.folders: dict[int, str | None] = {}
        self.numbers = itertools.count(1)

    def __call__(self, config, *, threads, memory=False, in_turns=False, folder=None):
        assert in_turns
        return Actor(self, next(self.numbers), folder)


class Actor:
    def __init__(self, stage: Stage, number: int, folder: str | None) -> None:
        self.stage, self.number, self.target = stage, number, ""
        self.samples: list[float] = []
        stage.open.add(number)
        stage.folders[number] = folder

    def begin(self, job) -> None:
        pass

    def close(self) -> None:
        self.stage.open.discard(self.number)

    def log_tail(self) -> str:
        return "the end of the log"

    def ask(self, job, *, timeout, on_event=None, until="done"):
        kind = job["job"]
        if kind == "hello":
            flags = {"threads": 1, "tf32_matmul": False}
            environment = {"gpu": None, "uuid": None, "torch": "2.13.0", "flags": flags}
            return {"event": "done", "device": "cpu", "dtype": "fp32", "environment": environment}
        if kind == "describe":
            return {"event": "done", "identity": {"options": job["options"], "source_hash": job["target"]}}
        if kind == "measure":
            self.target, self.samples = job["cell"]["block"]["target"], []
            on_event({"event": "phase", "phase": "warmup"})
        self.stage.jobs.append((self.number, self.target, kind))
        if fault := self.stage.faults.get((self.target, kind)):
            if isinstance(fault, Exception):
                self.close()
                raise fault
            return {"event": "done", "found": self.found(fault)}
        seconds = self.stage.seconds.get(self.target, 0.01)
        # Of blocks of ours two processes start in each round.
        seconds = seconds((self.number - 1) // 2) if callable(seconds) else seconds
        if kind == "measure" and "in_turns" in job:
            return {"event": "ready", "call_s": seconds}
        if kind == "take":
            taken = [seconds] * job["count"]
            self.samples += taken
            return {"event": "taken", "samples": taken}
        return {"event": "done", "found": self.found("ok")}

    def found(self, status: str) -> dict:
        error = None if status == "ok" else {"type": "Fault", "message": f"it was {status}"}
        samples = self.samples if status == "ok" else []
        numbers = {"host_time_median": None, "allocated_memory_mb": 1.0}
        return {"status": status, "error": error, "warnings": [], "samples_round": samples, **numbers}


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(preparation, "WorkerProcess", stage)
    return stage


def test_both_sides_are_rows_with_samples_side_by_side(stage, tmp_path):
    stage.seconds = {"new.py:Block": 0.02, "Dense": 0.01}
    events = []
    config = config_of(tmp_path, sequence_lengths=[32, 16])
    pairs = run_against(["new.py:Block"], "dense", config, on_event=events.append)
    assert names_of(pairs) == [("Block", "Dense")] * 2
    assert [ours.sequence_length for ours, _ in pairs] == [16, 32]
    for ours, theirs in pairs:
        assert (ours.status, theirs.status) == ("ok", "ok")
        assert [len(values) for values in ours.samples] == [len(values) for values in theirs.samples] == [6] * 5
        assert ours.key != theirs.key
        assert judge(ours, theirs).outcome.ratio == pytest.approx(2.0)
        assert judge(ours, theirs).outcome.verdict == "slower"
    assert longctx.load(saved(tmp_path)) == [row for pair in pairs for row in pair]
    assert isinstance(events[0], SweepStarted)
    assert isinstance(events[-1], SweepFinished)
    finished = [(event.cell.block.name, event.round) for event in events if isinstance(event, CellFinished)]
    assert Counter(finished) == {(name, index): 2 for name in ("Block", "Dense") for index in range(5)}
    assert stage.open == set()


def test_each_round_has_two_fresh_processes_that_alternate(stage, tmp_path):
    run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=3))
    by_round = [list(group) for ends, group in itertools.groupby(stage.jobs, lambda job: job[2] == "end") if not ends]
    assert len(by_round) == 3
    processes = [{number for number, _, _ in jobs} for jobs in by_round]
    assert [len(numbers) for numbers in processes] == [2, 2, 2]
    assert len(set().union(*processes)) == 6
    for jobs in by_round:
        takers = [target for _, target, kind in jobs if kind == "take"]
        assert takers == [*takers[:2], *takers[1::-1]] * (len(takers) // 4)


def test_several_blocks_have_the_opponent_beside_each(stage, tmp_path):
    pairs = run_against(["BLADE", "DPASSM"], "Dense", config_of(tmp_path, rounds=1))
    assert names_of(pairs) == [("BLADE", "Dense (beside BLADE)"), ("DPASSM", "Dense (beside DPASSM)")]
    assert len({row.key for pair in pairs for row in pair}) == 4


def test_all_blocks_are_compared_with_another_but_not_with_itself(stage, tmp_path):
    pairs = run_against(None, "Dense", config_of(tmp_path, rounds=1))
    assert [ours.block_name for ours, _ in pairs] == [name for name in longctx.blocks.names() if name != "Dense"]


def test_a_block_against_itself_has_two_names_and_two_rows(stage, tmp_path):
    pairs = run_against(["a.py:Block"], "a.py:Block", config_of(tmp_path))
    assert names_of(pairs) == [("Block", "Block (again)")]
    assert pairs[0][0].key != pairs[0][1].key
    assert judge(*pairs[0]).outcome.verdict == "same"
    pairs = run_against(["a.py:Block"], "b.py:Block", config_of(tmp_path, force=True))
    assert names_of(pairs) == [("Block", "b.py:Block")]


def test_a_checkout_has_processes_of_its_own_in_its_folder(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    blocks = ["some.module:Block:size=3", str(tmp_path / "mine.py:Other")]
    pairs = run_against(blocks, "old", config_of(tmp_path, rounds=2, sequence_lengths=[16]))
    assert names_of(pairs) == [("Block:size=3", "Block:size=3@old"), ("Other", "Other@old")]
    assert pairs[1][1].block_target == "mine.py:Other"
    folder = str(tmp_path / "old")
    ran = {(target, stage.folders[number]) for number, target, kind in stage.jobs if kind == "take"}
    assert ran == {
        ("some.module:Block", None),
        ("some.module:Block", folder),
        (str(tmp_path / "mine.py:Other"), None),
        ("mine.py:Other", folder),
    }
    words = shlex.split(pairs[0][0].command)
    assert words[-2:] == ["--against", "old"]


@pytest.mark.parametrize(
    ("job", "fault", "status"),
    [
        ("measure", "wrong", "wrong"),
        ("measure", "unsupported", "unsupported"),
        ("take", "oom", "oom"),
        ("take", WorkerLost("crashed", "SIGSEGV", "the process ended by SIGSEGV", "last words"), "crashed"),
        ("end", WorkerLost("timeout", "Timeout", "no result", ""), "timeout"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_fault_is_a_row_and_leaves_the_other_side_its_own(stage, tmp_path, job, fault, status, side):
    targets = ["BLADE", "Dense"]
    stage.faults[targets[side], job] = fault
    ((ours, theirs),) = run_against(["BLADE"], "Dense", config_of(tmp_path))
    failed, other = (ours, theirs) if side == 0 else (theirs, ours)
    assert (failed.status, failed.samples) == (status, [])
    assert (other.status, len(other.samples)) == ("ok", 1)
    assert len(other.samples[0]) >= turns.LEAST_TURNS
    assert judge(ours, theirs).outcome.verdict == "not ok"
    # The next rounds would tell nothing.
    assert Counter(target for _, target, kind in stage.jobs if kind == "measure") == {"BLADE": 1, "Dense": 1}
    assert stage.open == set()


def test_a_side_that_runs_out_of_memory_is_spared_longer_lengths(stage, tmp_path):
    stage.faults["BLADE", "measure"] = "oom"
    pairs = run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=1, sequence_lengths=[16, 32]))
    assert [(ours.status, theirs.status) for ours, theirs in pairs] == [("oom", "ok"), ("skipped", "ok")]


def test_a_pair_that_is_inconclusive_gets_more_rounds_once(stage, tmp_path):
    ratios = [1.08, 1.07, 0.99, 1.09, 1.08, 1.07, 1.08, 1.08, 1.08]
    stage.seconds["BLADE"] = lambda index: 0.01 * ratios[index]
    events = []
    ((ours, theirs),) = run_against(["BLADE"], "Dense", config_of(tmp_path))
    assert len(ours.samples) == 5
    assert judge(ours, theirs).outcome.verdict == "inconclusive"
    stage.numbers = itertools.count(1)
    config = config_of(tmp_path, force=True)
    ((ours, theirs),) = run_against(["BLADE"], "Dense", config, on_event=events.append, settle=True)
    assert (len(ours.samples), len(theirs.samples)) == (9, 9)
    assert judge(ours, theirs).outcome.verdict == "slower"
    assert [event.text for event in events if isinstance(event, Notice)] == ["1 pair is inconclusive: 4 more rounds"]
    # Once: nine rounds that tell nothing are not followed by others.
    before = len(stage.jobs)
    run_against(["BLADE"], "Dense", config_of(tmp_path, resume=True), settle=True)
    assert len(stage.jobs) == before


def test_resume_measures_what_a_pair_lacks(stage, tmp_path):
    run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=2))
    before = len(stage.jobs)
    pairs = run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=2, resume=True))
    assert len(stage.jobs) == before
    assert [len(row.samples) for row in pairs[0]] == [2, 2]
    pairs = run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=3, sequence_lengths=[16, 32], resume=True))
    assert [[len(row.samples) for row in pair] for pair in pairs] == [[3, 3], [3, 3]]
    assert len(longctx.load(saved(tmp_path))) == 4
    # Samples taken beside another opponent, or beside none, are not of this pair.
    run_against(["BLADE"], "Identity", config_of(tmp_path, rounds=1, resume=True))
    assert len(longctx.load(saved(tmp_path))) == 6


def test_resume_begins_a_pair_anew_of_which_one_side_is_missing(stage, tmp_path):
    run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=2))
    records = json.loads(saved(tmp_path).read_text())
    saved(tmp_path).write_text(json.dumps(records[:1]))
    pairs = run_against(["BLADE"], "Dense", config_of(tmp_path, rounds=2, resume=True))
    assert [len(row.samples) for row in pairs[0]] == [2, 2]
    assert Counter(target for _, target, kind in stage.jobs if kind == "measure") == {"BLADE": 4, "Dense": 4}


def test_a_failed_side_is_tried_again_only_when_asked(stage, tmp_path):
    stage.faults["BLADE", "take"] = WorkerLost("crashed", "Exit", "gone", "")
    run_against(["BLADE"], "Dense", config_of(tmp_path))
    stage.faults.clear()
    before = len(stage.jobs)
    ((ours, _),) = run_against(["BLADE"], "Dense", config_of(tmp_path, resume=True))
    assert (ours.status, len(stage.jobs)) == ("crashed", before)
    ((ours, theirs),) = run_against(["BLADE"], "Dense", config_of(tmp_path, resume=True, retry=True))
    assert (ours.status, len(ours.samples), len(theirs.samples)) == ("ok", 5, 5)


def test_an_interrupt_keeps_whole_pairs_and_no_process(stage, tmp_path):
    def stop(event):
        if isinstance(event, CellStarted) and event.cell.length == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_against(["BLADE"], "Dense", config_of(tmp_path, sequence_lengths=[16, 32]), on_event=stop)
    assert [row.sequence_length for row in longctx.load(saved(tmp_path))] == [16, 16]
    assert stage.open == set()


def test_the_time_for_the_whole_ends_it_early(stage, tmp_path):
    events = []
    config = config_of(tmp_path, max_time=1e-6)
    assert run_against(["BLADE"], "Dense", config, on_event=events.append) == []
    assert not events[-1].complete


# -- real processes ------------------------------------------------------------------------------------------------

BLOCKS = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from longctx.engine import timing

timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0, "cuda": 0.0}, {"cpu": 0.05, "cuda": 0.05}
HERE = Path(__file__).parent
WORK = 20


class Plain(nn.Module):
    causal = True

    def __init__(self, d_model, factor=1.0):
        super().__init__()
        self.times = round(WORK * factor)
        self.register_buffer("w", torch.eye(d_model))
        self.calls = 0

    def forward(self, x):
        y = x
        for _ in range(self.times):
            y = y @ self.w
        return y


class Dies(Plain):
    def forward(self, x):
        self.calls += 1
        if self.calls > 40:
            print("last words", flush=True)
            os._exit(7)
        return super().forward(x)
"""

PACKAGED = BLOCKS.replace("WORK = 20", "from .work import WORK")


def children() -> set[psutil.Process]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child)
    return found


class Watch:
    """Makes worker processes, and tells how much processor time each side uses in its own turns and in the other's."""

    def __init__(self) -> None:
        self.alive: dict[int, psutil.Process] = {}
        self.own_s = self.other_s = 0.0
        self.folders: list[Path] = []

    def __call__(self, *args, **kwargs) -> WorkerProcess:
        watch = self

        class Watched(WorkerProcess):
            def ask(self, job, **kwargs):
                if job["job"] != "take":
                    return super().ask(job, **kwargs)
                watch.see(self.pid)
                before = watch.used()
                answer = super().ask(job, **kwargs)
                for pid, seconds in watch.used().items():
                    if pid == self.pid:
                        watch.own_s += seconds - before[pid]
                    else:
                        watch.other_s += seconds - before[pid]
                return answer

        return Watched(*args, **kwargs)

    def see(self, pid: int) -> None:
        if pid not in self.alive:
            self.alive[pid] = psutil.Process(pid)
            self.folders.append(Path(self.alive[pid].cwd()))

    def used(self) -> dict[int, float]:
        return {pid: sum(each.cpu_times()[:2]) for pid, each in self.alive.items()}


def test_the_same_block_in_two_checkouts(tmp_path, monkeypatch):
    for folder, work in (("new", 60), ("old", 20)):
        package = tmp_path / folder / "src" / "pack" if folder == "old" else tmp_path / folder / "pack"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "work.py").write_text(f"WORK = {work}\n")
        (package / "mix.py").write_text(PACKAGED)
    monkeypatch.chdir(tmp_path / "new")
    watch = Watch()
    monkeypatch.setattr(preparation, "WorkerProcess", watch)
    before = children()
    values = {"rounds": 1, "benchmark_runs": 40, "fixed_runs": True, "threads": 2, "sequence_lengths": [512]}
    ((ours, theirs),) = run_against(["pack.mix:Plain"], "../old", config_of(tmp_path, profile_memory=True, **values))
    assert (ours.status, theirs.status) == ("ok", "ok"), (ours.error, theirs.error)
    assert (ours.block_name, theirs.block_name) == ("Plain", "Plain@../old")
    assert [len(values) for row in (ours, theirs) for values in row.samples] == [40] * 2
    # The named file is the same in both; what it imports is not, and is source too.
    assert ours.source_hash != theirs.source_hash
    assert ours.key != theirs.key
    assert judge(ours, theirs).outcome.ratio > 1.5
    assert ours.gate["passed"]
    assert theirs.gate["passed"]
    assert ours.allocated_memory_mb > 0
    assert theirs.allocated_memory_mb > 0
    assert set(watch.folders) == {tmp_path / "new", tmp_path / "old"}
    # A side that waits takes nothing from the other.
    assert watch.other_s <= 0.1 * watch.own_s
    assert not children() - before


def test_a_side_that_dies_in_its_turn_costs_its_own_row(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS)
    before = children()
    config = config_of(tmp_path, rounds=1, benchmark_runs=60, fixed_runs=True)
    ((ours, theirs),) = run_against([f"{tmp_path}/mine.py:Dies"], f"{tmp_path}/mine.py:Plain", config)
    assert (ours.status, theirs.status) == ("crashed", "ok")
    assert "exit code 7" in ours.error["message"]
    assert "last words" in ours.error["log_tail"]
    assert len(theirs.samples[0]) == 60
    assert not children() - before


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("pack.mix:Plain", "not from the checkout"),
        ("mine.py:Plain", "no file 'mine.py'"),
        ("helped.py:Plain", "has a helper.py of its own"),
    ],
)
def test_a_checkout_that_would_run_other_code_is_refused(tmp_path, monkeypatch, target, words):
    """By what a process says that works in it, here this one: what it loads must be its own."""
    from longctx.engine.session import Session

    new, old = tmp_path / "new", tmp_path / "old"
    (new / "pack").mkdir(parents=True)
    old.mkdir()
    (new / "pack" / "__init__.py").touch()
    (new / "pack" / "mix.py").write_text(BLOCKS)
    (new / "mine.py").write_text(BLOCKS)
    for folder in (new, old):
        (folder / "helper.py").touch()
    (old / "helped.py").write_text(f"import sys\nsys.path.insert(0, {str(new)!r})\nimport helper\n{BLOCKS}")
    monkeypatch.setattr(sys, "path", [str(new), *sys.path])
    monkeypatch.chdir(old)
    answers = []
    session = Session(config_of(tmp_path).to_json() | {"threads": 1}, answers.append, beside=str(new))
    known = set(sys.modules)
    try:
        session.run({"job": "hello"})
        session.run({"job": "describe", "target": target, "options": {}})
    finally:
        for name in set(sys.modules) - known:
            if name.partition(".")[0] in ("pack", "helper"):
                del sys.modules[name]
    assert answers[-1]["event"] == "refused"
    assert words in answers[-1]["message"]


def test_ctrl_c_leaves_no_process(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS)
    call = [sys.executable, "-m", "longctx", "sweep", "--blocks", f"{tmp_path}/mine.py:Plain"]
    call += ["--against", f"{tmp_path}/mine.py:Plain:factor=1.08", "--sequence-lengths", "16", "32"]
    shape = "--d-model 32 --n-heads 2 --device cpu --threads 1 --benchmark-runs 300 --no-memory-profile"
    call += [*shape.split(), "--output-file", str(saved(tmp_path))]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    started = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and started.poll() is None:
            workers = psutil.Process(started.pid).children(recursive=True)
            if saved(tmp_path).exists() and len(workers) == 2:
                break
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGINT)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
        started.wait()
    assert started.returncode == 130, said
    assert len(workers) == 2
    assert all(not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE for worker in workers)
    rows = json.loads(saved(tmp_path).read_text())
    assert [row["block_name"] for row in rows[:2]] == ["Plain", "Plain:factor=1.08"]
    assert len(rows) % 2 == 0
    assert "--against" in said
    assert "--resume" in said
