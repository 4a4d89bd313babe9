"""A worker process as the supervisor sees it: started, asked, listened to with a deadline, ended. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import longctx
from longctx.engine.machine import spread_over_cores
from longctx.errors import LongctxError

LOG_TAIL_BYTES = 4096
MAX_SELECT_S = 86400.0
STALL_S = 2.0
"""A process that is woken so much later than it asked for has been suspended, with all others or alone."""

MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc then gives freed pages back at once, so that the kernel's high-water mark means the call. It slows work."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_SPIN_VARIABLES = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
"""OpenMP threads that wait for each other spin for some microseconds, then sleep. By default they spin for a
millisecond: one other busy process then makes two threads on two cores up to fifteen times slower, not twice. Alone
both settings take the same time."""


class WorkerLost(Exception):
    """The worker ended, or did not answer in time. status: crashed, oom or timeout."""

    def __init__(self, status: str, kind: str, message: str, log_tail: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.log_tail = status, kind, message, log_tail


class Refused(Exception):
    """The worker cannot do a job for a reason that the user can mend."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        super().__init__(event["message"])
        self.message, self.hint, self.exit_code = event["message"], event["hint"], event["exit_code"]

    def as_error(self) -> LongctxError:
        return LongctxError(self.message, self.hint, self.exit_code)


OnEvent = Callable[[dict[str, Any]], None]


class Worker(Protocol):
    """Whoever does the jobs: a process, or this one."""

    def ask(
        self, job: Mapping[str, Any], *, timeout: float, on_event: OnEvent | None = None, until: str = "done"
    ) -> dict[str, Any]:
        """Do one job and return its last event. timeout: seconds. Raises Refused, or WorkerLost."""

    def close(self) -> None:
        """End it, and all that it started."""

    def log_tail(self) -> str:
        """The end of what it printed."""


