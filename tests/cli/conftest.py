"""A program to call and a sweep that needs no torch: it tells the events of a sweep and returns made-up results."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from longctx.config import BenchmarkConfig, Cell, parse_blocks, variants
from longctx.events import (
    CellFinished,
    CellPhase,
    CellStarted,
    RoundStarted,
    SampleTaken,
    SweepFinished,
    SweepStarted,
)
from longctx.results import BenchmarkResult

SECONDS = {"Dense": 4e-6, "Identity": 1e-6, "BLADE": 2e-6}


def make_result(cell: Cell, *, status: str = "ok", rounds: int = 1, **fields) -> BenchmarkResult:
    """A row as a sweep would give it; every second is invented."""
    shared = {
        "block_name": cell.block.name,
        "sequence_length": cell.length,
        "batch_size": cell.batch_size,
        "dtype": cell.dtype,
        "mode": cell.mode,
        "status": status,
        "config": {"d_model": cell.d_model, "n_heads": cell.n_heads},
        "environment": {"cpu": "A processor", "torch": "2.13.0"},
    }
    if status != "ok":
        error = {"type": "Fault", "message": f"it was {status}", "log_tail": ""}
        return BenchmarkResult(**(shared | {"error": error} | fields))
    seconds = SECONDS.get(cell.block.name, 3e-6) * cell.length
    figures = {
        "forward_time_mean": seconds,
        "forward_time_median": seconds,
        "forward_time_ci95": [0.98 * seconds, 1.02 * seconds],
        "throughput_tokens_per_sec": cell.length / seconds,
        "peak_memory_mb": cell.length / 64,
        "samples": [[seconds] * 3 for _ in range(rounds)],
        "gate": {"error": 1.25e-7, "passed": True, "tolerance": 1e-5, "reason": None},
    }
    return BenchmarkResult(**(shared | figures | fields))


class FakeRunner:
    """Stands in for `longctx.engine.runner`. `status` decides what becomes of a cell; `stop_at` interrupts."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str] | None, BenchmarkConfig, str]] = []
        self.status: Callable[[Cell], str] = lambda cell: "ok"
        self.stop_at: int | None = None
        self.stop: BaseException = KeyboardInterrupt()
        self.raises: BaseException | None = None
        self.path: str | None = "reports/benchmark/run.json"
        self.vary = None

    def run_sweep(
        self, blocks, config, *, vary=None, on_event=lambda event: None, command=None
    ) -> list[BenchmarkResult]:
        self.calls.append((blocks, config, command))
        if self.raises:
            raise self.raises
        requests = parse_blocks(blocks or ["Dense", "Identity", "BLADE"])
        self.vary = vary
        cells = tuple(
            cell
            for each in variants(config, vary)
            for cell in each.cells(requests, dtype="fp32" if each.dtype == "auto" else each.dtype)
        )
        environment = {"cpu": "A processor", "torch": "2.13.0", "threads": 2}
        on_event(SweepStarted(cells=cells, rounds=1, environment=environment, path=self.path))
        on_event(RoundStarted(index=0, cells=cells))
        results = []
        for cell in cells:
            if self.stop_at == len(results):
                raise self.stop
            on_event(CellStarted(cell=cell, round=0))
            on_event(CellPhase(cell=cell, phase="timing"))
            on_event(SampleTaken(cell=cell, seconds=0.001, count=1))
            results.append(make_result(cell, status=self.status(cell)))
            on_event(CellFinished(cell=cell, round=0, result=results[-1]))
        on_event(SweepFinished(results=tuple(results), complete=True))
        return results


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    runner = FakeRunner()
    module = types.ModuleType("longctx.engine.runner")
    module.run_sweep = runner.run_sweep
    monkeypatch.setitem(sys.modules, "longctx.engine.runner", module)
    return runner


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Call the program in this process: `call("sweep", "--json").exit_code`, `.stdout`, `.stderr`."""
    from longctx.cli.main import build

    for name in ("COLUMNS", "FORCE_COLOR", "CI", "LONGCTX_DEBUG", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*words: str, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(build(), list(words), prog_name="longctx")

    return invoke


@pytest.fixture
def longctx(capfd, monkeypatch):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    from longctx.cli.main import build

    def run(*words, columns=120):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            build()(list(map(str, words)), prog_name="longctx")
        out, err = capfd.readouterr()
        return end.value.code, out, err

    return run
