"""Worker processes that find code of a test in the place of torch, and how they end.

A worker imports torch for its first job: what a block does to its process happens there too, without waiting for the
real one. The fixture `script` writes that code, `start` starts workers.
"""

from __future__ import annotations

import contextlib
import time

import psutil
import pytest

from longctx.config import BenchmarkConfig
from longctx.engine.process import Refused, WorkerLost, WorkerProcess

CONFIG = BenchmarkConfig(device="cpu", d_model=32, n_heads=2, threads=1).to_json()
HELLO = {"job": "hello"}
PATIENCE_S = 60.0

SPEAK = "from longctx.errors import LongctxError; raise LongctxError({})\n"
"""Ends the job with a message from inside: the worker lives on, and this is what it says."""


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether the process ends. One that nobody has reaped yet is gone too."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def said(worker: WorkerProcess, *, timeout: float = PATIENCE_S) -> str:
    """What the code in the place of torch says of itself."""
    with pytest.raises(Refused) as caught:
        worker.ask(HELLO, timeout=timeout)
    return caught.value.message


def lost(worker: WorkerProcess, *, timeout: float = PATIENCE_S) -> WorkerLost:
    with pytest.raises(WorkerLost) as caught:
        worker.ask(HELLO, timeout=timeout)
    assert gone(worker.pid)
    return caught.value
