"""One cell measured: build, gate, time, memory. Plain data in, plain data out; every fault becomes a status."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.config import Cell
from longctx.engine.call import Run, forward_share, make_input
from longctx.engine.device import DTYPES
from longctx.engine.energy import energy_per_call
from longctx.engine.flags import global_state, pinned_flags
from longctx.engine.gate import check_block
from longctx.engine.importing import in_words, said_by
from longctx.engine.loading import LoadedBlock, load_block
from longctx.engine.memory import Resting, measure_memory, resting, settle
from longctx.engine.timing import Emit, Timing, time_call
from longctx.engine.traces import Traces
from longctx.errors import LongctxError

POOL = 3
POOL_BYTES = 256 << 20
"""Timing goes round through so many inputs where all of them together take no more than this."""

FLUSHES_ITSELF_BYTES = 1 << 30
"""An input of this size leaves nothing of an earlier call in any L2 cache: no flush, no memory for it."""

GRAPH_MODES = ("forward", "train")

_OOM_WORDS = (
    "out of memory",
    "defaultcpuallocator",
    "not enough memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_CUDA_OOM = re.compile(
    r"Tried to allocate ([\d.]+ \wiB)\..*?total capacity of ([\d.]+ \wiB) of which ([\d.]+ \wiB) is free", re.DOTALL
)
_UNSUPPORTED_WORDS = ("not implemented for", "is not supported", "not supported for", "unsupported dtype")


@dataclass(kw_only=True)
class Plan:
    """What to do with a cell. gate, timing, memory, energy: which phases; exact: `runs` samples and no more or less."""

    warmup_runs: int = 3
    runs: int = 10
    exact: bool = False
    budget_s: float = 3.0
    """Seconds of sampling after which a round goes without an interval of 1%."""
    gate: bool = True
    timing: bool = True
    memory: bool = True
    energy: bool = False
    seed: int = 0
    cuda_graph: bool = False
    timeout: float | None = None
    """Seconds that the supervisor gives the cell; kept here for the record, the worker is ended from outside."""
    orders: Iterator[Mapping[str, Any]] | None = None
    """Where samples are taken in turns with another process: the supervisor's word on when and how many."""


class _Escaped(Exception):
    """Work went on outside of what was timed: the number cannot be true."""


def measure_cell(
    cell: Cell,
    plan: Plan,
    *,
    device: torch.device,
    config: Mapping[str, Any],
    gate_cache: dict[Any, dict[str, Any]],
    emit: Emit,
) -> dict[str, Any]:
    """Measure `cell` as `plan` says, and return values of `BenchmarkResult`'s fields, `samples_round` among them.

    config: `BenchmarkConfig.to_json()`. gate_cache: one dict for the life of the process. emit gets
    {"event": "phase", "phase": build | gate | warmup | timing | energy | memory} and {"event": "sample", "seconds",
    "count"}. Whatever the block raises becomes a status (oom, unsupported, failed), and so does what the gate finds
    (wrong) and work that goes on after a call (impossible); only KeyboardInterrupt passes. Process-wide settings are as
    before afterwards.
    """
    found: dict[str, Any] = {
        "status": "ok",
        "warnings": [],
        "samples_round": [],
        "error": None,
        "gate": None,
        "path": None,
        "causal": None,
        "block_options": dict(cell.block.options),
        "source_hash": None,
    }
    numbers = ("first_call_s", "host_time_median", "gate_s", "flops", "bytes", "state_bytes", "peak_memory_mb")
    numbers += ("allocated_memory_mb", "reserved_memory_mb", "peak_bytes_per_token", "calls_per_sample", "contention")
    numbers += ("joules_per_token", "forward_share", "total_memory_mb")
    found |= dict.fromkeys(numbers)
    traces = Traces()
    with global_state():
        try:
            pinned_flags(config)
            _compiled_anew()
            _measure(cell, plan, device, config, gate_cache, emit, found)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found |= fault_of(error)
    found["spent"] = traces.left()
    gc.collect()
    if device.type == "cuda":
        # After a device-side fault even this raises; the supervisor replaces the worker then.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return found


