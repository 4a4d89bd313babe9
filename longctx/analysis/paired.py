"""Which of two sides that were sampled in turns is faster: ratios of samples that stand next to each other.

A ratio is ours / theirs: below 1 we are faster. Within a round the median of all ratios is taken, over rounds, which
are fresh processes, the median of those: what slows the machine meets both ends of a pair, what one process has of its
own (where its memory lies) differs from round to round.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.analysis.settings import in_words, setting, varying
from longctx.analysis.statistics import median_ci95, middle_ratio, positive
from longctx.config import AGAINST_ROUNDS
from longctx.results import BenchmarkResult

GUARD = {"cpu": 0.03, "cuda": 0.01}
"""What is called no difference. Equal code in two processes differs by this much for reasons of their own."""

NEAREST = 1 / 3
"""Part of the distance from 1 by which the nearer end of the interval, so every one of five rounds, must lie on that
side. By simulation, of equal sides at most 3 in 100 then look different by chance however widely their rounds spread,
and 4 in 1000 if rounds have a standard deviation as large as the guard."""

VERDICTS = ("faster", "slower", "same", "inconclusive", "not ok")
"""What can be said of our side."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What became of a pair. ratio is None when it is not ok, or has no samples; low and high are its interval."""

    verdict: str
    reason: str | None
    """Why it is inconclusive or not ok, in words."""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    """With which the interval holds the ratio: 94% for the extremes of five rounds, 95% or more from six on."""
    rounds: tuple[float, ...] = ()
    """The ratio of each round."""
    pairs: int = 0
    guard: float


@dataclass(frozen=True, kw_only=True)
class PairedCell:
    """Both rows of a cell, and the verdict on ours."""

    ours: BenchmarkResult
    theirs: BenchmarkResult
    outcome: Paired

    @property
    def regressed(self) -> bool:
        """Whether ours is slower, or fails where theirs does not."""
        return self.outcome.verdict == "slower" or (self.theirs.ok and not self.ours.ok)

    def to_json(self) -> dict[str, Any]:
        outcome = dataclasses.asdict(self.outcome)
        times = {"time_s": self.ours.time_s, "against_time_s": self.theirs.time_s}
        names = {"block_name": self.ours.block_name, "against": self.theirs.block_name}
        setting = {"mode": self.ours.mode, "dtype": self.ours.dtype, "batch_size": self.ours.batch_size}
        return names | {"sequence_length": self.ours.sequence_length} | times | setting | outcome


def judge(ours: BenchmarkResult, theirs: BenchmarkResult, *, guard: float | None = None) -> PairedCell:
    """The verdict on two rows of a sweep with --against. guard: a share, 0.03 for 3%; None: what suits the device."""
    if guard is None:
        guard = GUARD["cuda" if ours.environment.get("gpu") else "cpu"]
    failed = next((row for row in (ours, theirs) if not row.ok), None)
    if failed is None:
        outcome = judge_samples(ours.samples, theirs.samples, guard=guard)
    else:
        outcome = Paired(verdict="not ok", reason=f"{failed.block_name} is {failed.status}", guard=guard)
    return PairedCell(ours=ours, theirs=theirs, outcome=outcome)


def judge_saved(results: Sequence[BenchmarkResult]) -> list[PairedCell]:
    """The verdict on every pair in the file of a sweep with --against; none in any other."""
    by_place = {(row.block_name, setting(row), row.sequence_length): row for row in results}
    cells = []
    for row in results:
        asked = row.config.get("against") if isinstance(row.config, Mapping) else None
        if isinstance(asked, Mapping) and asked.get("opponent"):
            theirs = by_place.get((asked["opponent"], setting(row), row.sequence_length))
            if theirs is not None:
                cells.append(judge(row, theirs, guard=positive(asked.get("guard"))))
    return cells


