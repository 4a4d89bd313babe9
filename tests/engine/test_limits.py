"""Searches with real processes that die: every kind of end is an answer, and the machine's memory is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longctx.analysis.frontier import CPU_SHARE, frontiers
from longctx.config import BenchmarkConfig
from longctx.engine import run_limits as module
from longctx.engine.run_limits import limits_command, limits_defaults, run_limits
from longctx.errors import UsageError
from longctx.events import CellFinished, CellStarted, SweepFinished

BLOCKS = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn


class Plain(nn.Module):
    end = 1 << 40

    def forward(self, x):
        with open(Path(__file__).parent / "calls", "a") as file:
            file.write(f"{type(self).__name__} {x.shape[1]}\\n")
        if x.shape[1] > self.end:
            self.die(x)
        return x + 1


class Eats(Plain):
    def forward(self, x):
        return super().forward(x) + torch.ones(x.shape[1], 1024)[0, 0]


class Refuses(Plain):
    end = 1500

    def die(self, x):
        raise MemoryError("no more")


class Killed(Plain):
    end = 1500

    def die(self, x):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(Plain):
    end = 1500

    def die(self, x):
        time.sleep(3600)


class Renamed(nn.Module):
    def forward(self, x):
        return {"logits": x + 1}


class Peeks(nn.Module):
    causal = True

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


class Fails(Plain):
    end = 0

    def die(self, x):
        raise ValueError("what is this?")
"""


pytestmark = pytest.mark.usefixtures("own_locks")


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS)
    return lambda *names: [f"{tmp_path}/mine.py:{name}" for name in names]


def config_of(folder: Path, **values) -> BenchmarkConfig:
    shared = {
        "d_model": 8,
        "n_heads": 1,
        "device": "cpu",
        "threads": 1,
        "timeout": 60.0,
        "results_dir": str(folder / "out"),
        "output_file": "limits.json",
        "fixed_runs": False,
    }
    return BenchmarkConfig(**{**shared, **values})


def saved(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "limits.json").read_text())


def test_no_length_is_tried_that_would_need_more_than_is_free(mine, tmp_path, monkeypatch):
    free = 48 << 20
    monkeypatch.setattr(module, "available_memory_bytes", lambda: free)
    rows = run_limits(mine("Eats"), config_of(tmp_path), resolution=0.05)
    ran = [row for row in rows if row.ok]
    assert max(row.total_memory_mb for row in ran) * 2**20 <= 1.03 * CPU_SHARE * free
    assert {row.status for row in rows} == {"ok", "skipped"}
    (one,) = frontiers(rows)
    # 4 KiB a token in its own tensor, and three of 32 bytes a token.
    assert one.fits == pytest.approx(CPU_SHARE * free / 4192, rel=0.07)
    assert (one.limit, one.tried, one.finished) == ("memory", False, True)
    assert one.fails - one.fits <= 0.05 * one.fits
    assert "may be used" in one.said
    assert [record["sequence_length"] for record in saved(tmp_path)] == [row.sequence_length for row in rows]
    assert all(row.first_call_s > 0 and row.time_s is None for row in ran)


def test_whatever_ends_a_worker_is_an_answer_and_spares_the_others(mine, tmp_path):
    seen = []
    names = ("Killed", "Hangs", "Refuses", "Fails", "Plain")
    rows = run_limits(
        mine(*names), config_of(tmp_path, timeout=4.0), resolution=0.5, max_length=4096, on_event=seen.append
    )
    found = {one.name: one for one in frontiers(rows)}
    ends = {name: (found[name].fits, found[name].fails, found[name].limit) for name in names}
    assert ends["Killed"] == (1408, 2048, "crashed")
    assert ends["Hangs"] == (1408, 2048, "time")
    assert ends["Refuses"] == (1408, 2048, "memory")
    assert ends["Fails"] == (0, 1024, "failed")
    assert ends["Plain"] == (4096, None, "length")
    assert all(one.finished for one in found.values())
    assert found["Refuses"].said == "no more"
    kinds = [type(event) for event in seen]
    assert kinds.count(CellStarted) == kinds.count(CellFinished) == len(rows)
    assert isinstance(seen[-1], SweepFinished) and seen[-1].complete


def test_what_is_wrong_has_no_limit(mine, tmp_path):
    rows = run_limits(mine("Renamed", "Peeks", "Plain"), config_of(tmp_path), resolution=0.5, max_length=4096)
    found = {row.block_name: (row.sequence_length, row.status) for row in rows}
    assert found == {"Renamed": (1024, "failed"), "Peeks": (1024, "wrong"), "Plain": (4096, "ok")}
    by_name = {row.block_name: row for row in rows}
    assert "returned dict" in by_name["Renamed"].error["message"]
    assert "claims to be causal" in by_name["Peeks"].error["message"]
    assert [row.gate is not None for row in rows if row.block_name == "Plain"] == [True, False, False]


