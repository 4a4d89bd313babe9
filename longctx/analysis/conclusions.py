"""What a run says, in one to four sentences: who is fastest, from where on, how it grows, what it costs in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longctx.analysis.best import Best, best_blocks
from longctx.analysis.crossover import Crossover, against_base
from longctx.analysis.curves import Growth, curves, growths
from longctx.analysis.laws import Law
from longctx.analysis.ranking import BASE
from longctx.analysis.series import METRICS
from longctx.analysis.settings import by_mode, in_words, setting, varying
from longctx.analysis.summary import FRAME, Ranking, headline, longest_ranking, rankings
from longctx.results import BenchmarkResult

MOST_SETTINGS = 6
"""Settings of a mode on each of which a sentence is said."""


@dataclass(frozen=True, kw_only=True)
class Conclusions:
    """All that was derived from the rows of one mode of a run."""

    growths: list[Growth]
    crossovers: list[Crossover]
    best: list[Best]
    sentences: list[str]


def conclude_modes(results: Iterable[BenchmarkResult]) -> dict[str, Conclusions]:
    """mode -> what its rows say, each mode by itself."""
    return {mode: conclude(rows) for mode, rows in by_mode(results).items()}


def conclude(results: Sequence[BenchmarkResult]) -> Conclusions:
    """Laws, crossovers against Dense, best blocks and the summary of rows of one mode."""
    found = growths(curves(results))
    crossings, best = against_base(found), best_blocks(results)
    untold = _untold(found, crossings)
    settings: dict[tuple, list[BenchmarkResult]] = {}
    for row in results:
        # A row that failed early does not know its setting.
        if row.ok:
            settings.setdefault(setting(row), []).append(row)
    if len(settings) < 2:
        said = sentences(results, found, crossings, best, untold)
    else:
        axes = varying(row for rows in settings.values() for row in rows)
        lines = [headline(rows, where=in_words(rows[0], axes), untold=untold) for rows in settings.values()]
        said = [line for line in lines if line]
        if len(said) > MOST_SETTINGS:
            said = [*said[:MOST_SETTINGS], f"{len(said) - MOST_SETTINGS} more settings are in the tables."]
    return Conclusions(growths=found, crossovers=crossings, best=best, sentences=said)


def sentences(
    results: Sequence[BenchmarkResult],
    found: Sequence[Growth],
    crossings: Sequence[Crossover],
    best: Sequence[Best],
    untold: Sequence[BenchmarkResult] = (),
) -> list[str]:
    """At most four sentences; none where nothing can be compared. untold: as `headline`."""
    first, last = headline(results, untold=untold), longest_ranking(results)
    if first is None or last is None:
        return []
    # The headline's doubt is a sentence of its own and closes the summary.
    first, _, doubt = first.partition(" Not a firm result: ")
    said = [first]
    mixing = [row.result for row in last.rows if row.result.block_name not in FRAME]
    winner = next((g for g in found if any(row is mixing[0] for row in g.curve.rows.values())), None)
    if winner is not None:
        crossing = next((c for c in crossings if c.a == winner.curve.name), None)
        if not any(row.result.block_name == BASE for row in last.rows):
            said += filter(None, [_where_both_were(results, last, winner.curve.block)])
        said += [text for text in (_crossing(crossing), _growing(winner, found, BASE)) if text]
    lean = next((b for b in best if b.length == last.length and b.setting == last.setting), None)
    leaner = _memory([row.result for row in last.rows], lean) if lean else None
    if leaner:
        said.append(leaner)
    if doubt:
        said = [*said[:3], f"This is not a firm result: {doubt}"]
    return said[:4]


def _untold(found: Sequence[Growth], crossings: Sequence[Crossover]) -> list[BenchmarkResult]:
    """The rows at whose length the noise hides which of the block and Dense is faster."""
    hidden = {crossing.a: crossing.untold for crossing in crossings}
    return [g.curve.rows[t] for g in found for t in hidden.get(g.curve.name, ()) if t in g.curve.rows]


def about(length: float, decimals: int | None = None) -> str:
    """A length that was not measured, to two digits or with `decimals` places: `13K`, `6.8K`, `900`."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size:
            value = length / size
            places = (0 if value >= 9.95 else 1) if decimals is None else decimals
            return f"{value:.{places}f}{letter}"
    return f"{length:.0f}"


