"""The light half of `longctx test`: starts the processes that check, and tries faulty blocks on the runner.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.config import BenchmarkConfig
from longctx.engine.process import MALLOC_ENVIRONMENT, child_environment, python_module
from longctx.errors import LongctxError
from longctx.results import BenchmarkResult

PART_TIMEOUT_S = 300.0
FAULT_TIMEOUT_S = {"cpu": 10.0, "cuda": 25.0}
"""A cell's timeout while the runner is tried: long enough for an honest cell on a slow machine."""

FAULTY_BLOCKS = Path(__file__).with_name("faulty_blocks.py")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A block of faulty_blocks.py and what must become of it: a status, or a warning on an ok row."""

    name: str
    label: str
    status: str = "wrong"
    warning: str | None = None
    cuda_only: bool = False


FAULTS = (
    Fault(name="Crash", label="a crash is caught", status="crashed"),
    Fault(name="Hang", label="a hang is caught", status="timeout"),
    Fault(name="CachedByPointer", label="an output cached by address is found"),
    Fault(name="Stale", label="the output of an earlier call is found"),
    Fault(name="Dropping", label="dropout left on is found"),
    Fault(name="NotANumber", label="a NaN is found"),
    Fault(name="LooksAhead", label="a look into the future is found"),
    Fault(name="SideStream", label="work on another stream is found", status="impossible", cuda_only=True),
    Fault(name="Flat", label="time that does not grow is found", status="ok", warning="suspect"),
    Fault(name="SlowStart", label="a slow first call stays apart", status="ok"),
    Fault(name="Identity", label="the sweep goes on", status="ok"),
)

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
    """Whether a sweep survives what crashes or hangs, sees through what cheats, and goes on to an honest cell."""
    from longctx.engine.runner import run_sweep

    yield {"event": "part", "part": "faults"}
    kind = "cuda" if device.startswith("cuda") else "cpu"
    faults = [fault for fault in FAULTS if kind == "cuda" or not fault.cuda_only]
    common = {
        "d_model": 64,
        "n_heads": 4,
        "device": device,
        "dtype": "fp32",
        "rounds": 1,
        "warmup_runs": 1,
        "benchmark_runs": 3,
        "fixed_runs": True,
        "timeout": FAULT_TIMEOUT_S[kind],
        "profile_memory": False,
        "save_results": False,
    }
    # Whether time grows shows over lengths; for all others one will do.
    once = [fault for fault in faults if not fault.warning]
    found: dict[str, Any] = {}
    try:
        for chosen, lengths in ((once, [64]), ([f for f in faults if f.warning], [64, 512])):
            blocks = [f.name if f.name == "Identity" else f"{FAULTY_BLOCKS}:{f.name}" for f in chosen]
            config = BenchmarkConfig(sequence_lengths=lengths, **common)
            found |= {result.block_name: result for result in run_sweep(blocks, config)}
    except LongctxError as error:
        yield _failure("faults", error.message)
        return
    for fault in faults:
        reason = _why_missed(fault, found.get(fault.name))
        yield {
            "event": "check",
            "part": "faults",
            "name": fault.label,
            "passed": reason is None,
            "figure": None,
            "limit": None,
            "unit": "",
            "note": f"{fault.name}: " + (reason or " ".join(filter(None, (fault.status, fault.warning)))),
        }


def _why_missed(fault: Fault, result: BenchmarkResult | None) -> str | None:
    """What is not as it must be with the row of a faulty block, or None."""
    got = "no row" if result is None else result.status
    if result is None or got != fault.status:
        return f"{got}, expected {fault.status}"
    if fault.warning and fault.warning not in result.warnings:
        return f"no warning {fault.warning}"
    if fault.name == "SlowStart" and not (result.first_call_s >= 1.0 > 10 * result.time_s):
        return f"first call {result.first_call_s:.2f} s, then {result.time_s:.2f} s"
    return None


def _failure(part: str, reason: str) -> Event:
    empty = {"figure": None, "limit": None, "unit": ""}
    return {"event": "check", "part": part, "name": "runs", "passed": False, **empty, "note": reason}
