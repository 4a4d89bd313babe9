"""Clocks that time calls: the monotonic one of a CPU, pairs of events on a CUDA stream.

Both also tell whether work goes on once a call is over. All times in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from time import perf_counter_ns, process_time
from typing import Any, Protocol

import torch

SLOW_S = 1.0
"""Of calls of this length fewer are taken."""

SHORT_CALL_S = 5e-3

OUTSTANDING = 400
BATCH_S = 0.25
"""A batch of CUDA samples is at most this many samples, and at most about this long, between synchronisations."""

FLUSH_BYTES = 256 << 20
ESCAPE_SHARE, ESCAPE_S = 0.2, 100e-6
CPU_ESCAPE_S, MAX_REST_S = 5e-3, 0.1


class Calls:
    """`fn()`, or `fn(x)` with x going round through `inputs`; before_sample runs before each sample."""

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Any], before_sample: Callable[[], None] | None) -> None:
        self.fn, self.inputs, self.before_sample = fn, list(inputs), before_sample
        self.turn = self.samples = 0

    def next(self) -> Any:
        """One call: what `fn` returned."""
        if not self.inputs:
            return self.fn()
        self.turn += 1
        return self.fn(self.inputs[self.turn % len(self.inputs)])

    def prepare(self) -> None:
        """What comes before a sample: the caller's part, and other values in the tensors that go round.

        A block that keeps what it once found for a tensor, or for what a tensor holds, would else be timed looking it
        up. One number of each changes its sign.
        """
        if self.before_sample is not None:
            self.before_sample()
        with torch.no_grad():
            for x in self.inputs:
                if isinstance(x, torch.Tensor) and x.numel():
                    x.view(-1)[self.samples % x.numel()].neg_()
        self.samples += 1


class Clock(Protocol):
    """Times what `Calls` calls, inside `with`. kind: cpu or cuda."""

    kind: str
    host_time_median: float | None
    """Seconds that the host takes to enqueue a call, None on a CPU; known once `escaped` has been asked."""

    def first_call(self) -> float:
        """Seconds of one call from its beginning until the device has finished."""

    def take(self, *, count: int, calls: int) -> list[float]:
        """`count` samples of `calls` calls in a row, each in seconds a call."""

    def batch_size(self, sample_s: float) -> int:
        """Samples of this length to ask for at once."""

    def escaped(self, call_s: float) -> str | None:
        """In words, that work goes on once a call of this length is over; None if none does."""


class CpuClock:
    """`perf_counter_ns` around the calls; outputs are freed after the clock has been read."""

    kind = "cpu"
    host_time_median = None

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __enter__(self) -> CpuClock:
        # Threads of the maths library may spin for a while after work that is known to be over.
        known = torch.ones(1 << 18)
        self.quiet_s = min(self._rest(known.sum, 0.0) for _ in range(3))
        return self

    def __exit__(self, *exception: Any) -> None:
        self.calls.inputs.clear()

    def first_call(self) -> float:
        return self.take(count=1, calls=1)[0]

    def take(self, *, count: int, calls: int) -> list[float]:
        samples = []
        for _ in range(count):
            self.calls.prepare()
            start = perf_counter_ns()
            for _ in range(calls):
                y = self.calls.next()
            end = perf_counter_ns()
            del y
            samples.append(max(end - start, 1) * 1e-9 / calls)
        return samples

    def batch_size(self, sample_s: float) -> int:
        return 1

    def escaped(self, call_s: float) -> str | None:
        """Is this process still at work when a call has returned?"""
        tries = 1 if call_s > SLOW_S else 3
        rest = min(self._rest(self.calls.next, call_s) for _ in range(tries)) - self.quiet_s
        if rest <= max(CPU_ESCAPE_S, ESCAPE_SHARE * min(call_s, MAX_REST_S)):
            return None
        return (
            f"the process went on working for {rest * 1e3:.3g} ms of processor time after a call of "
            f"{call_s * 1e3:.3g} ms had returned: part of the work runs in another thread and was not timed"
        )

    def _rest(self, function: Callable[[], Any], call_s: float) -> float:
        """Seconds of processor time that are used while this thread sleeps after a call."""
        self.calls.prepare()
        y = function()
        began = process_time()
        time.sleep(min(max(2 * call_s, 0.02), MAX_REST_S))
        used = process_time() - began
        del y
        return used


class CudaClock:
    """Event pairs on the stream that is current when timing starts."""

    kind = "cuda"

    def __init__(self, device: torch.device, calls: Calls, *, flush: bool) -> None:
        self.device, self.calls = device, calls
        self.host_times: list[float] = []
        self.guard = torch.cuda.device(device)
        self.flush = flush
        self.scratch: torch.Tensor | None = None

    def __enter__(self) -> CudaClock:
        self.guard.__enter__()
        self.stream = torch.cuda.current_stream(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.scratch = None
        self.calls.inputs.clear()
        self.guard.__exit__(*exception)

    @property
    def host_time_median(self) -> float | None:
        return statistics.median(self.host_times) if self.host_times else None

    def first_call(self) -> float:
        torch.cuda.synchronize(self.device)
        self.calls.prepare()
        torch.cuda.synchronize(self.device)
        start = perf_counter_ns()
        y = self.calls.next()
        torch.cuda.synchronize(self.device)
        end = perf_counter_ns()
        del y
        return (end - start) * 1e-9

    def take(self, *, count: int, calls: int) -> list[float]:
        if self.flush and self.scratch is None:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
            self.scratch = torch.empty(max(2 * cache, FLUSH_BYTES), dtype=torch.int8, device=self.device)
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        torch.cuda.synchronize(self.device)
        for start, end in pairs:
            self.calls.prepare()
            if self.scratch is not None:
                self.scratch.zero_()
            start.record(self.stream)
            for _ in range(calls):
                self.calls.next()
            end.record(self.stream)
        torch.cuda.synchronize(self.device)
        return [max(start.elapsed_time(end), 1e-6) * 1e-3 / calls for start, end in pairs]

    def batch_size(self, sample_s: float) -> int:
        return max(1, min(OUTSTANDING, int(BATCH_S / max(sample_s, 1e-6))))

    def escaped(self, call_s: float) -> str | None:
        """Few calls on an idle device: is the device still at work when the stream has finished?

        The host's time is read here too: beside a full queue it would be the device's. It is that of a second call,
        since the first one after a pause finds cold caches, as none in a row of calls does; beside a long call the
        host may have to wait for the device, and the cold caches hardly count.
        """
        rests = []
        for _ in range(1 if call_s > SLOW_S else 5):
            self.calls.prepare()
            torch.cuda.synchronize(self.device)
            if call_s <= SHORT_CALL_S and self.calls.before_sample is None:
                self.calls.next()
            began = perf_counter_ns()
            self.calls.next()
            self.host_times.append((perf_counter_ns() - began) * 1e-9)
            end = torch.cuda.Event()
            end.record(self.stream)
            end.synchronize()
            began = perf_counter_ns()
            torch.cuda.synchronize(self.device)
            rests.append((perf_counter_ns() - began) * 1e-9)
        rest = min(rests)
        if rest <= max(ESCAPE_S, ESCAPE_SHARE * call_s):
            return None
        return (
            f"the device went on working for {rest * 1e3:.3g} ms after the stream had finished a call of "
            f"{call_s * 1e3:.3g} ms: part of the work runs on another stream and was not timed"
        )