def test_a_search_goes_on_where_it_was_interrupted(mine, tmp_path):
    def stop(event):
        if isinstance(event, CellFinished) and event.cell.length == 2048:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_limits(mine("Plain"), config_of(tmp_path), max_length=8192, on_event=stop)
    assert [record["sequence_length"] for record in saved(tmp_path)] == [1024, 2048]
    calls = tmp_path / "calls"
    calls.unlink()
    rows = run_limits(mine("Plain"), config_of(tmp_path, resume=True), max_length=8192)
    assert [row.sequence_length for row in rows] == [1024, 2048, 4096, 8192]
    assert {int(line.split()[1]) for line in calls.read_text().splitlines()} == {4096, 8192}
    # A smaller wish is read off the same file.
    calls.unlink()
    (one,) = frontiers(run_limits(mine("Plain"), config_of(tmp_path, resume=True), max_length=4096))
    assert (one.fits, one.limit) == (4096, "length") and not calls.exists()


def test_each_setting_is_searched_by_itself_and_taken_up_again(mine, tmp_path):
    config = BenchmarkConfig(d_model=8, n_heads=2, threads=1, timeout=60, output_file=f"{tmp_path}/r.json", resume=True)
    how = {"max_length": 2048, "vary": {"mode": ["forward", "train"], "batch_size": [1, 2]}}
    rows = run_limits(["Identity"], config, **how)
    assert [(f.mode, f.row.batch_size, f.fits, f.limit) for f in frontiers(rows)] == [
        ("forward", 1, 2048, "length"),
        ("forward", 2, 2048, "length"),
        ("train", 1, 2048, "length"),
        ("train", 2, 2048, "length"),
    ]
    tried = []
    again = run_limits(["Identity"], config, **how, on_event=lambda event: tried.append(type(event)))
    assert CellStarted not in tried and len(again) == len(rows) == 8


def test_a_length_that_would_take_too_long_is_not_tried(monkeypatch):
    search = module._Search([], limits_defaults(), resolution=0.05, max_length=None, on_event=None, command="")
    cell = module.Cell(block=module.BlockRequest(target="Dense"), length=8192)
    search.identities = {cell.block: {"options": {}}}
    search.environment = {"gpu": None}
    for length, took in ((1024, 10.0), (2048, 40.0)):
        tried = module.dataclasses.replace(cell, length=length)
        search.rows[tried] = module.BenchmarkResult(block_name="Dense", sequence_length=length)
        search.took[tried] = took
    refused = search._why_not(cell)
    assert (refused["status"], refused["error"]["type"]) == ("skipped", "Time") and "640 s" in refused["error"][
        "message"
    ]
    assert search._why_not(module.dataclasses.replace(cell, length=3000)) is None


@pytest.mark.parametrize(
    ("values", "how"),
    [({}, {"resolution": 0.0}), ({}, {"resolution": 2.0}), ({}, {"max_length": 0}), ({"isolation": "none"}, {})],
)
def test_what_cannot_be_done_is_said_before_anything_runs(tmp_path, values, how):
    with pytest.raises(UsageError):
        run_limits(["Identity"], config_of(tmp_path, **values), **how)
    assert not (tmp_path / "out").exists()


def test_the_command_that_looks_for_the_same_again():
    config = BenchmarkConfig(mode="train", max_time=9.0, d_model=64, timeout=120.0, fixed_runs=False)
    assert limits_command(limits_defaults(), [], resolution=0.05, max_length=None) == "longctx limits"
    text = limits_command(config, ["BLADE"], resolution=0.1, max_length=1 << 20)
    assert text.split()[:4] == ["longctx", "limits", "--blocks", "BLADE"]
    for words in ("--mode train", "--d-model 64", "--max-time 9", "--resolution 0.1", "--max-length 1048576"):
        assert words in text
    assert "--timeout" not in text and "--rounds" not in text


@pytest.mark.cuda
def test_on_a_gpu_running_out_of_memory_is_an_answer(tmp_path):
    # Trained, for a forward pass needs little but input and output: more than fit is known before it is tried.
    config = config_of(tmp_path, device="cuda", mode="train", d_model=512, n_heads=8, batch_size=16)
    rows = run_limits(["Identity"], config, resolution=0.1)
    (one,) = frontiers(rows)
    total = rows[0].environment["gpu_memory_total_bytes"]
    assert (one.limit, one.tried, one.finished) == ("memory", True, True)
    assert 0.7 * total < one.needed_bytes <= total
    assert one.would_hold(total) == pytest.approx(one.fits, rel=0.1)
