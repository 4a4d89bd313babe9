"""Which block is fastest at a length, and by how much: ratios of medians taken in the same round, and ranks.

A ratio is time / time of the base: below 1 is faster. Same-round ratios are free of the noise that all cells
of a round share (clocks, neighbours), so they are steadier than the times themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longctx.analysis.settings import setting
from longctx.analysis.statistics import middle_ratio, positive
from longctx.results import BenchmarkResult

BASE = "Dense"
"""The block against which ratios are given."""
SAME = 1.01
"""Figures closer than this are the same to a choice."""
LEVEL = 1.10
"""Rounds that contradict each other make blocks level up to this ratio; beyond it they make them only unsure."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Time over time of the base. low and high are the extremes over rounds, or value itself."""

    value: float
    low: float
    high: float
    rounds: int
    """Rounds that it was taken over; 0 when the rounds do not match and medians were divided instead."""


def ratio_over_rounds(result: BenchmarkResult, base: BenchmarkResult) -> Ratio | None:
    """Median over rounds of result's round median / base's median of the same round.

    A round that is missing on either side is left out; where no round matches (records without samples,
    files of another tool) the medians themselves are divided. None unless both are ok and have a time.
    """
    if not (result.ok and base.ok):
        return None
    pairs = [
        (positive(statistics.median(ours)), positive(statistics.median(theirs)))
        for ours, theirs in zip(kept_samples(result), kept_samples(base), strict=False)
        if ours and theirs
    ]
    ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
    if ratios:
        return Ratio(value=middle_ratio(ratios), low=min(ratios), high=max(ratios), rounds=len(ratios))
    ours, theirs = positive(result.time_s), positive(base.time_s)
    if ours is None or theirs is None:
        return None
    return Ratio(value=ours / theirs, low=ours / theirs, high=ours / theirs, rounds=0)


def ratio(result: BenchmarkResult, base: BenchmarkResult) -> float | None:
    """The value of `ratio_over_rounds`: below 1, `result` is the faster one."""
    found = ratio_over_rounds(result, base)
    return found.value if found else None


def kept_samples(result: BenchmarkResult) -> list[list[float]]:
    """The samples of each round that are times, whoever wrote the file."""
    return [[v for v in values if positive(v)] for values in result.samples or [] if isinstance(values, list)]


def comparable(result: BenchmarkResult) -> tuple:
    """What two rows must share to be compared: length, and what `settings.AXES` lists."""
    return (result.sequence_length, *setting(result))


def base_of(result: BenchmarkResult, results: Iterable[BenchmarkResult], name: str = BASE) -> BenchmarkResult | None:
    """The ok row of block `name` that `result` may be compared with, or None."""
    wanted = comparable(result)
    for other in results:
        if other.block_name == name and other.ok and comparable(other) == wanted:
            return other
    return None


def ratio_to(result: BenchmarkResult, results: Iterable[BenchmarkResult], name: str = BASE) -> Ratio | None:
    """The ratio of `result` to the row of block `name` that it may be compared with, None where there is none."""
    base = base_of(result, results, name)
    return ratio_over_rounds(result, base) if base else None


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A row of a ranking. place counts from 1; ratio is against the base, None where there is none. figure: what the
    rows of the ranking go by."""

    place: int
    result: BenchmarkResult
    ratio: Ratio | None
    figure: float


def rank(results: Iterable[BenchmarkResult], length: int, *, base: str = BASE) -> list[Ranked]:
    """The ok rows at `length`, fastest first, with their ratios to block `base`.

    They go by ratio where every row has one, as the steadier figure, else by time per token.
    """
    rows = [r for r in results if r.sequence_length == length and r.ok and positive(r.time_s)]
    bases = [base_of(row, rows, base) for row in rows]
    pairs = [(row, ratio_over_rounds(row, other) if other else None) for row, other in zip(rows, bases, strict=True)]
    by_ratio = all(found for _, found in pairs) and len({id(other) for other in bases}) == 1
    ranked = [(found.value if by_ratio else row.time_s / max(1, row.batch_size), row, found) for row, found in pairs]
    ranked.sort(key=lambda each: each[0])
    return [
        Ranked(place=place, result=row, ratio=found, figure=figure)
        for place, (figure, row, found) in enumerate(ranked, start=1)
    ]


def level_with_first(rows: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """The first of a ranking's rows, and those that the rounds do not tell from it."""
    first, *others = rows
    level = [first]
    for row in others:
        found = ratio_over_rounds(row, first)
        if found and (found.value < SAME or (found.value < LEVEL and found.rounds > 1 and found.low < 1)):
            level.append(row)
    return level
