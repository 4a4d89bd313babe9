"""Sweeps with --against: two sides in turns, each a row of its own, whatever becomes of the other.

Stand-ins for the processes answer at once.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable

import pytest
from tiny_sweeps import paired_config, saved

import longctx
from longctx.analysis.paired import judge
from longctx.config import BlockRequest
from longctx.engine import preparation, turns
from longctx.engine.process import WorkerLost
from longctx.engine.run_against import opponent, run_against
from longctx.errors import LongctxError, UsageError
from longctx.events import CellFinished, CellStarted, Notice, SweepFinished, SweepStarted


def names_of(pairs) -> list[tuple[str, str]]:
    return [(ours.block_name, theirs.block_name) for ours, theirs in pairs]


pytestmark = pytest.mark.usefixtures("own_locks")

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
        run_against(blocks, other.replace("{folder}", str(tmp_path)), paired_config(tmp_path, **values))
    assert caught.value.exit_code == 2
    assert not saved(tmp_path).exists()


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
    config = paired_config(tmp_path, sequence_lengths=[32, 16])
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
    run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=3))
    by_round = [list(group) for ends, group in itertools.groupby(stage.jobs, lambda job: job[2] == "end") if not ends]
    assert len(by_round) == 3
    processes = [{number for number, _, _ in jobs} for jobs in by_round]
    assert [len(numbers) for numbers in processes] == [2, 2, 2]
    assert len(set().union(*processes)) == 6
    for jobs in by_round:
        takers = [target for _, target, kind in jobs if kind == "take"]
        assert takers == [*takers[:2], *takers[1::-1]] * (len(takers) // 4)


def test_several_blocks_have_the_opponent_beside_each(stage, tmp_path):
    pairs = run_against(["BLADE", "DPASSM"], "Dense", paired_config(tmp_path, rounds=1))
    assert names_of(pairs) == [("BLADE", "Dense (beside BLADE)"), ("DPASSM", "Dense (beside DPASSM)")]
    assert len({row.key for pair in pairs for row in pair}) == 4


def test_all_blocks_are_compared_with_another_but_not_with_itself(stage, tmp_path):
    pairs = run_against(None, "Dense", paired_config(tmp_path, rounds=1))
    assert [ours.block_name for ours, _ in pairs] == [name for name in longctx.blocks.names() if name != "Dense"]


def test_a_block_against_itself_has_two_names_and_two_rows(stage, tmp_path):
    pairs = run_against(["a.py:Block"], "a.py:Block", paired_config(tmp_path))
    assert names_of(pairs) == [("Block", "Block (again)")]
    assert pairs[0][0].key != pairs[0][1].key
    assert judge(*pairs[0]).outcome.verdict == "same"
    pairs = run_against(["a.py:Block"], "b.py:Block", paired_config(tmp_path, force=True))
    assert names_of(pairs) == [("Block", "b.py:Block")]


def test_a_checkout_has_processes_of_its_own_in_its_folder(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    blocks = ["some.module:Block:size=3", str(tmp_path / "mine.py:Other")]
    pairs = run_against(blocks, "old", paired_config(tmp_path, rounds=2, sequence_lengths=[16]))
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
    ((ours, theirs),) = run_against(["BLADE"], "Dense", paired_config(tmp_path))
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
    pairs = run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=1, sequence_lengths=[16, 32]))
    assert [(ours.status, theirs.status) for ours, theirs in pairs] == [("oom", "ok"), ("skipped", "ok")]


def test_a_pair_that_is_inconclusive_gets_more_rounds_once(stage, tmp_path):
    ratios = [1.08, 1.07, 0.99, 1.09, 1.08, 1.07, 1.08, 1.08, 1.08]
    stage.seconds["BLADE"] = lambda index: 0.01 * ratios[index]
    events = []
    ((ours, theirs),) = run_against(["BLADE"], "Dense", paired_config(tmp_path))
    assert len(ours.samples) == 5
    assert judge(ours, theirs).outcome.verdict == "inconclusive"
    stage.numbers = itertools.count(1)
    config = paired_config(tmp_path, force=True)
    ((ours, theirs),) = run_against(["BLADE"], "Dense", config, on_event=events.append, settle=True)
    assert (len(ours.samples), len(theirs.samples)) == (9, 9)
    assert judge(ours, theirs).outcome.verdict == "slower"
    assert [event.text for event in events if isinstance(event, Notice)] == ["1 pair is inconclusive: 4 more rounds"]
    # Once: nine rounds that tell nothing are not followed by others.
    before = len(stage.jobs)
    run_against(["BLADE"], "Dense", paired_config(tmp_path, resume=True), settle=True)
    assert len(stage.jobs) == before


def test_resume_measures_what_a_pair_lacks(stage, tmp_path):
    run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=2))
    before = len(stage.jobs)
    pairs = run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=2, resume=True))
    assert len(stage.jobs) == before
    assert [len(row.samples) for row in pairs[0]] == [2, 2]
    pairs = run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=3, sequence_lengths=[16, 32], resume=True))
    assert [[len(row.samples) for row in pair] for pair in pairs] == [[3, 3], [3, 3]]
    assert len(longctx.load(saved(tmp_path))) == 4
    # Samples taken beside another opponent, or beside none, are not of this pair.
    run_against(["BLADE"], "Identity", paired_config(tmp_path, rounds=1, resume=True))
    assert len(longctx.load(saved(tmp_path))) == 6


def test_resume_begins_a_pair_anew_of_which_one_side_is_missing(stage, tmp_path):
    run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=2))
    records = json.loads(saved(tmp_path).read_text())
    saved(tmp_path).write_text(json.dumps(records[:1]))
    pairs = run_against(["BLADE"], "Dense", paired_config(tmp_path, rounds=2, resume=True))
    assert [len(row.samples) for row in pairs[0]] == [2, 2]
    assert Counter(target for _, target, kind in stage.jobs if kind == "measure") == {"BLADE": 4, "Dense": 4}


def test_a_failed_side_is_tried_again_only_when_asked(stage, tmp_path):
    stage.faults["BLADE", "take"] = WorkerLost("crashed", "Exit", "gone", "")
    run_against(["BLADE"], "Dense", paired_config(tmp_path))
    stage.faults.clear()
    before = len(stage.jobs)
    ((ours, _),) = run_against(["BLADE"], "Dense", paired_config(tmp_path, resume=True))
    assert (ours.status, len(stage.jobs)) == ("crashed", before)
    ((ours, theirs),) = run_against(["BLADE"], "Dense", paired_config(tmp_path, resume=True, retry=True))
    assert (ours.status, len(ours.samples), len(theirs.samples)) == ("ok", 5, 5)


def test_an_interrupt_keeps_whole_pairs_and_no_process(stage, tmp_path):
    def stop(event):
        if isinstance(event, CellStarted) and event.cell.length == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_against(["BLADE"], "Dense", paired_config(tmp_path, sequence_lengths=[16, 32]), on_event=stop)
    assert [row.sequence_length for row in longctx.load(saved(tmp_path))] == [16, 16]
    assert stage.open == set()


def test_the_time_for_the_whole_ends_it_early(stage, tmp_path):
    events = []
    config = paired_config(tmp_path, max_time=1e-6)
    assert run_against(["BLADE"], "Dense", config, on_event=events.append) == []
    assert not events[-1].complete