class InProcess:
    """`--isolation none`: the jobs of a worker in this very process. No timeout, and a crash is ours."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from longctx.engine.session import Session

        self._events: list[dict[str, Any]] = []
        self._on_event: OnEvent | None = None
        self._stdout = sys.stdout
        self._session = Session(config, self._receive)

    def ask(
        self, job: Mapping[str, Any], *, timeout: float, on_event: OnEvent | None = None, until: str = "done"
    ) -> dict[str, Any]:
        """Do one job and return its "done" event. Raises Refused."""
        self._on_event, self._stdout = on_event, sys.stdout
        # What a block prints is no part of what we print.
        with contextlib.redirect_stdout(sys.stderr):
            self._session.run(job)
        event = self._events.pop()
        if event["event"] == "refused":
            raise Refused(event)
        return event

    def close(self) -> None:
        """Nothing to end."""

    def log_tail(self) -> str:
        return ""

    def _receive(self, event: dict[str, Any]) -> None:
        if event["event"] in ("done", "refused"):
            self._events.append(event)
        elif self._on_event is not None:
            with contextlib.redirect_stdout(self._stdout):
                self._on_event(event)


class WorkerProcess:
    """One `python -m longctx.engine.worker`, in a session of its own so that Ctrl-C reaches only the supervisor."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        threads: int,
        memory: bool = False,
        in_turns: bool = False,
        folder: str | None = None,
    ) -> None:
        """config: `BenchmarkConfig.to_json()`. memory: with the allocator settings of the memory worker. in_turns: it
        shares its processors with another worker. folder: a checkout to work in, and to find the user's code in.
        """
        self._oom_kills = _oom_kills()
        receive, send = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*python_module("longctx.engine.worker"), str(send), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                env=_environment(threads, memory=memory, in_turns=in_turns, elsewhere=folder is not None),
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            os.close(receive)
            raise
        finally:
            os.close(send)
        self._events = receive
        self._buffer = b""
        self._begun: Mapping[str, Any] | None = None
        self._log = b""
        self._ends = _watch(self._process.pid)
        self._drain = threading.Thread(target=self._read_log, daemon=True)
        self._drain.start()
        start = {"config": dict(config), "affinity": spread_over_cores(threads)}
        self._write(start | {"beside": os.getcwd() if folder is not None else None})

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self, job: Mapping[str, Any], *, timeout: float, on_event: OnEvent | None = None, until: str = "done"
    ) -> dict[str, Any]:
        """Do one job and return its "done" event; the events before it go to on_event.

        until: an event that is an answer too, after which the worker waits for an order.
        Blocks, without polling, for at most `timeout` seconds. Raises Refused, or WorkerLost after ending the worker.
        """
        if job != self._begun:
            self._write(job)
        self._begun = None
        deadline = time.monotonic() + timeout
        for event in self._read_events(deadline, timeout):
            if event["event"] in (until, "done"):
                return event
            if event["event"] == "refused":
                raise Refused(event)
            if on_event is not None:
                on_event(event)
        raise AssertionError("unreachable: the events end in done, refused or WorkerLost")

    def begin(self, job: Mapping[str, Any]) -> None:
        """Let the worker begin a job; `ask`, called with the same job, waits for its answer."""
        self._write(job)
        self._begun = job

    def close(self) -> None:
        """End the worker and all it started, whatever it is doing."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drain.join(timeout=2.0)
        if not self._drain.is_alive():
            self._process.stdout.close()
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
            if self._ends is not None:
                os.close(self._ends)

    def log_tail(self) -> str:
        """The end of what the worker and its block printed."""
        return self._log.decode("utf-8", "replace")

    def _write(self, message: Mapping[str, Any]) -> None:
        # A worker that is gone is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read_events(self, deadline: float, timeout: float) -> Iterator[dict[str, Any]]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            if self._ends is not None:
                # A process that the worker forked may hold the pipe open after it.
                selector.register(self._ends, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._buffer.partition(b"\n")
                if newline:
                    self._buffer = rest
                    yield json.loads(line)
                    continue
                left = deadline - time.monotonic()
                # What has arrived is read after the deadline too: it may have come while we were stopped (Ctrl-Z).
                ready = {key.fd for key, _ in selector.select(max(0.0, min(left, MAX_SELECT_S)))}
                if not ready:
                    late = time.monotonic() - deadline
                    if late < 0:
                        continue
                    if left > 0 and late > STALL_S:
                        # Woken long after the time asked for: the machine stood still, nobody knows from when on.
                        deadline = time.monotonic() + timeout
                        continue
                    self.close()
                    raise WorkerLost("timeout", "Timeout", f"no result within {timeout:g} s", self.log_tail())
                data = os.read(self._events, 1 << 16) if self._events in ready else b""
                if not data:
                    raise self._lost()
                self._buffer += data

    def _lost(self) -> WorkerLost:
        code = self._ended()
        self.close()
        if code is None:
            message = "the process closed its pipe to the supervisor, and was ended"
            return WorkerLost("crashed", "Pipe", message, self.log_tail())
        if code == -signal.SIGKILL:
            # The worker makes itself the kernel's first victim, so this is what running out of memory looks like.
            message = "killed by SIGKILL, as the kernel does when memory runs out"
            status = "oom" if _oom_kills() > self._oom_kills else "crashed"
            return WorkerLost(status, "SIGKILL", message if status == "oom" else "killed by SIGKILL", self.log_tail())
        if code < 0:
            name = signal.Signals(-code).name
            return WorkerLost("crashed", name, f"the process ended by {name}", self.log_tail())
        return WorkerLost("crashed", "Exit", f"the process ended with exit code {code}", self.log_tail())

    def _ended(self) -> int | None:
        """The exit status, or None of a worker that closed its pipe and lives on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5.0)
        return None

    def _read_log(self) -> None:
        """Keep the end of the output and throw the rest away: a block may print without end."""
        stream = self._process.stdout
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(stream.fileno(), LOG_TAIL_BYTES):
                self._log = (self._log + data)[-LOG_TAIL_BYTES:]


def python_module(name: str) -> list[str]:
    """The beginning of a command that runs a module of ours: unbuffered, and blind to the working directory.

    Otherwise a `statistics.py` or `inspect.py` that lies there would take the place of the standard library's.
    """
    return [sys.executable, "-P", "-u", "-m", name]


def child_environment(*, elsewhere: bool = False) -> dict[str, str]:
    """The user's environment, in which `python_module` finds this package also where it is not installed.

    elsewhere: for a process with another working directory, where a relative path of the user's leads elsewhere.
    """
    environment = dict(os.environ)
    package = Path(longctx.__file__).parent.parent
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not {"site-packages", "dist-packages"} & set(package.parts):
        # First, so that it is this one and no other that is found.
        environment["PYTHONPATH"] = os.pathsep.join([str(package), *paths])
    elif elsewhere:
        # Last, as installed packages must not come before what the user has put in front of them.
        environment["PYTHONPATH"] = os.pathsep.join([*paths, str(package)])
    return environment


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, or None where the system has none."""
    with contextlib.suppress(OSError, AttributeError):
        return os.pidfd_open(pid)
    return None


def _environment(threads: int, *, memory: bool, in_turns: bool, elsewhere: bool) -> dict[str, str]:
    environment = child_environment(elsewhere=elsewhere)
    environment = {name: value for name, value in environment.items() if name not in MALLOC_ENVIRONMENT}
    environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    # Threads that spin on after their turn would take the other side's processors: no matter of taste then.
    if in_turns or not environment.keys() & {"OMP_WAIT_POLICY", *_SPIN_VARIABLES}:
        environment |= _SPIN_VARIABLES
    return environment | MALLOC_ENVIRONMENT if memory else environment


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, on this host or in this container."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