def about_range(low: float, high: float | None) -> str:
    """An interval of lengths, with as many digits as tell its ends apart: `12K to 14K`, `31.8K to 32.3K`."""
    if high is None:
        return f"{about(low)} or more"
    for decimals in (None, 1, 2):
        ends = about(low, decimals), about(high, decimals)
        if ends[0] != ends[1]:
            return f"{ends[0]} to {ends[1]}"
    return ends[0]


def _crossing(crossing: Crossover | None) -> str | None:
    if crossing is None or crossing.at is None or not crossing.faster_after:
        return None
    words = [] if crossing.low is None else [f"95%: {about_range(crossing.low, crossing.high)}"]
    words += ["of one round"] if crossing.one_round else []
    range_ = f" ({', '.join(words)})" if words else ""
    if crossing.extrapolated:
        return f"Its law would have it overtake {BASE} at about {about(crossing.at)} tokens{range_}, beyond the range."
    return f"It overtakes {BASE} at about {about(crossing.at)} tokens{range_}."


def _where_both_were(results: Sequence[BenchmarkResult], last: Ranking, block: str) -> str | None:
    """How the block and Dense compare at the longest length that Dense reached, if that is not the last one."""
    for ranking in reversed(rankings(results)):
        found = {row.result.block_name: row.ratio for row in ranking.rows} if ranking.setting == last.setting else {}
        if BASE in found and found.get(block):
            value = found[block].value
            than = f"{1 / value:.2f}x faster than" if value < 1 else f"at {value:.2f}x the time of"
            return f"At {ranking.length:,}, the longest that {BASE} has here, it is {than} {BASE}."
    return None


def _growing(winner: Growth, found: Sequence[Growth], base: str) -> str | None:
    """How the winner's time and Dense's grow. A local slope says over which range, and claims no more."""
    dense = next((g for g in found if g.curve.block == base and g.curve.setting == winner.curve.setting), None)
    if winner.time is None:
        if winner.said.endswith("launch-bound"):
            text = f"Its times are {winner.said}, and launching kernels says nothing of how it grows"
            return text + (f"; add {_listed(winner.missing)}." if winner.missing else ".")
        return None
    text = f"The time of {winner.curve.block} grows as {_exponent(winner.time)}"
    if dense and dense is not winner and dense.time:
        text += f", {base}'s as {_exponent(dense.time)}"
    if not winner.time.is_law:
        text += f", from {_exact(winner.time.shortest)} to {_exact(winner.time.longest)} alone"
    return text + "."


def _exponent(law: Law) -> str:
    return f"T^{law.exponent:.2f} ({law.word})"


def _listed(lengths: Sequence[int]) -> str:
    words = list(map(_exact, lengths))
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _exact(length: int) -> str:
    """A length that was or will be measured: `1K`, `1M`, `1.5K`, `900`."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size and length % size == 0:
            return f"{length // size}{letter}"
    return about(length)


def _memory(rows: Sequence[BenchmarkResult], best: Best) -> str | None:
    """Who needs least memory at the longest length, and how much less than Dense."""
    name = next(iter(best.memory), None)
    if name is None or BASE in best.memory:
        return None
    peaks = [(str(row.block_name), METRICS["memory"].value(row)) for row in rows]
    least = min((peak for block, peak in peaks if block == name and peak), default=None)
    base = min((peak for block, peak in peaks if block == BASE and peak), default=None)
    if least is None or base is None:
        return None
    needs = "carries the smallest state" if rows[0].mode == "decode" else "needs the least memory there"
    return f"{name} {needs}, {least / base:.2g} of {BASE}'s."
