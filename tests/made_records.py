"""Records as a results file holds them: with the published fields alone, and with all of them; and a small run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from longctx.results import BenchmarkResult

PUBLISHED = [
    "block_name",
    "sequence_length",
    "batch_size",
    "forward_time_mean",
    "forward_time_std",
    "forward_time_min",
    "forward_time_max",
    "peak_memory_mb",
    "allocated_memory_mb",
    "reserved_memory_mb",
    "throughput_tokens_per_sec",
    "memory_efficiency_mb_per_token",
    "config",
]

FOREIGN = {
    "block_name": "TheirBlock",
    "sequence_length": 2048,
    "batch_size": 2,
    "forward_time_mean": 0.25,
    "forward_time_std": 0.01,
    "forward_time_min": 0.2,
    "forward_time_max": 0.3,
    "peak_memory_mb": 100.5,
    "allocated_memory_mb": 80.0,
    "reserved_memory_mb": 128.0,
    "throughput_tokens_per_sec": 16384.0,
    "memory_efficiency_mb_per_token": 0.0195,
    "config": {"d_model": 512, "n_heads": 8, "device": "cuda", "torch_benchmark": True, "cudnn_benchmark": True},
}

FLOATS = [f.name for f in dataclasses.fields(BenchmarkResult) if f.type == "float | None"]


def full_result(**values) -> BenchmarkResult:
    """A result in which every field is set."""
    given = {
        **FOREIGN,
        "key": "0123456789abcdef0123",
        "source_hash": "ab" * 32,
        "warnings": ["unstable", "throttled"],
        "mode": "train",
        "dtype": "bf16",
        "training_step": 300,
        "block_target": "path/to/file.py:TheirBlock",
        "block_options": {"window": 64, "causal": True, "kind": "é", "scale": None},
        "forward_time_median": 0.25,
        "forward_time_ci95": [0.24, 0.26],
        "samples": [[0.25, 0.26], [0.24]],
        "gate": {"error": 1e-7, "tolerance": 1e-5, "passed": True, "reason": None},
        "path": "fused",
        "error": {"type": "T", "message": "several\nlines", "log_tail": "\tindented"},
        "environment": {"flags": {"threads": 2}, "affinity": [0, 1]},
        "command": "longctx sweep",
    }
    for name in FLOATS:
        given.setdefault(name, 1.5)
    return BenchmarkResult(**{**given, **values})


def write(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


def row(name: str, length: int, time_s: float | None = None, **fields) -> BenchmarkResult:
    """A row with one sample, or with none."""
    samples = [[time_s]] if time_s else []
    return BenchmarkResult(
        block_name=name, sequence_length=length, forward_time_median=time_s, samples=samples, **fields
    )


def run() -> list[BenchmarkResult]:
    """Three blocks with laws of their own: Dense is last, and does not reach 8K."""
    rows = []
    for length in (1024, 2048, 4096):
        rows.append(row("Dense", length, (length / 1024) ** 2))
        rows.append(row("BLADE", length, length / 1024, peak_memory_mb=length / 64))
        rows.append(row("Identity", length, length / 2048))
    rows.append(row("Dense", 8192, status="oom", error={"type": "OutOfMemoryError", "message": "needs\nmore"}))
    rows.append(row("BLADE", 8192, 8.0))
    return rows
