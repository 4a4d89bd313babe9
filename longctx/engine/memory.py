"""How much memory one call takes: the highest level during it, above the level just before it.

CUDA: torch's own count of the bytes that tensors asked for. CPU: the kernel's high-water mark of resident pages, in a
process whose allocator gives freed pages back at once (`process.MALLOC_ENVIRONMENT`); pages that are never touched do
not count. Bytes throughout. Nothing else may be timed meanwhile.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from longctx.engine.process import MALLOC_ENVIRONMENT

MAX_READINGS = 4
CPU_AGREEMENT_BYTES = 1 << 20
CPU_AGREEMENT = 0.01
SLOW_S = 5.0
GROWING_CALLS = 12
"""Calls that must each leave memory behind: a block may keep the last few results, or fill some buffers."""


@dataclass(frozen=True, kw_only=True)
class Resting:
    """What a GPU's memory held before a block was built, in bytes. graph_bytes: free room in pools of CUDA graphs."""

    tensor_bytes: int = 0
    graph_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Bytes, each None where this system does not tell; `reason` then says why."""

    peak_bytes: int | None = None
    allocated_bytes: int | None = None
    """Live after the call: weights, buffers, input and output. On a CPU counted from the tensors themselves."""
    reserved_bytes: int | None = None
    total_bytes: int | None = None
    """Highest level during the call of all that is the block's: weights, gradients, input and output included."""
    first_call_s: float | None = None
    """Seconds of the first of the calls that this took."""
    grows: bool = False
    """Whether each of several calls left memory behind."""
    reason: str | None = None


