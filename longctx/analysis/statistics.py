"""The few statistics that a table rests on: medians over rounds, exact intervals, and when a number is noisy.

Standard library only, cheap enough to be called between two samples. Samples are seconds, one list a round.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

MIN_CI_SAMPLES = 6
"""With fewer samples no pair of order statistics holds the median with 95% probability."""

UNSTABLE_CI = 0.05
UNSTABLE_ROUNDS = 0.10
UNSTABLE_QUARTILES = 0.20


def positive(value: object) -> float | None:
    """`value` as a float if it is a number between 1e-30 and 1e30, else None.

    Results files may hold anything; no measured quantity lies outside, and arithmetic inside cannot overflow.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        return None
    return float(value)


def median(values: Iterable[float]) -> float | None:
    """The median, or None of nothing."""
    values = list(values)
    return statistics.median(values) if values else None


def round_medians(samples: Iterable[Sequence[float]]) -> list[float]:
    """The median of each round that has samples."""
    return [statistics.median(values) for values in samples if values]


def round_median(samples: Iterable[Sequence[float]]) -> float | None:
    """The median over rounds of each round's median: the value of a cell. None without samples."""
    return median(round_medians(samples))


@functools.lru_cache(maxsize=4096)
def _ci95_rank(n: int) -> int | None:
    """Largest k with P(median between the k-th smallest and the k-th largest of n) >= 95%, or None."""
    if n < MIN_CI_SAMPLES:
        return None
    # Twice the lower binomial tail is the miss probability. Far below the middle the terms are under 1e-30.
    start = max(0, int(n / 2 - 6 * math.sqrt(n)))
    tail = 0.0
    for k in range(start, n // 2 + 1):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * tail > 0.05:
            return k or None
    return n // 2


def median_ci95(values: Iterable[float]) -> list[float] | None:
    """[low, high]: exact 95% interval of the median from order statistics (binomial), None under 6 samples.

    No distribution is assumed, only that the samples are drawn alike and apart.
    """
    values = sorted(values)
    rank = _ci95_rank(len(values))
    return [values[rank - 1], values[-rank]] if rank else None


def middle_ratio(ratios: Iterable[float]) -> float:
    """The median of ratios, of two in the middle their geometric mean: the inverse of that of the inverse ratios."""
    return math.exp(statistics.median(map(math.log, ratios)))


def relative_half_width(values: Iterable[float]) -> float | None:
    """Half the 95% interval of the median over the median. None under 6 samples or at median 0."""
    values = list(values)
    interval, middle = median_ci95(values), median(values)
    if interval is None or not middle:
        return None
    return (interval[1] - interval[0]) / (2 * abs(middle))


def spread(values: Iterable[float]) -> float | None:
    """(largest - smallest) / median: how far apart rounds are. None under two values or at median 0."""
    values = list(values)
    middle = median(values)
    if len(values) < 2 or not middle:
        return None
    return (max(values) - min(values)) / abs(middle)


def spread_within(samples: Iterable[Sequence[float]]) -> float | None:
    """How well one round knows its own median: half its 95% interval over it, the median over rounds. None where no
    round has 6 samples."""
    return median(width for values in samples if (width := relative_half_width(values)) is not None)


def spread_between(samples: Iterable[Sequence[float]]) -> float | None:
    """How far rounds, each a process of its own, are apart: half the range of their medians over the median. None
    under two rounds."""
    found = spread(round_medians(samples))
    return None if found is None else found / 2


def quartile_spread(values: Iterable[float]) -> float | None:
    """(upper quartile - lower quartile) / median. None under 6 samples or at median 0.

    Two modes far apart show here even when one of them holds the median firmly.
    """
    values = list(values)
    middle = median(values)
    if len(values) < MIN_CI_SAMPLES or not middle:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / abs(middle)


def is_unstable(samples: Iterable[Sequence[float]]) -> bool:
    """Whether the warning `unstable` is due: the samples disagree by more than a table should hide.

    Any of: 95% interval of the median wider than +-5%; round medians more than 10% apart; the middle half of
    a round's samples spread over more than 20%. Too few samples to tell is not unstable.
    """
    rounds = [list(values) for values in samples if values]
    pooled = [value for values in rounds for value in values]
    widths = [relative_half_width(pooled), *(quartile_spread(values) for values in rounds)]
    limits = [UNSTABLE_CI, *(UNSTABLE_QUARTILES for _ in rounds)]
    widths.append(spread(round_medians(rounds)))
    limits.append(UNSTABLE_ROUNDS)
    return any(width is not None and width > limit for width, limit in zip(widths, limits, strict=True))
