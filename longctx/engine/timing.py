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
from time import perf_counter
from typing import Any, Protocol

import torch

from longctx.analysis.statistics import is_unstable, relative_half_width
from longctx.engine.clocks import SLOW_S, Calls, Clock, CpuClock, CudaClock
from longctx.engine.device import nvml_snapshot
from longctx.engine.machine import contention_sample

Emit = Callable[[dict[str, Any]], None]

MIN_SAMPLE_S = {"cpu": 10e-3, "cuda": 10e-6}
"""Shorter calls are put together into one sample: the clock reads to 0.1 us, events to 0.5 us. The calls of a CUDA
sample but the first find the L2 cache warm, so no more are put together than must be."""

MIN_WARM_CALLS = {"cpu": 3, "cuda": 10}
MIN_WARM_S = {"cpu": 0.5, "cuda": 0.3}
MAX_WARM_S = {"cpu": 2.0, "cuda": 3.0}
STEADY = {"cpu": 0.05, "cuda": 0.02}
WINDOW = 5
"""Warm-up ends when the medians of the last two windows of this many calls agree to within STEADY."""

SLOW_WARM_S = 2.0
"""A call of this length needs no warm-up of its own beyond the calls that were made already."""

MIN_CUDA_SAMPLES, LOADED_S, MOST_LOADED = 20, 0.1, 400
"""CUDA: at least so many samples, and as many as keep the chip under load for so long, though no more than the last.
Right behind a pause it multiplies matrices up to 6% faster than it goes on to, until its power limit holds it back."""
GOAL = 0.01
SLOW_BUDGET_S, VERY_SLOW_S = 10.0, 10.0

COOL_DOWN_S = (0.5, 1.0, 2.0)
"""Pauses for a GPU that is too hot; after the last one it is measured as it is, and marked."""

LONG_CALL_S = 20e-3
"""In a call of this length what happens at its beginning hardly counts."""

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
    calls = Calls(fn, inputs, before_sample)
    clock = CudaClock(device, calls, flush=flush) if device.type == "cuda" else CpuClock(calls)
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


def _warm_up(clock: Clock, plan: SamplingPlan, *, warmed: int, call_s: float | None) -> tuple[int, float]:
    """Call until times are steady. Returns (warm-up calls in all, seconds a call takes)."""
    kind, times, start = clock.kind, [], perf_counter()
    least = max(plan.warmup_runs, MIN_WARM_CALLS[kind])
    least_slow = max(plan.warmup_runs, 1)
    if call_s is not None and call_s >= SLOW_WARM_S and warmed >= least_slow:
        return warmed, call_s
    while True:
        slow = (times[-1] if times else call_s or 0.0) > 0.2
        # In batches as long as those of the samples: pauses would rest the chip.
        times += clock.take(count=1 if slow else max(WINDOW, clock.batch_size(times[-1] if times else 1.0)), calls=1)
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


def _sample(clock: Clock, plan: SamplingPlan, emit: Emit, *, call_s: float, calls_per_sample: int) -> list[float]:
    """Samples, seconds a call each: exactly `plan.runs`, or until the median is known to 1% or time is up."""
    least, most, budget = plan.runs, 10_000, plan.budget_s
    sample_s = call_s * calls_per_sample
    if plan.exact:
        most = least
    elif call_s > VERY_SLOW_S:
        least = most = min(least, 3)
    elif call_s > SLOW_S:
        least, most, budget = min(least, 5), max(10, least), SLOW_BUDGET_S
    elif clock.kind == "cuda":
        least = max(least, MIN_CUDA_SAMPLES, min(MOST_LOADED, math.ceil(LOADED_S / sample_s)))
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
    clock: Clock, orders: Iterator[Mapping[str, Any]], emit: Emit, *, call_s: float, most_calls: int | None
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
