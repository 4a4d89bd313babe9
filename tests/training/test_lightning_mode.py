"""`sweep --lightning-mode`: a real Trainer in the worker, its step beside the bare one, and faults as rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import torch

import longctx
from longctx.config import LIGHTNING, BlockRequest, Cell
from longctx.engine.measure import Plan
from longctx.errors import UsageError
from longctx.reproduce import command_line
from longctx.training import BenchmarkConfig, cell, run_lightning_cell

USERS = """
import time
import torch
from torch import nn

class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no way back")

class Base(nn.Module):
    causal = True
    def __init__(self, d_model):
        super().__init__()
        self.inner = nn.Linear(d_model, d_model)
    def forward(self, x):
        return x + self.inner(x)

class NoWayBack(Base):
    def forward(self, x):
        return Doubles.apply(x) if x.requires_grad else 2 * x

class Hangs(Base):
    def forward(self, x):
        if x.requires_grad:
            time.sleep(600)
        return super().forward(x)

class Interrupted(Base):
    left = 2
    def forward(self, x):
        if x.requires_grad:
            Interrupted.left -= 1
            if not Interrupted.left:
                raise KeyboardInterrupt
        return super().forward(x)

class SeesAll(Base):
    def forward(self, x):
        return x + x.mean(1, keepdim=True)
"""


@pytest.fixture
def users(tmp_path):
    (tmp_path / "mine.py").write_text(USERS)
    return lambda name: f"{tmp_path}/mine.py:{name}"


@pytest.fixture
def lightning_config(config):
    more = {"lightning_mode": True, "sequence_lengths": [24, 40], "rounds": 2, "benchmark_runs": 4, "layers": 2}
    return dataclasses.replace(config, **more, output_file="lightning.json")


def a_cell(block="DPASSM:window_size=8", **values):
    shape = {"length": 24, "batch_size": 2, "d_model": 16, "n_heads": 2, "layers": 2, "mode": LIGHTNING}
    return Cell(block=BlockRequest.parse(block), **shape | values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cell_as_lightning_runs_it(dtype, config, global_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, events = global_state(), []
    plan = Plan(warmup_runs=2, runs=6, exact=True)
    found = run_lightning_cell(a_cell(dtype=dtype).to_json(), plan, config=config.to_json(), emit=events.append)
    assert found["status"] == "ok", found["error"]
    assert json.loads(json.dumps(found)) == found
    assert len(found["samples_round"]) == len(found["bare_samples_round"]) == 6
    said = found["lightning"]
    assert said["last_loss"] < said["first_loss"]
    assert (said["precision"], said["version"]) == (cell.PRECISIONS[dtype], cell.lightning.__version__)
    assert found["gate"]["passed"] and found["flops"] > 0 and found["path"]
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases == ["build", "gate", "build", "bare", "lightning", "memory", "bare"]
    assert global_state() == before
    assert list(tmp_path.iterdir()) == [], "a Trainer left files behind"


def test_a_loss_that_is_no_number_is_null(config, monkeypatch):
    real = cell.LongContextLM.loss
    monkeypatch.setattr(cell.LongContextLM, "loss", lambda self, batch: real(self, batch) * float("nan"))
    found = run_lightning_cell(a_cell(), Plan(runs=2, exact=True, gate=False), config=config.to_json())
    assert found["status"] == "ok"
    assert found["lightning"]["first_loss"] is found["lightning"]["last_loss"] is None


def test_both_loops_train_alike(config, monkeypatch):
    """The bare loop is no other training: the same losses from the same weights."""
    losses = []
    real = cell.LongContextLM.loss
    monkeypatch.setattr(cell.LongContextLM, "loss", lambda self, batch: _kept(losses, real(self, batch)))
    run_lightning_cell(a_cell(), Plan(warmup_runs=2, runs=4, exact=True, gate=False), config=config.to_json())
    bare, lightning = losses[:4], losses[4:11]
    assert lightning[:4] == bare


def _kept(values, loss):
    values.append(loss.item())
    return loss


def test_a_block_that_no_language_model_can_have_is_told(config):
    found = run_lightning_cell(a_cell("Dense:causal=false"), Plan(runs=2), config=config.to_json())
    assert found["status"] == "failed"
    assert "causal" in found["error"]["message"]
    assert found["samples_round"] == found["bare_samples_round"] == []


def test_ctrl_c_is_not_swallowed(config, users):
    """Lightning turns it into the end of the program."""
    plan = Plan(warmup_runs=0, runs=2, exact=True, gate=False, timing=False)
    with pytest.raises(KeyboardInterrupt):
        run_lightning_cell(a_cell(users("Interrupted"), layers=1), plan, config=config.to_json())


def test_a_sweep_and_its_resumption(lightning_config, tmp_path):
    events = []
    rows = longctx.benchmark(["Identity", "DPASSM:window_size=8"], lightning_config)
    assert [(row.block_name, row.mode, row.status) for row in rows] == [
        ("Identity", LIGHTNING, "ok"),
        ("DPASSM:window_size=8", LIGHTNING, "ok"),
    ] * 2, [row.error for row in rows]
    for row in rows:
        said = row.lightning
        assert [len(samples) for samples in row.samples] == [len(samples) for samples in said["bare_samples"]] == [4, 4]
        assert said["bare_step_s"] > 0 and -1 < said["overhead_share"] < 1
        assert row.gate["passed"] and row.flops > 0
        assert row.peak_memory_mb > 0 and row.allocated_memory_mb > 0, "no memory worker"
        assert row.config["lightning_mode"] and row.config["layers"] == 2
    path = tmp_path / "reports" / "lightning.json"
    schema = json.loads(Path(longctx.__file__).with_name("results.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(path.read_text()), schema)
    assert longctx.load(path) == rows
    from longctx.engine.runner import run_sweep
    from longctx.events import CellFinished

    resumed = dataclasses.replace(lightning_config, resume=True)
    again = run_sweep(["Identity", "DPASSM:window_size=8"], resumed, on_event=events.append)
    assert again == rows
    assert not [event for event in events if isinstance(event, CellFinished)]


def test_a_fault_costs_its_own_row(lightning_config, users):
    config = dataclasses.replace(lightning_config, sequence_lengths=[24], rounds=1, timeout=20.0)
    names = ["NoWayBack", "Hangs", "SeesAll", "Base"]
    rows = longctx.benchmark([users(name) for name in names], config)
    statuses = {row.block_name: row.status for row in rows}
    assert statuses == {"NoWayBack": "failed", "Hangs": "timeout", "SeesAll": "wrong", "Base": "ok"}
    assert "no way back" in rows[0].error["message"]


def test_samples_in_turns_are_refused(lightning_config):
    from longctx.engine.run_against import run_against

    with pytest.raises(UsageError, match="in turns"):
        run_against(["Dense"], "Identity", lightning_config)


def test_the_command_makes_it_again(lightning_config):
    words = command_line("sweep", lightning_config, ["Dense"], defaults=BenchmarkConfig()).split()
    assert "--lightning-mode" in words
    assert words[words.index("--layers") + 1] == "2"


def test_torch_is_left_as_it_was(config):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run_lightning_cell(a_cell("Identity"), Plan(runs=2, exact=True, gate=False), config=config.to_json())
    assert torch.equal(torch.rand(2), expected)
