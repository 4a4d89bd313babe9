"""Blocks of a model measured in the process that trains it: rows as a sweep gives them, and the step beside them.

Letters: B batch, T sequence length, D d_model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine.call import Run
from longctx.engine.device import describe_device
from longctx.engine.loading import LoadedBlock
from longctx.engine.locks import held
from longctx.engine.machine import available_memory_bytes, describe_host, predict_memory_bytes
from longctx.engine.measure import Plan, fault_of
from longctx.engine.memory import measure_memory, resting
from longctx.engine.rows import add_round, fault, new_row
from longctx.engine.timing import time_call
from longctx.results import BenchmarkResult, ResultsFile, jsonable, read_records
from longctx.training.calls import (
    Circumstances,
    ModelRun,
    block_input,
    computed_in,
    loaded_block,
    model_inputs,
    moved,
    source_hash,
)
from longctx.training.finding import FoundBlock, class_of, find_blocks
from longctx.training.isolation import is_sharded, twin_of

BUDGET_S = 0.5
"""Seconds of open-ended sampling of a cell: training waits meanwhile."""


def measure_blocks(
    model: nn.Module,
    config: BenchmarkConfig,
    circumstances: Circumstances,
    *,
    selector: Callable[[str, nn.Module], bool] | None = None,
    prefix: str = "",
) -> list[BenchmarkResult]:
    """One row for each distinct block of `model` and each length; faults are rows. Call it inside `untouched()`.

    Raises LongctxError for a model without blocks.
    """
    rows = []
    for block in find_blocks(model, selector):
        for length in sorted(config.sequence_lengths):
            rows.append(measure_block(block, length, config, circumstances, prefix=prefix))
            _free()
    return rows


def measure_block(
    block: FoundBlock, length: int, config: BenchmarkConfig, circumstances: Circumstances, *, prefix: str = ""
) -> BenchmarkResult:
    """The row of one block at one length."""
    device, dtype = circumstances.place_of(block.module)
    cell = Cell(
        block=BlockRequest(target=block.spec.label if block.spec else class_of(block.inner).__qualname__),
        length=length,
        batch_size=config.batch_size,
        dtype=computed_in(dtype, device, circumstances),
        mode=config.mode,
        d_model=block.d_model(config.d_model),
        n_heads=block.n_heads(config.n_heads),
        num_kv_heads=getattr(block.inner, "num_kv_heads", None),
    )
    row = _row(f"{prefix}{block.path}", cell, config, device, circumstances)
    row.config |= {"module_class": class_of(block.inner).__qualname__, "same_shape": list(block.also)}
    row.block_options = block.options

    def measure() -> dict[str, Any]:
        loaded = loaded_block(block, cell, device, dtype, circumstances)
        x = block_input(cell, device, dtype, config.seed, circumstances.input_generator)
        found = _measure(Run(cell, loaded, x), loaded, config, device, circumstances)
        if circumstances.eager and block.compiled:
            found["path"] = ", ".join(filter(None, [found["path"], "without torch.compile"]))
        return found

    return _finish(row, cell, measure, circumstances)


def measure_model(
    model: nn.Module, name: str, length: int, config: BenchmarkConfig, circumstances: Circumstances
) -> BenchmarkResult:
    """The row of a whole model: a forward, or with mode train a forward and backward of the sum of its output."""
    device, dtype = circumstances.place_of(model)
    cell = Cell(
        block=BlockRequest(target=type(model).__qualname__),
        length=length,
        batch_size=config.batch_size,
        dtype=computed_in(dtype, device, circumstances),
        mode=config.mode,
        d_model=config.d_model,
        n_heads=config.n_heads,
        scope="model",
    )
    row = _row(name, cell, config, device, circumstances)
    row.config |= {"module_class": type(model).__qualname__}

    def measure() -> dict[str, Any]:
        if cell.mode not in ("forward", "train"):
            raise NotImplementedError(f"a whole model is measured in mode forward or train, not {cell.mode}")
        if circumstances.sharded or is_sharded(model):
            raise NotImplementedError("its weights are sharded over processes, one alone cannot run it")
        inputs = model_inputs(model, cell, circumstances.input_generator)
        twin = twin_of(model).to(device)
        if circumstances.dtype is not None:
            twin = twin.to(dtype)
        given = [moved(value, device, dtype) for value in inputs]
        loaded = LoadedBlock(
            name=name,
            module=twin.eval(),
            options={},
            source_hash=source_hash(model),
            causal=False,
            modes=("forward", "train"),
            reference=None,
            cost=None,
        )
        return _measure(ModelRun(cell, twin, given), loaded, config, device, circumstances)

    return _finish(row, cell, measure, circumstances)


def append_rows(path: Path, rows: list[BenchmarkResult]) -> None:
    """Put rows into the results file at `path`, which keeps what it holds of other steps and runs, also of what other
    processes put there meanwhile. Raises LongctxError."""
    with held(f"file {path.resolve()}", str(path), wait_s=10.0):
        ResultsFile(path, read_records(path) if path.exists() else ()).save(rows)


# -- one row --------------------------------------------------------------------------------------------------------


def _row(
    name: str, cell: Cell, config: BenchmarkConfig, device: torch.device, circumstances: Circumstances
) -> BenchmarkResult:
    # Nobody watches the neighbours here: training waits.
    environment, step = describe_host(window_s=0.0) | describe_device(device), circumstances.training_step
    row = new_row(cell, config=config.to_json(), environment=environment, training_step=step)
    row.block_name = name
    row.config |= {"d_model": cell.d_model, "n_heads": cell.n_heads, "device": str(device)}
    row.config |= {"scope": cell.scope, "precision": circumstances.precision, "run": circumstances.run}
    return row


def _finish(
    row: BenchmarkResult, cell: Cell, measure: Callable[[], dict[str, Any]], circumstances: Circumstances
) -> BenchmarkResult:
    """Measure, and put what was found or what went wrong into the row."""
    if circumstances.deadline is not None and time.monotonic() > circumstances.deadline:
        found = fault("skipped", "Skipped", "max_time was over")
    elif why := _why_too_large(row, cell):
        found = fault("skipped", "Skipped", why)
    else:
        found = fault("ok", "", "") | {"error": None}
        try:
            found |= measure()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found |= fault_of(error)
    add_round(row, cell, found)
    identity = {"options": jsonable(row.block_options), "source_hash": row.source_hash}
    place = {"name": row.block_name, "training_step": row.training_step, "precision": circumstances.precision}
    place |= {"run": circumstances.run}
    row.key = cell.key(identity=identity, device=row.config["device"], **place)
    return row


def _why_too_large(row: BenchmarkResult, cell: Cell) -> str | None:
    """Why a cell is not tried. A GPU refuses what does not fit; on a CPU the kernel would end the training for it."""
    if row.config["device"] != "cpu":
        return None
    needed, free = predict_memory_bytes(cell, row.block_options), available_memory_bytes()
    if needed <= free:
        return None
    return f"it needs at least {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are there"


def _measure(
    run: Any, loaded: LoadedBlock, config: BenchmarkConfig, device: torch.device, circumstances: Circumstances
) -> dict[str, Any]:
    plan = Plan(warmup_runs=config.warmup_runs, runs=config.benchmark_runs, exact=config.exact_runs, budget_s=BUDGET_S)
    found: dict[str, Any] = {"source_hash": loaded.source_hash}
    if loaded.cost is not None:
        found |= {"flops": loaded.cost.flops, "bytes": loaded.cost.bytes, "state_bytes": loaded.cost.state_bytes}
    floor = resting(device) if config.profile_memory else None
    with run.context():
        before = run.prepare if run.cell.mode == "decode" else None
        timing = time_call(run.call_prepared, device=device, plan=plan, before_sample=before, most_calls=run.most_calls)
        found |= {
            "samples_round": timing.samples,
            "warnings": timing.warnings,
            "host_time_median": timing.host_time_median,
            "first_call_s": timing.first_call_s,
            "path": loaded.path,
        }
        if config.profile_memory:
            run.prepare()
            how = {"module": loaded.module, "inputs": run.inputs, "floor": floor, "prepare": run.prepare}
            reading = measure_memory(run.call_prepared, device=device, **how)
            sizes = {"peak": reading.peak_bytes, "allocated": reading.allocated_bytes}
            # What the training holds besides stays out of the figure, so the pool's size says nothing of the block.
            found |= {f"{key}_memory_mb": None if size is None else size / 2**20 for key, size in sizes.items()}
            if reading.grows and run.cell.mode != "decode":
                found["warnings"] = [*found["warnings"], "memory_grows"]
            if reading.peak_bytes is not None:
                found["peak_bytes_per_token"] = reading.peak_bytes / run.cell.tokens
    return found


def _free() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