def _measure(
    cell: Cell,
    plan: Plan,
    device: torch.device,
    config: Mapping[str, Any],
    gate_cache: dict[Any, dict[str, Any]],
    emit: Emit,
    found: dict[str, Any],
) -> None:
    emit({"event": "phase", "phase": "build"})
    dtype = DTYPES[cell.dtype]
    floor = resting(device) if plan.memory else Resting()
    loaded = load_block(cell.block, cell, device, dtype, plan.seed)
    found |= {"causal": loaded.causal, "block_options": loaded.options, "source_hash": loaded.source_hash}
    if loaded.cost is not None:
        found |= {"flops": loaded.cost.flops, "bytes": loaded.cost.bytes, "state_bytes": loaded.cost.state_bytes}
    if cell.mode not in loaded.modes:
        raise NotImplementedError(
            f"{loaded.name} has no mode {cell.mode}: it has {', '.join(loaded.modes)}"
            + ("" if loaded.causal else "; decode and prefill need a causal block")
        )
    # Building may have changed what was pinned, and that must not decide this block's own number either.
    pinned_flags(config)
    x = make_input(cell, device, seed=plan.seed)
    warmed, call_s = 0, None
    if plan.gate:
        emit({"event": "phase", "phase": "gate"})
        warmed, call_s = _gate(cell, plan, device, loaded, x, gate_cache, found)
        if found["status"] != "ok":
            return
    run = Run(cell, loaded, x)
    del x
    if _compiled_anew() or cell.mode != "forward":
        warmed, call_s = 0, None
    if plan.timing:
        # A first call that the gate has made stays the first, also where what it compiled is compiled again.
        first = warmed == 0 and (cell.mode != "forward" or found["first_call_s"] is None)
        timing = _time(cell, plan, device, run, emit, warmed=warmed, call_s=call_s, first_call=first)
        found |= {
            "samples_round": timing.samples,
            "warnings": [*found["warnings"], *timing.warnings],
            "host_time_median": timing.host_time_median,
            "calls_per_sample": timing.calls_per_sample,
            "contention": timing.contention,
        }
        if timing.first_call_s is not None:
            found["first_call_s"] = timing.first_call_s
        found["path"] = loaded.path
        if timing.device_sync_mismatch:
            raise _Escaped(timing.device_sync_mismatch)
        if cell.mode == "train" and not plan.cuda_graph:
            found["forward_share"] = forward_share(run, device=device, call_s=timing.median)
        if run.state_bytes is not None:
            found["state_bytes"] = run.state_bytes
    # Steps without a pause for seconds would be steps after another context.
    if plan.energy and cell.mode != "decode":
        emit({"event": "phase", "phase": "energy"})
        run.prepare()
        with run.context():
            joules = energy_per_call(run.call_prepared, device=device)
        found["joules_per_token"] = None if joules is None else joules / cell.tokens
    if plan.memory:
        emit({"event": "phase", "phase": "memory"})
        run.prepare()
        if device.type == "cpu":
            settle()
        with run.context():
            reading = measure_memory(
                run.call_prepared,
                device=device,
                module=loaded.module,
                inputs=run.inputs,
                floor=floor,
                prepare=run.prepare,
            )
        found |= {
            "peak_memory_mb": _mib(reading.peak_bytes),
            "allocated_memory_mb": _mib(reading.allocated_bytes),
            "reserved_memory_mb": _mib(reading.reserved_bytes),
            "total_memory_mb": _mib(reading.total_bytes),
            "memory_note": reading.reason,
        }
        # A stream's state is to grow.
        if reading.grows and cell.mode != "decode":
            found["warnings"] = [*found["warnings"], "memory_grows"]
        if reading.peak_bytes is not None:
            found["peak_bytes_per_token"] = reading.peak_bytes / cell.tokens
        if not (plan.timing or plan.gate):
            found["first_call_s"] = reading.first_call_s
    found["path"] = loaded.path


