"""What tests of sweeps share: short warm-ups, no process left behind, blocks and workers of the tests' own."""

from __future__ import annotations

import contextlib
import gc
import tempfile

import psutil
import pytest
from fake_torch import CONFIG
from tiny_sweeps import BLOCKS, children

from longctx.engine import timing
from longctx.engine.process import WorkerProcess


@pytest.fixture(scope="module")
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


@pytest.fixture
def own_locks(tmp_path, monkeypatch):
    """Locks of this test's own, here and in processes: other sweeps on this machine have nothing to do with it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def tidy(brief):
    """`brief`, and a process that a fault of ours leaves behind does not disturb the next test."""
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


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Puts code in the place of torch, for workers started after it. `folder` names the test's folder in it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> None:
        head = f"import os, resource, signal, subprocess, sys, time\nfolder = {str(tmp_path)!r}\n"
        # A crash on purpose needs no core file.
        head += "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        (tmp_path / "torch.py").write_text(head + code)

    return write


@pytest.fixture
def start():
    """Starts workers, and ends them with the test."""
    with contextlib.ExitStack() as stack:

        def start(*, threads: int = 1, memory: bool = False) -> WorkerProcess:
            worker = WorkerProcess(CONFIG, threads=threads, memory=memory)
            stack.callback(worker.close)
            return worker

        yield start
