"""A row made of what the workers found: rounds put together, and the figures derived from them. No torch here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from longctx.analysis.statistics import is_unstable, median, median_ci95, round_median
from longctx.config import Cell
from longctx.results import BenchmarkResult

_NAMES = {field.name for field in dataclasses.fields(BenchmarkResult)}


def new_row(cell: Cell, **values: Any) -> BenchmarkResult:
    """The row of `cell` before anything is known of it but `values`."""
    return BenchmarkResult(
        block_name=cell.block.name,
        block_target=cell.block.target,
        sequence_length=cell.length,
        batch_size=cell.batch_size,
        mode=cell.mode,
        dtype=cell.dtype,
        **values,
    )


def add_round(row: BenchmarkResult, cell: Cell, found: Mapping[str, Any]) -> None:
    """Put the timing of one more round into `row`. found: what `measure.measure_cell` returned, plain data.

    What only the first round knows (gate, first call, cost) stays as it was. A fault in a later round is the row's
    fault too, its earlier samples kept.
    """
    row.status, row.error = found["status"], found["error"]
    row.warnings = sorted({*row.warnings, *found["warnings"]})
    if found["samples_round"]:
        row.samples.append(found["samples_round"])
    if found["host_time_median"] is not None:
        row.host_times.append(found["host_time_median"])
    row.host_time_median = median(row.host_times)
    if found.get("forward_share") is not None:
        row.forward_shares.append(found["forward_share"])
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if name in _NAMES and value is not None and getattr(row, name) is None:
            setattr(row, name, value)
    if found.get("block_options"):
        row.block_options = dict(found["block_options"])
    if bare := found.get("bare_samples_round"):
        _add_bare(row, bare)
    _derive(row, cell)


def add_memory(row: BenchmarkResult, found: Mapping[str, Any]) -> None:
    """Put the reading of the memory worker into `row`."""
    for name in (
        "peak_memory_mb",
        "allocated_memory_mb",
        "reserved_memory_mb",
        "total_memory_mb",
        "peak_bytes_per_token",
    ):
        setattr(row, name, found[name])
    row.warnings = sorted({*row.warnings, *found["warnings"]})
    if row.allocated_memory_mb is not None:
        row.memory_efficiency_mb_per_token = row.allocated_memory_mb / (row.batch_size * row.sequence_length)


def fault(status: str, kind: str, message: str, log_tail: str | None = None) -> dict[str, Any]:
    """What a worker that cannot speak any more would have found, for `add_round`."""
    error = {"type": kind, "message": message, "log_tail": log_tail}
    return {
        "status": status,
        "error": error,
        "warnings": [],
        "samples_round": [],
        "host_time_median": None,
    }


def _add_bare(row: BenchmarkResult, bare: list[float]) -> None:
    """Put one more round of the plain training loop beside Lightning's, whose samples are in the row already."""
    said = row.lightning = dict(row.lightning or {})
    said["bare_samples"] = [*said.get("bare_samples", []), bare]
    said["bare_step_s"] = round_median(said["bare_samples"])
    # Within a round, as all ratios are: what slows a round slows both loops.
    pairs = zip(row.samples, said["bare_samples"], strict=False)
    said["overhead_share"] = statistics.median(1 - median(plain) / median(ours) for ours, plain in pairs)


def _interval(rounds: list[list[float]]) -> list[float] | None:
    """[low, high] around the time, None under 6 samples.

    Of one round the 95% interval of its median, of six and more that of the rounds' medians. With fewer nothing reaches
    95%: it then goes from the lowest end of a round's interval to the highest, of a round of few samples its ends.
    """
    if of_rounds := median_ci95(map(statistics.median, rounds)):
        return of_rounds
    if median_ci95(value for values in rounds for value in values) is None:
        return None
    ends = [median_ci95(values) or [min(values), max(values)] for values in rounds]
    return [min(low for low, _ in ends), max(high for _, high in ends)]


def _derive(row: BenchmarkResult, cell: Cell) -> None:
    """The figures that follow from all samples of all rounds."""
    samples = [value for values in row.samples for value in values]
    if samples:
        # A round of many samples counts as much as one of few.
        rounds = [values for values in row.samples if values]
        row.forward_time_mean = statistics.fmean(map(statistics.fmean, rounds))
        row.forward_time_std = statistics.stdev(samples) if len(samples) > 1 else None
        row.forward_time_min, row.forward_time_max = min(samples), max(samples)
        row.forward_time_median = round_median(row.samples)
        row.forward_time_ci95 = _interval(rounds)
        row.throughput_tokens_per_sec = cell.tokens / row.forward_time_mean
        if (share := median(row.forward_shares)) is not None:
            row.forward_part_s = share * row.forward_time_median
            row.backward_part_s = row.forward_time_median - row.forward_part_s
        if row.flops:
            row.tflops = row.flops / row.forward_time_median / 1e12
        unstable = is_unstable(row.samples)
        row.warnings = sorted({*row.warnings, "unstable"} if unstable else {*row.warnings} - {"unstable"})
    if row.allocated_memory_mb is not None:
        row.memory_efficiency_mb_per_token = row.allocated_memory_mb / (row.batch_size * row.sequence_length)
