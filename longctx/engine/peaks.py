"""The most that this machine was ever seen to do: matrix products and copies, measured and kept between runs.

A time below what these peaks allow cannot be true. Kept for each device, thread count and torch version in the user's
cache directory; of several measurements the best counts, since noise only ever slows. Light: torch is loaded by
`measure_peaks` alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.analysis.plausibility import least_time
from longctx.engine.machine import contention_sample
from longctx.errors import LongctxError
from longctx.results import write_atomically

if TYPE_CHECKING:
    import torch

MATMUL_SIZE = {"cuda": 8192, "cpu": 1536}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
WINDOW_S = {"cuda": 0.25, "cpu": 0.3}
"""Seconds that each peak is looked for."""

START_TIMEOUT_S = 180.0
_KEPT_KEYS = 64


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Rates per second. flops: of matrix products, by dtype. copy_bytes: read plus written. cache_bytes: of the last
    cache, whose contents need not come from memory. spread: (best - median) / best of the last measurement."""

    flops: Mapping[str, float]
    copy_bytes: float | None
    cache_bytes: float = 0.0
    spread: Mapping[str, float] | None = None
    contended: bool = False
    """Whether others used the processors while this was measured: then it may be far too low."""

    def joined(self, other: Peaks) -> Peaks:
        """The better of both for every rate."""
        names = {*self.flops, *other.flops}
        return Peaks(
            flops={name: max(self.flops.get(name, 0.0), other.flops.get(name, 0.0)) for name in sorted(names)},
            copy_bytes=max(self.copy_bytes or 0.0, other.copy_bytes or 0.0) or None,
            cache_bytes=max(self.cache_bytes, other.cache_bytes),
            spread={**(self.spread or {}), **(other.spread or {})},
            contended=other.contended,
        )

    def bound_s(self, *, flops: float | None, bytes: float | None, dtype: str) -> float:
        """Seconds that work of so many FLOPs and bytes takes at least, 0 where nothing is known of it.

        Bytes that fit into the last cache may never have to leave it, and do not count.
        """
        moved = None if bytes is None else max(0.0, bytes - self.cache_bytes)
        return least_time(flops=flops, bytes=moved, peak_flops=self.flops.get(dtype), peak_bytes=self.copy_bytes)


# -- kept between runs ----------------------------------------------------------------------------------------------


def peaks_key(environment: Mapping[str, Any]) -> str:
    """What peaks belong to: device, torch, and on a CPU the threads."""
    gpu = environment.get("gpu")
    device = gpu or f"{environment.get('cpu')}, {environment.get('threads')} threads"
    return f"{device}, torch {environment.get('torch')}"


def load_peaks(key: str) -> Peaks | None:
    """What is kept under `key`, or None."""
    found = _read().get(key)
    try:
        flops = {str(name): float(value) for name, value in found["flops"].items()}
        copy = found["copy_bytes"]
        return Peaks(flops=flops, copy_bytes=copy and float(copy), cache_bytes=float(found["cache_bytes"]))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def keep_peaks(key: str, peaks: Peaks) -> Peaks:
    """Keep the better of `peaks` and what is kept, and return it. A cache that cannot be written is done without."""
    kept = load_peaks(key)
    best = kept.joined(peaks) if kept else peaks
    documents = _read()
    documents.pop(key, None)
    documents[key] = asdict(replace(best, spread=None, contended=False, flops=dict(best.flops)))
    text = json.dumps(dict(list(documents.items())[-_KEPT_KEYS:]), indent=1)
    # No home is a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        write_atomically(cache_path(), text + "\n")
    return best


def cache_path() -> Path:
    """The file of peaks, under XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache", "longctx", "peaks.json")


def _read() -> dict[str, Any]:
    try:
        found = json.loads(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def measure_in_worker(device: str, dtypes: tuple[str, ...] = ()) -> tuple[dict[str, Any], Peaks]:
    """(the environment, all peaks of a device), measured in a process like those of a sweep, and kept.

    dtypes: all that a GPU multiplies fast, fp32 and fp64 on a CPU, if none. Raises LongctxError for a missing device.
    """
    from longctx.config import BenchmarkConfig
    from longctx.engine.machine import default_threads, describe_host
    from longctx.engine.process import Refused, WorkerLost, WorkerProcess

    threads = default_threads()
    config = BenchmarkConfig(device=device).to_json() | {"threads": threads}
    worker = WorkerProcess(config, threads=threads)
    try:
        hello = worker.ask({"job": "hello"}, timeout=START_TIMEOUT_S)
        environment = describe_host() | hello["environment"] | {"threads": threads}
        dtypes = dtypes or (("bf16", "fp16", "fp32", "fp64") if environment["gpu"] else ("fp32", "fp64"))
        peaks = Peaks(flops={}, copy_bytes=None)
        for dtype in dtypes:
            found = worker.ask({"job": "peaks", "dtype": dtype}, timeout=START_TIMEOUT_S)["peaks"]
            peaks = peaks.joined(Peaks(**found))
    except Refused as refused:
        raise refused.as_error() from None
    except WorkerLost as lost:
        raise LongctxError(
            f"the peaks of {device} could not be measured: {lost.message}", lost.log_tail or None
        ) from None
    finally:
        worker.close()
    keep_peaks(peaks_key(environment), peaks)
    return environment, peaks


# -- measuring ------------------------------------------------------------------------------------------------------


def measure_peaks(device: torch.device, dtypes: tuple[str, ...]) -> Peaks:
    """The best matrix product of each dtype, and the best copy, of some tenths of a second each. Imports torch.

    On random data: a GPU multiplies zeros faster than it could ever multiply numbers.
    """
    import torch

    from longctx.engine.device import DTYPES

    kind, flops, spread = device.type, {}, {}
    before = contention_sample()
    generator = torch.Generator(device).manual_seed(0)
    for name in dtypes:
        if kind == "cpu" and name in ("bf16", "fp16"):
            # Half precision on a CPU goes many ways, some of them seconds long: no peak, and so no bound.
            flops[name] = 0.0
            continue
        size = MATMUL_SIZE[kind] // (2 if name == "fp64" else 1)
        a, b = (torch.randn(size, size, generator=generator, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        times = _times(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        flops[name], spread[name] = 2.0 * size**3 / times[0], 1 - times[0] / times[len(times) // 2]
        del a, b, out
    count = COPY_BYTES[kind]
    if kind == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(count // 4, device=device)
    target = torch.zeros_like(source)
    times = _times(lambda: target.copy_(source), device)
    spread["copy"] = 1 - times[0] / times[len(times) // 2]
    return Peaks(
        flops=flops,
        copy_bytes=2.0 * source.numel() * 4 / times[0],
        cache_bytes=float(_last_cache_bytes(device)),
        spread=spread,
        contended=kind == "cpu"
        and bool(before.until(contention_sample(), threads=torch.get_num_threads())["contended"]),
    )


def _times(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of a call, shortest first: on a GPU each a mean over some, which rides out the clock's steps."""
    import torch

    call()
    times: list[float] = []
    end = time.perf_counter() + WINDOW_S[device.type]
    while len(times) < 5 or time.perf_counter() < end:
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(5):
                call()
            events[1].record()
            events[1].synchronize()
            times.append(events[0].elapsed_time(events[1]) * 1e-3 / 5)
        else:
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) * 1e-9)
    return sorted(times)


def _last_cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a GPU, or of the largest cache of a CPU."""
    import torch

    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1:] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)
