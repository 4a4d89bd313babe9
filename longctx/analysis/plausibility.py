"""Can this number be true? Is it faster than the machine allows, and is it flat where the work grows?"""

from __future__ import annotations

import math
from collections.abc import Iterable

from longctx.analysis.settings import options_of, setting
from longctx.analysis.statistics import positive
from longctx.results import BenchmarkResult

PEAK_MARGIN = {"cuda": 1.05, "cpu": 1.30}
"""How far above the measured peak a rate may lie before it is impossible. A CPU's peak is a noisy figure."""

FLAT_EXPONENT = 0.1
FLAT_WORK = 8.0


def least_time(
    *, flops: float | None, bytes: float | None, peak_flops: float | None, peak_bytes: float | None
) -> float:
    """Seconds that `flops` and `bytes` need at the peaks (per second): the larger, 0 if nothing is known."""
    pairs = ((flops, peak_flops), (bytes, peak_bytes))
    return max((work / peak for work, peak in pairs if positive(work) and positive(peak)), default=0.0)


def is_impossible(time_s: float, bound_s: float, *, device: str) -> bool:
    """Whether `time_s` is below the bound by more than the margin of this kind of device (`cuda`, `cpu`)."""
    return time_s * PEAK_MARGIN[device] < bound_s


def is_flat(work: float, time_s: float, more_work: float, more_time_s: float) -> bool:
    """Whether time grows with an exponent under 0.1 from `work` to `more_work`, at least eightfold."""
    if not all(map(positive, (work, time_s, more_work, more_time_s))) or more_work < FLAT_WORK * work:
        return False
    return math.log(more_time_s / time_s) < FLAT_EXPONENT * math.log(more_work / work)


def suspects(results: Iterable[BenchmarkResult]) -> list[BenchmarkResult]:
    """The rows of one block that earn the warning `suspect`: both ends of a stretch where time is flat.

    results: rows of one block that differ in length alone. Work is the FLOPs of a row, or its tokens where
    the block has no cost model. A launch-bound row is no evidence: its time is the host's.
    """
    rows = [r for r in results if r.ok and "launch_bound" not in r.warnings and positive(r.time_s)]
    found = {}
    for small in rows:
        for large in rows:
            if is_flat(_work(small), small.time_s, _work(large), large.time_s):
                found[id(small)], found[id(large)] = small, large
    return [r for r in rows if id(r) in found]


def mark_suspects(results: Iterable[BenchmarkResult]) -> None:
    """Give the warning `suspect` to rows that earn it, each block and setting by itself; take it from others."""
    groups: dict[tuple, list[BenchmarkResult]] = {}
    for result in results:
        key = (str(result.block_name), tuple(options_of(result).items()), setting(result))
        groups.setdefault(key, []).append(result)
    for rows in groups.values():
        due = {id(row) for row in suspects(rows)}
        for row in rows:
            warnings = {name for name in row.warnings if name != "suspect"} | ({"suspect"} if id(row) in due else set())
            row.warnings = sorted(warnings)


def _work(result: BenchmarkResult) -> float:
    if positive(result.flops):
        return float(result.flops)
    return float(result.batch_size * (1 if result.mode == "decode" else result.sequence_length))
