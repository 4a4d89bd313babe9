"""The roofline: what a block's work per byte lets this machine reach, and what it reached (Williams et al. 2009,
doi 10.1145/1498765.1498785). FLOPs and bytes are those of the cost models. SI units throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from longctx.analysis.series import names_of
from longctx.analysis.statistics import positive
from longctx.results import BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class RoofPoint:
    """One row. intensity: FLOPs per byte. rate: FLOPs per second. least_s: what its work needs at the peaks."""

    name: str
    length: int
    intensity: float
    rate: float
    time_s: float
    least_s: float | None
    fraction: float | None
    """least_s over the time: 1 is the roof itself."""
    row: BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The most that a machine was seen to do with one number format: FLOPs and bytes per second."""

    flops: float
    bytes: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on products and not copies are the limit."""
        return self.flops / self.bytes

    def at(self, intensity: float) -> float:
        """FLOPs per second that are possible with so many FLOPs per byte."""
        return min(self.flops, intensity * self.bytes)


def roof_points(results: Iterable[BenchmarkResult]) -> list[RoofPoint]:
    """The ok rows that have a time and a cost model, in their order."""
    results = list(results)
    points = []
    for row, name in zip(results, names_of(results), strict=True):
        time_s, flops, moved = positive(row.time_s), positive(row.flops), positive(row.bytes)
        if not (row.ok and time_s and flops and moved):
            continue
        fraction = positive(row.roofline_fraction)
        points.append(
            RoofPoint(
                name=name,
                length=row.sequence_length,
                intensity=flops / moved,
                rate=flops / time_s,
                time_s=time_s,
                least_s=fraction and fraction * time_s,
                fraction=fraction,
                row=row,
            )
        )
    return points


def longest_points(results: Iterable[BenchmarkResult]) -> list[RoofPoint]:
    """The point of every curve at its longest length."""
    last: dict[str, RoofPoint] = {}
    for point in roof_points(results):
        if point.name not in last or point.length >= last[point.name].length:
            last[point.name] = point
    return list(last.values())


def machines(results: Iterable[BenchmarkResult]) -> list[Mapping[str, Any]]:
    """The environments of the rows that have a point, one for each machine, thread count and torch."""
    found: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in results:
        if roof_points([row]) and isinstance(row.environment, Mapping):
            name = ("gpu", "cpu", "threads", "torch") if not row.environment.get("gpu") else ("gpu", "torch")
            found.setdefault(tuple(str(row.environment.get(key)) for key in name), row.environment)
    return list(found.values())
