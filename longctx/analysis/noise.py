"""How much a point of a curve is worth: its variance from the rounds, and the quantiles that intervals are made of.

Relative, on logarithms: a figure may be of any unit. Where rounds are few, what all lengths say together counts.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence

from longctx.analysis.statistics import positive

LEAST_NOISE = 1e-4
"""Relative; memory repeats to the byte, and a law is no better than its model."""


def clean_rounds(rounds: object) -> list[list[float]]:
    """The rounds that have positive samples."""
    if not isinstance(rounds, list | tuple):
        return []
    kept = [[v for v in values if positive(v)] for values in rounds if isinstance(values, list | tuple)]
    return [values for values in kept if values]


def steadied(points: Mapping[int, float], samples: Mapping[int, list[list[float]]]) -> dict[int, float]:
    """Medians over rounds that first lose what all lengths of a round share, where all have the same rounds.

    Else the round in the middle would be the same at all lengths, and its noise that of one round alone.
    """
    import numpy as np

    counts = {len(values) for values in samples.values()}
    if len(points) < 3 or counts != {max(counts, default=0)} or max(counts) < 3:
        return dict(points)
    logs = np.log([[statistics.median(values) for values in samples[t]] for t in points])
    shared = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
    steady = np.exp(np.median(logs - shared, axis=1))
    # Samples that have nothing to do with the figure of their record do not replace it.
    return {t: float(v) if 0.5 < v / points[t] < 2 else points[t] for t, v in zip(points, steady, strict=True)}


def median_factor(count: int) -> float:
    """Variance of the median of `count` normal values over that of their mean."""
    return {1: 1.0, 2: 1.0, 3: 1.35, 4: 1.19, 5: 1.43}.get(count, math.pi / 2 if count > 8 else 1.45)


def point_variance(lengths: Sequence[int], samples: Mapping[int, list[list[float]]]) -> tuple[float, int] | None:
    """Relative variance of a point and its degrees of freedom, from the rounds; with one round, from its samples.

    What all lengths of a round share (clocks, neighbours) moves the whole curve and is no noise of its slope.
    """
    import numpy as np

    logs = [np.log([statistics.median(values) for values in samples.get(t, [])]) for t in lengths]
    counts = [len(values) for values in logs]
    if min(counts) >= 1 and max(counts) >= 2:
        away = [values - np.mean(values) for values in logs]
        df = sum(counts) - len(counts)
        if len(set(counts)) == 1 and len(lengths) > 1:
            matrix = np.array(away)
            away = list(matrix - np.mean(matrix, axis=0))
            df -= counts[0] - 1
        share = sum(median_factor(c) / c for c in counts) / len(counts)
        return (sum(float(np.sum(v**2)) for v in away) / df * share, df) if df > 0 else None
    variances, df = [], 0
    for t in lengths:
        pooled = [value for values in samples.get(t, []) for value in values]
        if len(pooled) < 2:
            return None
        spread = float(np.var(np.log(pooled), ddof=1))
        variances.append(spread * median_factor(len(pooled)) / len(pooled))
        df += len(pooled) - 1
    return sum(variances) / len(variances), df


def pooled(least: float, df: int, known: tuple[float, int] | None) -> tuple[float, int]:
    """(variance of a point, degrees of freedom) from the fit's residuals and what the rounds say.

    They are pooled unless the residuals are too large for that noise: cells that differ from round to round less
    than from the law (one process for each, or another law) have only the residuals.
    """
    if known is None:
        return max(least / df, LEAST_NOISE**2), df
    variance = max(known[0], LEAST_NOISE**2)
    if least / variance > chi2(df, 1.645):
        return least / df, df
    return (least + variance * known[1]) / (df + known[1]), df + known[1]


@functools.cache
def student(df: float, outside: float = 0.05) -> float:
    """The two-sided quantile of Student's t that leaves `outside` beyond it. df: whole, or infinite."""
    df = int(min(df, 1000))  # further ones are normal to three digits
    low, high = 0.0, 1.0
    while _within(high, df) < 1 - outside:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 1 - outside else (low, middle)
    return high


def _within(t: float, df: int) -> float:
    """The probability that Student's t lies within -t to t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cosine, odd = math.cos(angle), df % 2
    term = total = cosine if odd else 1.0
    for step in range(2 + odd, df - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    if odd:
        return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))
    return math.sin(angle) * total


def chi2(df: int, z: float) -> float:
    """The quantile of chi-squared at the normal quantile z (Wilson and Hilferty)."""
    return df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3
