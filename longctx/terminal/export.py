"""Results as documents for other programs: CSV for tables and pandas, JSON; Markdown is a file of its own.

Names and messages come from files that anyone may have written: each format escapes what it would act upon.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longctx.analysis.conclusions import conclude_modes
from longctx.analysis.crossover import Crossover
from longctx.analysis.ranking import kept_samples, ratio_to
from longctx.analysis.settings import by_mode
from longctx.analysis.statistics import spread_between, spread_within
from longctx.analysis.summary import slopes
from longctx.results import BenchmarkResult, jsonable
from longctx.terminal.findings import findings_document
from longctx.terminal.format import plain
from longctx.terminal.tables import lightning_of

COLUMNS = (
    "block_name",
    "sequence_length",
    "batch_size",
    "mode",
    "dtype",
    "training_step",
    "status",
    "forward_time_median",
    "forward_time_mean",
    "forward_time_std",
    "forward_time_min",
    "forward_time_max",
    "throughput_tokens_per_sec",
    "peak_memory_mb",
    "allocated_memory_mb",
    "reserved_memory_mb",
    "memory_efficiency_mb_per_token",
    "peak_bytes_per_token",
    "total_memory_mb",
    "flops",
    "bytes",
    "tflops",
    "roofline_fraction",
    "forward_part_s",
    "backward_part_s",
    "state_bytes",
    "path",
    "source_hash",
)
SHAPE = ("module_class", "d_model", "n_heads", "num_kv_heads", "layers")
"""Columns from the configuration of a row: a sweep may hold several of each."""

OF_LIGHTNING = ("bare_step_s", "overhead_share")
"""Figures of mode lightning."""


def document(
    results: Sequence[BenchmarkResult], *, crossovers: Mapping[str, Sequence[Crossover]] | None = None
) -> dict[str, Any]:
    """The results with what was derived from them: ratios to Dense, laws, crossovers, best blocks. Plain data for JSON.

    crossovers: those asked for, by mode, in place of those against Dense.
    """
    return jsonable(
        {
            "results": [result.to_json() for result in results],
            "ratios_to_dense": [
                {
                    "block_name": result.block_name,
                    "sequence_length": result.sequence_length,
                    "key": result.key,
                    **ratio_fields(result, results),
                }
                for result in results
            ],
            "local_slopes": [
                {
                    "mode": mode,
                    "name": row.name,
                    "time": row.time and row.time.slope,
                    "memory": row.memory and row.memory.slope,
                }
                for mode, rows in by_mode(results).items()
                for row in slopes(rows)
            ],
            **findings_document(conclude_modes(results), crossovers),
        }
    )


def to_csv(runs: Mapping[str, Sequence[BenchmarkResult]]) -> str:
    """One line a row of all runs (label -> rows), the label first if there are several.

    Numbers stand in full and in the units of the results file; what does not exist is empty.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    several = len(runs) > 1
    head = [*COLUMNS, *SHAPE, *OF_LIGHTNING, "spread_within", "spread_between"]
    head += ["ratio_to_dense", "ratio_low", "ratio_high", "gate_error", "warnings", "error"]
    writer.writerow(["run", *head] if several else head)
    for label, results in runs.items():
        for result in results:
            gate = result.gate if isinstance(result.gate, dict) else {}
            error = result.error if isinstance(result.error, dict) else {}
            cells = [label] if several else []
            cells += [getattr(result, name) for name in COLUMNS]
            config = result.config if isinstance(result.config, dict) else {}
            samples = kept_samples(result)
            cells += [config.get(name) for name in SHAPE]
            cells += [lightning_of(result, name) for name in OF_LIGHTNING]
            cells += [spread_within(samples), spread_between(samples)]
            cells += [*ratio_fields(result, results).values(), gate.get("error")]
            cells += [" ".join(map(str, result.warnings)), error.get("message")]
            writer.writerow([_csv_cell(cell) for cell in cells])
    return out.getvalue()


def ratio_fields(result: BenchmarkResult, results: Iterable[BenchmarkResult]) -> dict[str, float | None]:
    """Time over Dense's, and the extremes of that over rounds where there were several."""
    found = ratio_to(result, results)
    several = found is not None and found.rounds > 1
    return {
        "ratio": found.value if found else None,
        "ratio_low": found.low if several else None,
        "ratio_high": found.high if several else None,
    }


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = plain(value)
    # A spreadsheet runs a text cell that begins so as a formula.
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
