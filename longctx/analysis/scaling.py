"""How time and memory grow with length: a local slope on log-log axes, and the word for it.

A slope describes the lengths that were measured and is no law: launch overhead and weights flatten it at
short lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longctx.analysis.statistics import positive
from longctx.results import BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class LocalSlope:
    """Exponent k of y ~ T^k by least squares on logarithms, over `count` lengths, `shortest` to `longest`."""

    slope: float
    shortest: int
    longest: int
    count: int

    @property
    def word(self) -> str:
        """linear (0.85 to 1.15), quadratic (1.85 to 2.15), between, or below linear / above quadratic."""
        if self.slope < 0.85:
            return "below linear"
        if self.slope <= 1.15:
            return "linear"
        if self.slope < 1.85:
            return "between"
        return "quadratic" if self.slope <= 2.15 else "above quadratic"


def fit_slope(points: Iterable[tuple[float, float]]) -> LocalSlope | None:
    """Least-squares slope of log y over log x; points that are not positive and finite are left out.

    points: (length in tokens, y in any unit). None with fewer than two different lengths.
    """
    usable = [(x, y) for x, y in points if positive(x) and positive(y)]
    if len({x for x, _ in usable}) < 2:
        return None
    xs, ys = [math.log(x) for x, _ in usable], [math.log(y) for _, y in usable]
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    slope /= math.fsum((x - x_mean) ** 2 for x in xs)
    lengths = [int(x) for x, _ in usable]
    return LocalSlope(slope=slope, shortest=min(lengths), longest=max(lengths), count=len(set(lengths)))


def local_slope(
    results: Iterable[BenchmarkResult], value: Callable[[BenchmarkResult], float | None] = lambda r: r.time_s
) -> LocalSlope | None:
    """The local slope of one block's ok rows: of their time, or of what `value` reads from a row."""
    return fit_slope((r.sequence_length, value(r)) for r in results if r.ok)