def _compiled_anew() -> bool:
    """Have torch.compile forget what it made in this process. Returns whether there was something.

    It keeps graphs by code, not by module: those of other cells and of the gate's lengths would have it compile for any
    length, and after a few of them run the block uncompiled, without a word.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    # What it has looked at. Not to know costs some calls.
    codes = getattr(getattr(dynamo, "convert_frame", None), "input_codes", None)
    compiled = bool(getattr(codes, "seen", True))
    dynamo.reset()
    return compiled


def _gate(
    cell: Cell,
    plan: Plan,
    device: torch.device,
    loaded: LoadedBlock,
    x: Tensor,
    gate_cache: dict[Any, dict[str, Any]],
    found: dict[str, Any],
) -> tuple[int, float | None]:
    """Run the gate and record it. Returns (calls made at the cell's shape, seconds that the last took)."""
    start = time.perf_counter()
    try:
        gate = check_block(loaded, cell, device, DTYPES[cell.dtype], plan.seed, x, gate_cache)
    finally:
        found["gate_s"] = time.perf_counter() - start
    found["first_call_s"] = gate["first_call_s"]
    found["gate_s"] -= gate["first_call_s"] or 0.0
    found["gate"] = {name: gate[name] for name in ("error", "tolerance", "passed", "reason")}
    found["path"] = loaded.path
    if gate["mixes_batch"]:
        found["warnings"] = [*found["warnings"], "mixes_batch"]
    if not gate["passed"]:
        found["status"] = "wrong"
        found["error"] = {"type": "Wrong", "message": f"{loaded.name} {gate['reason']}"}
    return gate["calls"], gate["call_s"]


def _time(
    cell: Cell,
    plan: Plan,
    device: torch.device,
    run: Run,
    emit: Emit,
    *,
    warmed: int,
    call_s: float | None,
    first_call: bool,
) -> Timing:
    size = (run.token if cell.mode == "decode" else run.x).nbytes
    inputs = [run.x]
    call: Callable[..., Any] = run.call
    graph = plan.cuda_graph and device.type == "cuda"
    with run.context():
        if graph:
            call, inputs = _captured(run), []
        elif cell.mode in ("forward", "prefill") and size * POOL <= POOL_BYTES:
            inputs += [make_input(cell, device, seed=plan.seed + index) for index in range(1, POOL)]
        return time_call(
            call,
            device=device,
            plan=plan,
            emit=emit,
            inputs=inputs,
            before_sample=run.prepare if cell.mode == "decode" else None,
            most_calls=run.most_calls,
            warmed=warmed,
            call_s=None if graph else call_s,
            first_call=first_call and not graph,
            flush=size < FLUSHES_ITSELF_BYTES,
            orders=plan.orders,
        )


def _captured(run: Run) -> Callable[[], None]:
    """The call as a CUDA graph, to be replayed on the input it was captured with; of a training step the whole."""
    if run.cell.mode not in GRAPH_MODES:
        raise NotImplementedError(f"a CUDA graph is measured in mode {' or '.join(GRAPH_MODES)}, not {run.cell.mode}")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.call(run.x)
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            run.output = run.call(run.x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotImplementedError(f"it cannot be captured in a CUDA graph: {error}") from error
    return graph.replay


def fault_of(error: BaseException) -> dict[str, Any]:
    """The status and error of a cell whose block raised."""
    text = said_by(error) or type(error).__name__
    lower = text.lower()
    kind = type(error).__name__
    if isinstance(error, _Escaped):
        return {"status": "impossible", "error": {"type": "Escaped", "message": text}}
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in lower for words in _OOM_WORDS)
    ):
        if asked := re.search(r"tried to allocate (\d+) bytes", text):
            text = f"there was no room in memory for another {int(asked[1]) / 2**30:,.2f} GiB"
        elif asked := _CUDA_OOM.search(text):
            text = f"there was no room in memory for another {asked[1]}: {asked[3]} of {asked[2]} were free"
        # What was measured before is not the whole cell.
        return {"status": "oom", "samples_round": [], "error": {"type": kind, "message": _first_lines(text)}}
    if isinstance(error, NotImplementedError) or (
        isinstance(error, RuntimeError) and any(words in lower for words in _UNSUPPORTED_WORDS)
    ):
        return {"status": "unsupported", "samples_round": [], "error": {"type": kind, "message": _first_lines(text)}}
    if isinstance(error, LongctxError):
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        return {"status": "failed", "samples_round": [], "error": {"type": kind, "message": message}}
    text = in_words(error)
    if isinstance(error, SystemExit):
        text = f"the block ended the program (exit code {error.code})"
    tail = "".join(traceback.format_exception(error)[-4:])
    return {
        "status": "failed",
        "samples_round": [],
        "error": {"type": kind, "message": _first_lines(text), "log_tail": tail[-2000:]},
    }


def _first_lines(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _mib(count: int | None) -> float | None:
    return None if count is None or not math.isfinite(count) else count / 2**20
