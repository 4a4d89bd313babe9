"""How far one group of rounds lies from another: the Hodges-Lehmann ratio and its exact interval.

Seconds in, quotients out. No distribution is assumed: the interval counts in how many orders the two groups could
have come, had they been drawn alike (Mann-Whitney).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MOST_EXACT = 50
"""Values a side up to which the distribution is counted out; beyond, the normal one is less than a rank away."""
MOST_VALUES = 500
"""Values a side that are paired with each other. A sweep never has so many; a stranger's file may."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """New over base: the median of all pairwise ratios, and the interval that holds it with `confidence`.

    The interval has at least 95% where there are values enough, else it is the widest that there is. One value on
    either side gives none.
    """

    ratio: float
    low: float | None
    high: float | None
    confidence: float | None


def shift_between(base: Sequence[float], new: Sequence[float]) -> Shift | None:
    """The shift from `base` to `new`, positive values of one unit. None if a side is empty."""
    if not base or not new:
        return None
    first, second = _thinned(base), _thinned(new)
    ratios = np.sort((second[:, None] / first[None, :]).ravel())
    rank, confidence = interval_rank(len(first), len(second))
    ratio = float(np.median(ratios))
    if rank is None:
        return Shift(ratio=ratio, low=None, high=None, confidence=None)
    return Shift(ratio=ratio, low=float(ratios[rank - 1]), high=float(ratios[-rank]), confidence=confidence)


def _thinned(values: Sequence[float]) -> np.ndarray:
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered) <= MOST_VALUES:
        return ordered
    # Evenly spaced order statistics keep the shape of the whole.
    return ordered[np.linspace(0, len(ordered) - 1, MOST_VALUES).round().astype(int)]


@functools.lru_cache(maxsize=256)
def interval_rank(n: int, m: int) -> tuple[int | None, float | None]:
    """(k, confidence): the k-th smallest and the k-th largest of the n * m ratios bound the interval.

    k is the largest with at least 95%, else 1. (None, None) for one value on either side.
    """
    if n * m < 2:
        return None, None
    if max(n, m) > MOST_EXACT:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        return max(1, math.floor(n * m / 2 - 1.96 * deviation)), CONFIDENCE
    # Of n * m pairs, at most k - 1 lie the wrong way round.
    miss = 2 * np.cumsum(_orders(n, m))
    rank = max(1, int(np.searchsorted(miss, 1 - CONFIDENCE, side="right")))
    return rank, max(0.0, float(1 - miss[rank - 1]))


def _orders(n: int, m: int) -> np.ndarray:
    """Probability of each value 0 ... n * m of Mann-Whitney's U when both groups are drawn alike."""
    row = [np.ones(1) for _ in range(m + 1)]
    for i in range(1, n + 1):
        above, row = row, [np.ones(1)]
        for j in range(1, m + 1):
            # The largest of all is one of the i, and then above all j, or it is one of the j.
            both = np.zeros(i * j + 1)
            both[j:] += above[j] * i / (i + j)
            both[: i * (j - 1) + 1] += row[j - 1] * j / (i + j)
            row.append(both)
    return row[m]
