"""The best block of each length by time, memory and energy, and the blocks that no other beats in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from longctx.analysis.ranking import SAME, Ranked, level_with_first
from longctx.analysis.series import METRICS
from longctx.analysis.statistics import positive
from longctx.analysis.summary import rankings
from longctx.results import BenchmarkResult

REFERENCE = "Identity"
"""It does not mix, so it is no choice."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """Who is best at one length, and in one setting. The first name is the best, others are level with it."""

    length: int
    setting: str
    time: list[str]
    memory: list[str]
    energy: list[str]
    """Empty where no row has joules."""
    pareto: list[str]
    """Fastest first: no other block has both less time and less peak memory."""


def best_blocks(results: Iterable[BenchmarkResult]) -> list[Best]:
    """One entry for every length and setting at which two blocks can be compared."""
    found = []
    for ranking in rankings(results):
        choices = [ranked for ranked in ranking.rows if ranked.result.block_name != REFERENCE]
        if len(choices) < 2:
            continue
        rows = [ranked.result for ranked in choices]
        found.append(
            Best(
                length=ranking.length,
                setting=ranking.setting,
                time=_names(level_with_first(rows)),
                memory=_names(_least(rows, METRICS["memory"].value)),
                energy=_names(_least(rows, lambda r: positive(r.joules_per_token))),
                pareto=_names(_undominated(choices)),
            )
        )
    return found


def _names(rows: Iterable[BenchmarkResult]) -> list[str]:
    return list(dict.fromkeys(str(row.block_name) for row in rows))


def _least(rows: Sequence[BenchmarkResult], value: Callable[[BenchmarkResult], float | None]) -> list[BenchmarkResult]:
    known = sorted(((found, i) for i, row in enumerate(rows) if (found := value(row)) is not None))
    return [rows[i] for found, i in known if found <= SAME * known[0][0]]


def _undominated(choices: Sequence[Ranked]) -> list[BenchmarkResult]:
    """By what the ranking goes by, fastest first."""
    figures = [(ranked.result, ranked.figure, METRICS["memory"].value(ranked.result)) for ranked in choices]
    known = [(row, time, peak) for row, time, peak in figures if peak]

    def beaten(time: float, peak: float) -> bool:
        return any(t <= time and p <= peak and (time > SAME * t or peak > SAME * p) for _, t, p in known)

    return [row for row, time, peak in known if not beaten(time, peak)]
