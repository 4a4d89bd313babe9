"""Sweeps with --against in real processes: each side runs its own code, in its own turns only, and none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_sweeps import children, paired_config, saved

from longctx.analysis.paired import judge
from longctx.engine import preparation
from longctx.engine.process import WorkerProcess
from longctx.engine.run_against import run_against

pytestmark = pytest.mark.usefixtures("own_locks")

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
    ((ours, theirs),) = run_against(
        ["pack.mix:Plain"], "../old", paired_config(tmp_path, profile_memory=True, **values)
    )
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
    config = paired_config(tmp_path, rounds=1, benchmark_runs=60, fixed_runs=True)
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
    session = Session(paired_config(tmp_path).to_json() | {"threads": 1}, answers.append, beside=str(new))
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
