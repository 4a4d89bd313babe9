"""What a sweep would do is told without doing it: nothing is run, written or locked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longctx.config import BenchmarkConfig
from longctx.engine import dry_run
from longctx.engine.dry_run import plan_sweep
from longctx.engine.peaks import Peaks
from longctx.engine.runner import run_sweep
from longctx.errors import UsageError

BLOCKS = """
from torch import nn

class Plain(nn.Module):
    causal = True
    def forward(self, x):
        raise AssertionError("a dry run runs nothing")

class Priced(Plain):
    def cost(self, cell, options):
        return {"flops": 1e6 * cell.length, "bytes": 0.0, "state_bytes": 0.0}

class Refusing(Plain):
    def cost(self, cell, options):
        # It is asked once, about one token, before the sweep is planned.
        if cell.length > 1:
            raise ValueError("no idea")
        return {"flops": 1.0, "bytes": 1.0, "state_bytes": 0.0}
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS)
    return lambda name: f"{tmp_path}/mine.py:{name}"


@pytest.fixture
def peaks(monkeypatch):
    known = Peaks(flops={"fp32": 1e9}, copy_bytes=1e9)
    monkeypatch.setattr(dry_run, "load_peaks", lambda key: known)
    return known


def config_of(folder: Path, **values) -> BenchmarkConfig:
    shared = {"d_model": 32, "n_heads": 2, "sequence_lengths": [16], "device": "cpu", "threads": 1, "rounds": 1}
    shared |= {"isolation": "none", "results_dir": str(folder / "out"), "output_file": "run.json"}
    return BenchmarkConfig(**(shared | values))


def test_cells_have_the_least_that_they_can_take(tmp_path, mine, peaks):
    plan = plan_sweep([mine("Priced"), mine("Plain"), "Identity"], config_of(tmp_path, sequence_lengths=[16, 32]))
    assert [(each.cell.block.name, each.cell.length, each.verdict) for each in plan.cells] == [
        (name, length, "run") for length in (16, 32) for name in ("Priced", "Plain", "Identity")
    ]
    priced, plain, identity = plan.cells[:3]
    assert priced.least_time_s == pytest.approx(16e6 / 1e9)
    assert (plain.flops, plain.least_time_s) == (None, None)
    assert identity.least_time_s == pytest.approx(max(identity.flops, identity.bytes) / 1e9)
    assert identity.least_memory_bytes == 4 * (12 * 32**2 + 2 * 16 * 32)
    assert not (tmp_path / "out").exists()


def test_without_peaks_no_time_is_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "load_peaks", lambda key: None)
    plan = plan_sweep(["Identity"], config_of(tmp_path))
    assert plan.peaks is None
    assert plan.cells[0].least_time_s is None
    assert plan.cells[0].flops > 0


def test_what_cannot_be_is_told_apart(tmp_path, mine, peaks):
    blocks = ["Dense", "Dense:causal=false", mine("Refusing")]
    config = config_of(tmp_path, sequence_lengths=[16, 1 << 30], batch_size=64)
    plan = plan_sweep(blocks, config, vary={"mode": ["forward", "decode"]})
    found = {(each.cell.mode, each.cell.block.name, each.cell.length): each for each in plan.cells}
    assert found["forward", "Dense", 16].verdict == "run"
    assert found["forward", "Dense", 1 << 30].verdict == "skipped"
    assert "GiB are there" in found["forward", "Dense", 1 << 30].reason
    assert found["decode", "Dense:causal=False", 16].verdict == "unsupported"
    assert "forward, train" in found["decode", "Dense:causal=False", 16].reason
    assert found["forward", "Refusing", 16].verdict == "failed"
    assert "no idea" in found["forward", "Refusing", 16].reason
    state = found["decode", "Dense", 16]
    assert state.state_bytes == 64 * 16 * 2 * 32 * 4
    assert state.least_memory_bytes == found["forward", "Dense", 16].least_memory_bytes + state.state_bytes


def test_rows_that_resume_would_keep_are_named(tmp_path):
    config = config_of(tmp_path, profile_memory=False, benchmark_runs=2, warmup_runs=1)
    run_sweep(["Identity"], config)
    before = (tmp_path / "out" / "run.json").read_text()
    more = config_of(tmp_path, profile_memory=False, sequence_lengths=[16, 24], resume=True)
    assert [each.verdict for each in plan_sweep(["Identity"], more).cells] == ["kept", "run"]
    fresh = config_of(tmp_path, profile_memory=False, sequence_lengths=[16, 24])
    assert [each.verdict for each in plan_sweep(["Identity"], fresh).cells] == ["run", "run"]
    assert (tmp_path / "out" / "run.json").read_text() == before


def test_layers_and_lightning_cost_what_their_blocks_do(tmp_path, peaks):
    train, both = (plan_sweep(["Identity"], config_of(tmp_path, mode="train", layers=n)).cells[0] for n in (1, 2))
    assert both.flops == 2 * train.flops
    assert both.least_memory_bytes > train.least_memory_bytes
    lightning = plan_sweep(["Identity"], config_of(tmp_path, lightning_mode=True)).cells[0]
    assert (lightning.verdict, lightning.flops) == ("run", train.flops)


def test_a_block_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="BLADE"):
        plan_sweep(["BLAED"], config_of(tmp_path))


def test_the_command_shows_it_or_prints_one_document(tmp_path, capsys, monkeypatch):
    from longctx.cli.main import build

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    words = [
        "sweep",
        "--dry-run",
        "--d-model",
        "32",
        "--n-heads",
        "2",
        "--sequence-lengths",
        "16",
        "1M",
    ]
    words += ["--blocks", "Dense", "--mode", "forward", "decode", "--isolation", "none", "--batch-size", "1", "4096"]
    with pytest.raises(SystemExit) as end:
        build()(words, prog_name="longctx")
    out = capsys.readouterr().out
    assert not end.value.code
    assert "least time" in out and "decode: one token" in out and "nothing was measured" in out
    assert "--batch-size 1 4096" in out and "--dry-run:" in out
    assert max(map(len, out.split("skipped:")[0].splitlines())) <= 80
    with pytest.raises(SystemExit) as end:
        build()([*words, "--json"], prog_name="longctx")
    document = json.loads(capsys.readouterr().out)
    assert not end.value.code
    assert len(document["cells"]) == 8
    first = document["cells"][0]
    assert (first["block_name"], first["sequence_length"]) == ("Dense", 16)
    assert (first["mode"], first["batch_size"]) == ("forward", 1)
    assert {"verdict", "flops", "least_time_s", "least_memory_bytes"} <= set(first)
    assert {cell["verdict"] for cell in document["cells"]} == {"run", "skipped"}
    assert list(tmp_path.iterdir()) == []
