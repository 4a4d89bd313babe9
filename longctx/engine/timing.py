"""How long one call takes: warm-up until it is steady, then samples until the median is known.

CPU: the monotonic clock around calls, samples of at least 10 ms. CUDA: a pair of events around each call on the
current stream, the L2 cache flushed before each, no synchronisation inside a batch, and a device-wide one behind it
that shows work which escaped the stream. All times in seconds; nothing is trimmed.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, perf_counter_ns, process_time
from typing import Any, Protocol

import torch

from longctx.analysis.statistics import is_unstable, relative_half_width
from longctx.engine.device import nvml_snapshot
from longctx.engine.machine import contention_sample

Emit = Callable[[dict[str, Any]], None]

MIN_SAMPLE_S = {"cpu": 10e-3, "cuda": 50e-6}
"""Shorter calls are put together into one sample: the clock reads to 0.1 us, events to 0.5 us."""

MIN_WARM_CALLS = {"cpu": 3, "cuda": 10}
MIN_WARM_S = {"cpu": 0.5, "cuda": 0.3}
MAX_WARM_S = {"cpu": 2.0, "cuda": 3.0}
STEADY = {"cpu": 0.05, "cuda": 0.02}
WINDOW = 5
"""Warm-up ends when the medians of the last two windows of this many calls agree to within STEADY."""

SLOW_WARM_S = 2.0
"""A call of this length needs no warm-up of its own beyond the calls that were made already."""

MIN_CUDA_SAMPLES = 20
GOAL = 0.01
SLOW_S, SLOW_BUDGET_S, VERY_SLOW_S = 1.0, 10.0, 10.0

COOL_DOWN_S = (0.5, 1.0, 2.0)
"""Pauses for a GPU that is too hot; after the last one it is measured as it is, and marked."""

SHORT_CALL_S = 5e-3
LONG_CALL_S = 20e-3
"""In a call of this length what happens at its beginning hardly counts."""

OUTSTANDING = 50
BATCH_S = 0.25
"""A batch of CUDA samples is at most this many samples, and at most about this long, between synchronisations."""

FLUSH_BYTES = 256 << 20
ESCAPE_SHARE, ESCAPE_S = 0.2, 100e-6
CPU_ESCAPE_S, MAX_REST_S = 5e-3, 0.1
LAUNCH_SHARE = 0.8


class SamplingPlan(Protocol):
    """What of `measure.Plan` sampling needs."""

    warmup_runs: int
    runs: int
    exact: bool
    budget_s: float


@dataclass(kw_only=True)
class Timing:
    """What was read. `samples` are seconds a call; with calls_per_sample > 1 each is a mean over so many calls."""

    samples: list[float]
    first_call_s: float | None = None
    host_time_median: float | None = None
    """CUDA: seconds that the host needs to enqueue a call. None on a CPU, where it is the time itself."""
    warmups: int = 0
    calls_per_sample: int = 1
    warnings: list[str] = field(default_factory=list)
    """Of unstable, launch_bound, contended, throttled."""
    device_sync_mismatch: str | None = None
    """In words, when work went on after the call had ended: then the samples are not the whole of it."""
    contention: dict[str, Any] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def time_call(
    fn: Callable[..., Any],
    *,
    device: torch.device,
    plan: SamplingPlan,
    emit: Emit | None = None,
    inputs: Sequence[Any] = (),
    before_sample: Callable[[], None] | None = None,
    most_calls: int | None = None,
    warmed: int = 0,
    call_s: float | None = None,
    first_call: bool = True,
    flush: bool = True,
    orders: Iterator[Mapping[str, Any]] | None = None,
) -> Timing:
    """Time `fn()`, or `fn(x)` with x going round through `inputs`.

    before_sample runs before each sample, outside of it. most_calls: of a sample, at most. warmed, call_s: calls that
    were made before, and how long the last took. first_call: time one call apart, before the warm-up. flush: write over
    the L2 cache before each CUDA sample. orders: take samples when these say so, in turns with another process. What
    `fn` raises passes through.
    """
    emit = emit or (lambda event: None)
    calls = _Calls(fn, inputs, before_sample)
    clock = _CudaClock(device, calls, flush=flush) if device.type == "cuda" else _CpuClock(calls)
    with clock, _no_garbage_collection():
        first = None
        if first_call:
            first, warmed = clock.first_call(), warmed + 1
            call_s = first if call_s is None else call_s
        emit({"event": "phase", "phase": "warmup"})
        # Before the warm-up: a pause behind it would have the first samples taken by a chip that has rested.
        gpu_before = _cooled(device)
        warmups, call_s = _warm_up(clock, plan, warmed=warmed, call_s=call_s)
        calls_per_sample = max(1, math.ceil(MIN_SAMPLE_S[clock.kind] / call_s))
        calls_per_sample = min(calls_per_sample, most_calls or calls_per_sample)
        emit({"event": "phase", "phase": "timing"})
        host_before = contention_sample()
        contention = None
        if orders is None:
            samples = _sample(clock, plan, emit, call_s=call_s, calls_per_sample=calls_per_sample)
            contention = host_before.until(
                contention_sample(), threads=torch.get_num_threads() if clock.kind == "cpu" else 1
            )
        else:
            # The neighbour whose turn it was would count as contention.
            samples, calls_per_sample = _sample_in_turns(clock, orders, emit, call_s=call_s, most_calls=most_calls)
        mismatch = clock.escaped(statistics.median(samples))
        timing = Timing(
            samples=samples,
            first_call_s=first,
            host_time_median=clock.host_time_median,
            warmups=warmups,
            calls_per_sample=calls_per_sample,
            device_sync_mismatch=mismatch,
            contention=contention,
        )
    gpu_after = nvml_snapshot(device)
    timing.warnings = _warnings(timing, clock.kind, [gpu_before, gpu_after])
    return timing


def _cooled(device: torch.device) -> dict[str, Any] | None:
    """The state of a GPU, after waiting a bounded while for one that slows itself down. None on a CPU."""
    snapshot = nvml_snapshot(device)
    for pause_s in COOL_DOWN_S:
        if not (snapshot and snapshot.get("throttled")):
            break
        cool_down(pause_s)
        snapshot = nvml_snapshot(device)
    return snapshot


def cool_down(seconds: float) -> None:
    """Leave the chip alone."""
    time.sleep(seconds)


def _warnings(timing: Timing, kind: str, gpu: list[dict[str, Any] | None]) -> list[str]:
    found = []
    if is_unstable([timing.samples]):
        found.append("unstable")
    if timing.host_time_median is not None and timing.host_time_median > LAUNCH_SHARE * timing.median:
        found.append("launch_bound")
    # A busy host does not slow a GPU whose queue is full.
    if timing.contention and timing.contention["contended"] and (kind == "cpu" or "launch_bound" in found):
        found.append("contended")
    if any(snapshot and snapshot.get("throttled") for snapshot in gpu):
        found.append("throttled")
    return found


# -- warm-up and sampling, the same for both clocks -----------------------------------------------------------------


def _warm_up(clock: _Clock, plan: SamplingPlan, *, warmed: int, call_s: float | None) -> tuple[int, float]:
    """Call until times are steady. Returns (warm-up calls in all, seconds a call takes)."""
    kind, times, start = clock.kind, [], perf_counter()
    least = max(plan.warmup_runs, MIN_WARM_CALLS[kind])
    least_slow = max(plan.warmup_runs, 1)
    if call_s is not None and call_s >= SLOW_WARM_S and warmed >= least_slow:
        return warmed, call_s
    while True:
        slow = (times[-1] if times else call_s or 0.0) > 0.2
        times += clock.take(count=1 if slow else WINDOW, calls=1)
        elapsed, done = perf_counter() - start, warmed + len(times)
        steady = elapsed >= MIN_WARM_S[kind] and done >= least and _is_steady(times, STEADY[kind])
        late = elapsed >= MAX_WARM_S[kind] and done >= least_slow
        if steady or late:
            return done, max(statistics.median(times[-WINDOW:]), 1e-9)


def _is_steady(times: list[float], limit: float) -> bool:
    if len(times) < 2 * WINDOW:
        return False
    before, last = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
    return abs(last - before) <= limit * before


def _sample(clock: _Clock, plan: SamplingPlan, emit: Emit, *, call_s: float, calls_per_sample: int) -> list[float]:
    """Samples, seconds a call each: exactly `plan.runs`, or until the median is known to 1% or time is up."""
    least, most, budget = plan.runs, 10_000, plan.budget_s
    if plan.exact:
        most = least
    elif call_s > VERY_SLOW_S:
        least = most = min(least, 3)
    elif call_s > SLOW_S:
        least, most, budget = min(least, 5), max(10, least), SLOW_BUDGET_S
    elif clock.kind == "cuda":
        least = max(least, MIN_CUDA_SAMPLES)
    sample_s = call_s * calls_per_sample
    batch = clock.batch_size(sample_s)
    samples: list[float] = []
    start, told = perf_counter(), 0.0
    while True:
        target = least if len(samples) < least else most
        samples += clock.take(count=min(batch, target - len(samples)), calls=calls_per_sample)
        now = perf_counter()
        finished = len(samples) >= most or (
            len(samples) >= least and (now - start >= budget or (relative_half_width(samples) or 1.0) <= GOAL)
        )
        # A line on a pipe for each of a thousand samples would itself be work on a small machine.
        if finished or now - told >= 0.1:
            told = now
            emit({"event": "sample", "seconds": samples[-1], "count": len(samples)})
        if finished:
            return samples


def _sample_in_turns(
    clock: _Clock, orders: Iterator[Mapping[str, Any]], emit: Emit, *, call_s: float, most_calls: int | None
) -> tuple[list[float], int]:
    """Samples as ordered, between which another process has its turns. Returns (samples, calls a sample).

    Emits {"event": "ready", "call_s", "most_calls"}, then for each order {"job": "take", "count", "calls"} an event
    {"event": "taken", "samples"}. Any other order ends it. A turn begins with a call that does not count: it finds the
    caches full of the other's data, and perhaps the other's threads not yet asleep.
    """
    samples: list[float] = []
    calls = 1
    emit({"event": "ready", "call_s": call_s, "most_calls": most_calls})
    for order in orders:
        if order["job"] != "take":
            break
        calls = order["calls"]
        if call_s <= LONG_CALL_S:
            clock.take(count=1, calls=1)
        taken = clock.take(count=order["count"], calls=calls)
        samples += taken
        emit({"event": "taken", "samples": taken})
    return samples, calls


class _Calls:
    """`fn` with its inputs in turn."""

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Any], before_sample: Callable[[], None] | None) -> None:
        self.fn, self.inputs, self.before_sample = fn, list(inputs), before_sample
        self.turn = self.samples = 0

    def next(self) -> Any:
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


class _Clock(Protocol):
    kind: str
    host_time_median: float | None

    def first_call(self) -> float: ...
    def take(self, *, count: int, calls: int) -> list[float]: ...
    def batch_size(self, sample_s: float) -> int: ...
    def escaped(self, call_s: float) -> str | None: ...


class _CpuClock:
    """`perf_counter_ns` around the calls; outputs are freed after the clock has been read."""

    kind = "cpu"
    host_time_median = None

    def __init__(self, calls: _Calls) -> None:
        self.calls = calls

    def __enter__(self) -> _CpuClock:
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


class _CudaClock:
    """Event pairs on the stream that is current when timing starts."""

    kind = "cuda"

    def __init__(self, device: torch.device, calls: _Calls, *, flush: bool) -> None:
        self.device, self.calls = device, calls
        self.host_times: list[float] = []
        self.guard = torch.cuda.device(device)
        self.flush = flush
        self.scratch: torch.Tensor | None = None

    def __enter__(self) -> _CudaClock:
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


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