def judge_samples(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, guard: float) -> Paired:
    """The verdict on samples in seconds, one list a round, those in the same place taken next to each other."""
    pairs = [
        [a / b for a, b in zip(*both, strict=False) if positive(a) and positive(b)]
        for both in zip(ours, theirs, strict=False)
    ]
    rounds = tuple(statistics.median(ratios) for ratios in pairs if ratios)
    if not rounds:
        return Paired(verdict="inconclusive", reason="there are no samples", guard=guard)
    low, high, confidence = interval(rounds)
    verdict, reason = _verdict(rounds, low, high, guard)
    return Paired(
        verdict=verdict,
        reason=reason,
        ratio=middle_ratio(rounds),
        low=low,
        high=high,
        confidence=confidence,
        rounds=rounds,
        pairs=sum(map(len, pairs)),
        guard=guard,
    )


def interval(rounds: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, confidence) of the median: exact from order statistics, the extremes where 95% are out of reach."""
    if exact := median_ci95(rounds):
        return *exact, 0.95
    return min(rounds), max(rounds), 1 - 0.5 ** (len(rounds) - 1)


def _verdict(rounds: Sequence[float], low: float, high: float, guard: float) -> tuple[str, str | None]:
    if len(rounds) < AGAINST_ROUNDS:
        return "inconclusive", f"{len(rounds)} round{'' if len(rounds) == 1 else 's'}; it takes {AGAINST_ROUNDS}"
    if 1 / (1 + guard) <= low and high <= 1 + guard:
        return "same", None
    # The same distance either way: as many times faster as slower.
    middle = middle_ratio(rounds)
    slower = middle > 1
    middle, near = (middle, low) if slower else (1 / middle, 1 / high)
    if middle - 1 <= guard:
        return "inconclusive", f"the difference is within {guard:.1%}, but not in every round"
    if near - 1 <= NEAREST * (middle - 1):
        return "inconclusive", "the rounds do not agree"
    return "slower" if slower else "faster", None


def sentence(cells: Sequence[PairedCell]) -> str:
    """One sentence on all pairs: the one there is, or how many ended how and where the difference is largest."""
    if len(cells) == 1:
        return _of_one(cells[0])
    counts = {verdict: sum(cell.outcome.verdict == verdict for cell in cells) for verdict in VERDICTS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    told = [cell for cell in cells if cell.outcome.verdict in ("faster", "slower")]
    if not told:
        return f"Of {len(cells)} cells: {said}."
    most = max(told, key=lambda cell: abs(math.log(cell.outcome.ratio)))
    place = f"{most.ours.block_name} at {most.ours.sequence_length:,} tokens"
    if axes := varying(cell.ours for cell in cells):
        place += f" ({in_words(most.ours, axes)})"
    return f"Of {len(cells)} cells: {said}. The largest difference: {place}, {most.outcome.ratio:.3f}x."


def _of_one(cell: PairedCell) -> str:
    outcome, name, other = cell.outcome, cell.ours.block_name, cell.theirs.block_name
    place = f"At {cell.ours.sequence_length:,} tokens"
    if outcome.verdict == "not ok":
        return f"{place} {name} and {other} cannot be compared: {outcome.reason}."
    if outcome.ratio is None:
        return f"{place} {name} and {other} cannot be told apart: {outcome.reason}."
    figures = (
        f"{outcome.ratio:.3f}x the time ({outcome.low:.3f} to {outcome.high:.3f} over {len(outcome.rounds)} rounds)"
    )
    match outcome.verdict:
        case "same":
            return f"{place} {name} is as fast as {other} to within {outcome.guard:.1%}: {figures}."
        case "inconclusive":
            more = "more rounds may tell" if len(outcome.rounds) >= AGAINST_ROUNDS else "raise --rounds"
            return f"{place} {name} takes {figures} of {other}, which is inconclusive: {outcome.reason}; {more}."
        case verdict:
            return f"{place} {name} is {verdict} than {other}: {figures}."
