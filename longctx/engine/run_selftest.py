"""The light half of `longctx test`: starts the processes that check, and tries a crash and a hang on the runner.

A check that takes its process down fails alone: the rest goes on in a new process. No torch is imported here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.config import BenchmarkConfig
from longctx.engine.process import MALLOC_ENVIRONMENT, child_environment, python_module
from longctx.errors import LongctxError

PART_TIMEOUT_S = 300.0
FAULT_TIMEOUT_S = {"cpu": 10.0, "cuda": 25.0}
"""A cell's timeout while the runner is tried: long enough for an honest cell on a slow machine."""

_FAULTY_BLOCKS = """\
import os, resource, signal, time
from torch import nn


class Crash(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)


class Hang(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        time.sleep(3600)
"""

Event = dict[str, Any]
"""`ready` (device, dtype), `part` (part), `check` (a selftest.Check as a dictionary)."""


def run_checks(parts: Sequence[str], *, device: str, dtype: str) -> Iterator[Event]:
    """Events of `python -m longctx.engine.selftest` over all parts, whatever becomes of its processes.

    parts: `block:NAME`, `timer`, `memory`. Raises LongctxError as the process tells it: a device that is not there.
    """
    left = list(parts)
    while left:
        # The allocator settings under which memory can be read slow everything else, so it has its own process.
        alone = left[:1] if left[0] == "memory" else [part for part in left if part != "memory"]
        current, reason = alone[0], None
        with _Process(alone, device=device, dtype=dtype) as process:
            for event in process.events():
                if event["event"] == "part":
                    current = event["part"]
                yield event
            reason = process.reason
        done = alone
        if reason is not None:
            yield _failure(current, reason)
            done = alone[: alone.index(current) + 1]
        left = [part for part in left if part not in done]


class _Process:
    """One `python -m longctx.engine.selftest`, its events, and in `reason` why it ended early, if it did."""

    def __init__(self, parts: Sequence[str], *, device: str, dtype: str) -> None:
        self.reason: str | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        reader, writer = os.pipe()
        command = python_module("longctx.engine.selftest")
        command += ["--device", device, "--dtype", dtype, "--pipe", str(writer), *parts]
        environment = child_environment()
        if list(parts) == ["memory"]:
            environment |= MALLOC_ENVIRONMENT
        try:
            self.child = subprocess.Popen(
                command,
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env=environment,
            )
        finally:
            os.close(writer)
        self.reader = reader

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.reader)
        self.log.close()

    def events(self) -> Iterator[Event]:
        """Events up to `done`. Afterwards `reason` is None, or what became of the process. Raises LongctxError."""
        for line in self._lines():
            event = json.loads(line)
            if event["event"] == "error":
                raise LongctxError(event["message"], event["hint"], event["exit_code"])
            if event["event"] == "done":
                return
            yield event
        if self.reason is None:
            code = self.child.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.reason = f"the process that checks ended with {cause}{self._last_words()}"

    def _lines(self) -> Iterator[bytes]:
        buffer = b""
        deadline = time.monotonic() + PART_TIMEOUT_S
        while True:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.reason = f"nothing was heard for {PART_TIMEOUT_S:.0f} s; the process was ended"
                return
            chunk = os.read(self.reader, 65536)
            if not chunk:
                return
            deadline = time.monotonic() + PART_TIMEOUT_S
            *lines, buffer = (buffer + chunk).split(b"\n")
            yield from lines

    def _last_words(self) -> str:
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - 4096))
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


def check_faults(*, device: str) -> Iterator[Event]:
    """Whether a sweep survives a cell that crashes and a cell that hangs, and goes on to an honest one."""
    from longctx.engine.runner import run_sweep

    yield {"event": "part", "part": "faults"}
    kind = "cuda" if device.startswith("cuda") else "cpu"
    wanted = {"Crash": "crashed", "Hang": "timeout", "Identity": "ok"}
    with tempfile.TemporaryDirectory(prefix="longctx-test-") as folder:
        path = Path(folder, "faulty_blocks.py")
        path.write_text(_FAULTY_BLOCKS, encoding="utf-8")
        config = BenchmarkConfig(
            d_model=64,
            n_heads=4,
            sequence_lengths=[64],
            device=device,
            dtype="fp32",
            rounds=1,
            warmup_runs=1,
            benchmark_runs=3,
            fixed_runs=True,
            timeout=FAULT_TIMEOUT_S[kind],
            profile_memory=False,
            save_results=False,
            results_dir=folder,
        )
        try:
            results = run_sweep([f"{path}:Crash", f"{path}:Hang", "Identity"], config)
        except LongctxError as error:
            yield _failure("faults", error.message)
            return
        found = {result.block_name: result.status for result in results}
        for name, status in wanted.items():
            label = {"Crash": "a crash is caught", "Hang": "a hang is caught", "Identity": "the sweep goes on"}[name]
            got = found.get(name, "no row")
            yield {
                "event": "check",
                "part": "faults",
                "name": label,
                "passed": got == status,
                "figure": None,
                "limit": None,
                "unit": "",
                "note": f"{name}: {got}" + (f", expected {status}" if got != status else ""),
            }


def _failure(part: str, reason: str) -> Event:
    empty = {"figure": None, "limit": None, "unit": ""}
    return {"event": "check", "part": part, "name": "runs", "passed": False, **empty, "note": reason}
