"""What a finished run says: ranking per length, local slopes, rows without a result, and one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longctx.analysis.ranking import BASE, Ranked, comparable, level_with_first, rank
from longctx.analysis.scaling import LocalSlope, fit_slope
from longctx.analysis.series import METRICS, collect
from longctx.analysis.settings import in_words, varying
from longctx.results import BenchmarkResult

DOUBTFUL = ("contended", "mixes_batch", "suspect", "throttled", "unstable")
"""Warnings under which a figure should not be quoted."""

FRAME = (BASE, "Identity")
"""The cost to beat and the cost that no mixer can beat: they frame a table and are no recommendation."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The ok rows of one length that may be compared with each other, fastest first."""

    length: int
    setting: str
    """What distinguishes this group from others of the same length, in words; empty if there is only one."""
    rows: list[Ranked]


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """Local slopes of one curve: exponents of time and of peak memory over the lengths measured."""

    name: str
    time: LocalSlope | None
    memory: LocalSlope | None


def rankings(results: Iterable[BenchmarkResult]) -> list[Ranking]:
    """A ranking for every length, shortest first, and within it for every setting that cannot be mixed."""
    groups: dict[tuple, list[BenchmarkResult]] = {}
    for result in results:
        groups.setdefault(comparable(result), []).append(result)
    found = {key: ranked for key, rows in groups.items() if (ranked := rank(rows, key[0]))}
    axes = varying(row.result for ranked in found.values() for row in ranked)
    return [
        Ranking(length=key[0], setting=in_words(ranked[0].result, axes), rows=ranked)
        for key, ranked in sorted(found.items(), key=lambda item: item[0][0])
    ]


def slopes(results: Sequence[BenchmarkResult]) -> list[Slopes]:
    """The local slopes of every curve with at least two ok lengths, in the order of the results."""
    runs = {"": results}
    times, memories = (
        {curve.name: fit_slope(curve.points) for curve in collect(runs, METRICS[name])[0]}
        for name in ("time", "memory")
    )
    names = dict.fromkeys([*times, *memories])
    rows = [Slopes(name=name, time=times.get(name), memory=memories.get(name)) for name in names]
    return [row for row in rows if row.time or row.memory]


def problems(results: Iterable[BenchmarkResult]) -> list[tuple[BenchmarkResult, str]]:
    """The rows that are not ok, each with its reason in words."""
    return [(result, reason(result)) for result in results if not result.ok]


def reason(result: BenchmarkResult) -> str:
    """Why a row is not ok: what the gate said, else the error's message, else nothing."""
    gate = result.gate if isinstance(result.gate, dict) else {}
    error = result.error if isinstance(result.error, dict) else {}
    said = (gate.get("reason") if gate.get("passed") is False else None) or error.get("message") or ""
    lines = str(said).strip().splitlines()
    return lines[0] if lines else ""


def longest_ranking(results: Iterable[BenchmarkResult]) -> Ranking | None:
    """The ranking at the longest length that several blocks reached, or None where nothing can be compared."""
    found = [r for r in rankings(results) if len(r.rows) > 1]
    return max(found, key=lambda r: r.length) if found else None


def headline(
    results: Sequence[BenchmarkResult], *, where: str = "", untold: Sequence[BenchmarkResult] = ()
) -> str | None:
    """One sentence on the longest length that several blocks reached, or None where nothing can be compared.

    The winner is the fastest block that mixes: Identity frames the table and does not compete. where: the setting of
    the rows in words, when there are others. untold: rows whose time the noise hides from Dense's, as the crossovers
    have it, which pool the scatter of all lengths.
    """
    last = longest_ranking(results)
    if last is None:
        return None
    rows = [row for row in last.rows if row.result.block_name not in FRAME]
    dense = next((row for row in last.rows if row.result.block_name == BASE), None)
    if not rows:
        return None
    best = rows[0]
    place = f"{'After' if best.result.mode == 'decode' else 'At'} {last.length:,} tokens"
    place += f", {where}," if where else ""
    level = list(dict.fromkeys(str(row.block_name) for row in level_with_first([row.result for row in rows])))
    sentence = f"{place} {level[0]} is the fastest mixing block"
    if len(level) > 1:
        sentence = f"{place} {', '.join(level[:-1])} and {level[-1]} are level, the fastest mixing blocks"
    if best.ratio and dense:
        value = best.ratio.value
        unsure = any(row is best.result for row in untold) and not 0.98 <= value <= 1.02
        if unsure or (best.ratio.rounds > 1 and best.ratio.low < 1 < best.ratio.high):
            said = f"but {best.ratio.rounds} rounds do" if best.ratio.rounds > 1 else "but one round does"
            if value > 1.02:
                sentence = f"{place} {BASE} is ahead of every other block, {said} not tell it from the next, "
                sentence += str(best.result.block_name)
            else:
                sentence += f", {said} not tell {'it' if len(level) == 1 else level[0]} from {BASE}"
        elif value < 0.98:
            sentence += f", {1 / value:.2f}x faster than {BASE}"
        elif value > 1.02:
            sentence = f"{place} {BASE} is faster than every other block; the next, "
            sentence += f"{best.result.block_name}, takes {value:.2f}x its time"
        else:
            sentence += f", level with {BASE}"
    doubts = {w for row in (best, dense) if row for w in row.result.warnings if w in DOUBTFUL}
    return sentence + "." + (f" Not a firm result: {', '.join(sorted(doubts))}." if doubts else "")
