"""Benchmarks of long-context sequence-mixing blocks, in the terminal and from Python.

    import longctx
    results = longctx.benchmark(["BLADE", "DPASSM"], longctx.BenchmarkConfig(sequence_lengths=[1024, 2048]))
    earlier = longctx.load("reports/benchmark/run.json")

Importing this package is light; torch is loaded in the worker processes that measure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longctx._version import __version__
from longctx.config import BenchmarkConfig
from longctx.results import BenchmarkResult

__all__ = ["BenchmarkConfig", "BenchmarkResult", "__version__", "benchmark", "load"]


def benchmark(
    blocks: Iterable[str] | str | None = None,
    config: BenchmarkConfig | None = None,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
) -> list[BenchmarkResult]:
    """Measure `blocks` (labels, `NAME:option=value`, `path.py:Name`; all of ours if None) as `longctx sweep` does.

    vary: several values for fields of `config`, all combinations of which are measured, as in
    `{"mode": ["forward", "train"], "batch_size": [1, 4]}`.

    Saves to `config.results_dir` when `config.save_results`. Returns one result a cell, faults included. Raises
    LongctxError for what a user can mend: an unknown block, a missing device, a file that is in the way.
    """
    from longctx.engine.runner import run_sweep

    return run_sweep(blocks, config or BenchmarkConfig(), vary=vary)


def load(path: str | os.PathLike[str]) -> list[BenchmarkResult]:
    """The results in the file at `path`, ours or any with the published fields. Raises ResultsError."""
    from longctx.results import read_results

    return read_results(path)