def measure_memory(
    call: Callable[[], Any],
    *,
    device: torch.device,
    module: nn.Module,
    inputs: Iterable[Any],
    floor: Resting | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> MemoryReading:
    """Memory of `call()`, which returns what it computed.

    inputs: tensors that live through the call. floor: `resting` before the module and its inputs were made. prepare:
    run before each call, so that nothing is left of the one before. A slow call is read fewer times.
    """
    if device.type == "cuda":
        return _measure_cuda(call, prepare, device=device, floor=floor or Resting())
    return _measure_cpu(call, prepare, module=module, inputs=inputs)


def resting(device: torch.device) -> Resting:
    """What a GPU's memory holds now; nothing on a CPU. Workspaces of cuBLAS are made first if they are missing.

    They stay for the life of the process, so they belong to the floor and not to the block that came first. Autograd
    runs backward in a thread of its own, whose workspace is another.
    """
    if device.type != "cuda":
        return Resting()
    with torch.inference_mode(False), torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
            (torch.addmm(a[0], a, a) + torch.mm(a, a)).sum().backward()
            del a
    gc.collect()
    torch.cuda.synchronize(device)
    return Resting(tensor_bytes=requested_bytes(device, "current"), graph_bytes=_graph_pool_bytes(device))


# -- CUDA ----------------------------------------------------------------------------------------------------------


def _measure_cuda(
    call: Callable[[], Any], prepare: Callable[[], None], *, device: torch.device, floor: Resting
) -> MemoryReading:
    readings: list[MemoryReading] = []
    levels: list[int] = []
    with torch.cuda.device(device):
        # The first calls of a process make workspaces that stay: they are not this block's.
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        _drop(call())
        torch.cuda.synchronize(device)
        first_call_s = time.perf_counter() - start
        while len(readings) < MAX_READINGS:
            prepare()
            gc.collect()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = requested_bytes(device, "current")
            levels.append(before)
            torch.cuda.reset_peak_memory_stats(device)
            y = call()
            torch.cuda.synchronize(device)
            peak = requested_bytes(device, "peak") - before
            held = before - floor.tensor_bytes
            reserved = torch.cuda.max_memory_reserved(device)
            # What captured graphs hold serves no one else, but no allocation shows it when they are replayed.
            graphs = max(0, _graph_pool_bytes(device) - floor.graph_bytes)
            allocated = requested_bytes(device, "current") - floor.tensor_bytes
            del y
            reading = MemoryReading(
                peak_bytes=peak + graphs,
                allocated_bytes=allocated + graphs,
                reserved_bytes=reserved,
                total_bytes=held + peak + graphs,
                first_call_s=first_call_s,
            )
            readings.append(reading)
            if len(readings) > 1 and readings[-2].peak_bytes == reading.peak_bytes:
                break

        def level() -> int:
            prepare()
            gc.collect()
            return requested_bytes(device, "current")

        grows = _grows(call, level, levels, 1 << 16)
    last = max(readings[-2:], key=lambda reading: reading.peak_bytes or 0)
    return dataclasses.replace(last, grows=grows)


def _grows(call: Callable[[], Any], level: Callable[[], int], levels: list[int], least: int) -> bool:
    """Whether every call leaves more than `least` behind: those between the levels, and then as many as fill a cache.

    level: what there is now, with nothing left of the call before but what it left behind.
    """
    levels = [*levels, level()]
    while all(after - before > least for before, after in pairwise(levels)):
        if len(levels) > GROWING_CALLS:
            return True
        _drop(call())
        levels.append(level())
    return False


def requested_bytes(device: torch.device, moment: str) -> int:
    """Bytes that tensors asked for. The allocator's own sizes depend on which free block it happened to have."""
    stats = torch.cuda.memory_stats(device)
    requested = stats.get(f"requested_bytes.all.{moment}", 0)
    # Other allocators than torch's native one keep no such count.
    return int(requested or stats.get(f"allocated_bytes.all.{moment}", 0))


def _graph_pool_bytes(device: torch.device) -> int:
    held = 0
    for segment in torch.cuda.memory_snapshot():
        if segment.get("device") == device.index and tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            held += segment["total_size"] - segment["allocated_size"]
    return held


# -- CPU -----------------------------------------------------------------------------------------------------------


def _measure_cpu(
    call: Callable[[], Any], prepare: Callable[[], None], *, module: nn.Module, inputs: Iterable[Any]
) -> MemoryReading:
    inputs = list(inputs)
    start = time.perf_counter()
    y = call()
    first_call_s = time.perf_counter() - start
    leaves = [*module.parameters(), *(x for x in inputs if isinstance(x, Tensor) and x.is_leaf)]
    held = [*module.parameters(), *module.buffers(), *inputs]
    allocated = tensor_bytes([*held, *(leaf.grad for leaf in leaves), y])
    del y
    prepare()
    held_bytes = tensor_bytes([*held, *(leaf.grad for leaf in leaves)])
    del held
    reason = why_no_cpu_peak()
    if reason:
        return MemoryReading(allocated_bytes=allocated, first_call_s=first_call_s, reason=reason)
    peaks: list[int] = []
    levels: list[int] = []
    while len(peaks) < (1 if first_call_s > SLOW_S else MAX_READINGS):
        prepare()
        level, peak = _cpu_reading(call)
        levels.append(level)
        peaks.append(peak)
        if len(peaks) > 1:
            last, high = peaks[-2:], max(peaks[-2:])
            if high - min(last) <= max(CPU_AGREEMENT_BYTES, CPU_AGREEMENT * high):
                break
    peak = max(peaks[-2:])

    def level_now() -> int:
        prepare()
        return cpu_level_bytes()

    return MemoryReading(
        peak_bytes=peak,
        allocated_bytes=allocated,
        total_bytes=held_bytes + peak,
        first_call_s=first_call_s,
        # A slow call is not made again to find out.
        grows=len(peaks) > 1 and _grows(call, level_now, levels, CPU_AGREEMENT_BYTES // 2),
    )


def cpu_peak_bytes(call: Callable[[], Any]) -> int:
    """Resident bytes at the highest moment of `call()`, above the level just before it. Linux, in a memory worker."""
    return _cpu_reading(call)[1]


def _cpu_reading(call: Callable[[], Any]) -> tuple[int, int]:
    """(level before, peak above it)"""
    level = cpu_level_bytes()
    y = call()
    peak = cpu_peak_above(level)
    _drop(y)
    return level, peak


def cpu_level_bytes() -> int:
    """Resident bytes now, from which on `cpu_peak_above` looks for the highest moment."""
    settle()
    # 5 resets the high-water mark to the present level.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def cpu_peak_above(level: int) -> int:
    """Resident bytes at the highest moment since `cpu_level_bytes` returned `level`, above it."""
    return max(0, _status_bytes("VmHWM") - level)


def settle() -> None:
    """Give every freed page back to the kernel."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def why_no_cpu_peak() -> str | None:
    """Why this process cannot read its peak, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "peak CPU memory is read from /proc, which this system does not have"
    for name, value in MALLOC_ENVIRONMENT.items():
        if os.environ.get(name) != value:
            return f"peak CPU memory needs a process started with {name}={value}"
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status_bytes("VmHWM")
    except (OSError, ValueError) as error:
        return f"the kernel does not let the high-water mark be reset: {error}"
    return None


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the storages that the tensors among `values` lie in, each once; looks into lists, dicts and objects."""
    storages: dict[tuple[str, int], int] = {}
    todo, seen = list(values), set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[str(value.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | ModuleType | FunctionType):
            todo += vars(value).values()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            todo += [getattr(value, each.name, None) for each in dataclasses.fields(value)]
    return sum(storages.values())


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def _drop(value: Any) -> None:
    """Lets go of a value that was only made to be made."""
    del value
