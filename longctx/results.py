"""A result and the file it lives in: schema, reading of older and foreign records, atomic saving.

Seconds, bytes and tokens, except the published `_mb` fields, which are MiB. Nothing here imports torch: results are
read on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "crashed", "timeout", "failed", "wrong", "impossible", "unsupported", "skipped")
WARNINGS = ("unstable", "suspect", "throttled", "launch_bound", "contended")


@dataclass(kw_only=True)
class BenchmarkResult:
    """One row: a cell and what was measured of it. A number that does not exist is None, never 0 or NaN.

    The first group holds the published fields, in their published order. In mode train and decode the
    `forward_time_*` fields hold that mode's time.
    """

    block_name: str
    sequence_length: int
    batch_size: int = 1
    forward_time_mean: float | None = None
    forward_time_std: float | None = None
    forward_time_min: float | None = None
    forward_time_max: float | None = None
    peak_memory_mb: float | None = None
    """Highest level during the call above the level just before it, MiB."""
    allocated_memory_mb: float | None = None
    """Live after the call, weights, input and output included, MiB."""
    reserved_memory_mb: float | None = None
    throughput_tokens_per_sec: float | None = None
    memory_efficiency_mb_per_token: float | None = None
    config: dict[str, Any] = field(default_factory=dict)

    schema_version: int = SCHEMA_VERSION
    key: str | None = None
    source_hash: str | None = None
    status: str = "ok"
    warnings: list[str] = field(default_factory=list)
    mode: str = "forward"
    dtype: str | None = None
    block_target: str | None = None
    block_options: dict[str, Any] = field(default_factory=dict)
    forward_time_median: float | None = None
    """Median over rounds of the median of each round's samples: the value that tables show."""
    forward_time_ci95: list[float] | None = None
    samples: list[list[float]] = field(default_factory=list)
    """Seconds, one list a round. Nothing is trimmed."""
    first_call_s: float | None = None
    host_time_median: float | None = None
    gate_s: float | None = None
    flops: float | None = None
    bytes: float | None = None
    state_bytes: float | None = None
    tflops: float | None = None
    roofline_fraction: float | None = None
    joules_per_token: float | None = None
    peak_bytes_per_token: float | None = None
    gate: dict[str, Any] | None = None
    """{error, tolerance, passed, reason}: the check against the reference."""
    path: str | None = None
    """The implementation that ran, in words."""
    error: dict[str, Any] | None = None
    """{type, message, log_tail}"""
    environment: dict[str, Any] = field(default_factory=dict)
    command: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def time_s(self) -> float | None:
        """The figure to show and rank by: the median, or the mean of a record that has no median. Seconds."""
        return self.forward_time_median if self.forward_time_median is not None else self.forward_time_mean

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BenchmarkResult:
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})
