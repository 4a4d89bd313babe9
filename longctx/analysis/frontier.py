"""The longest context that fits: where a search for it goes next, and what the lengths that it tried say.

Doubling finds a length that fits and one that does not; then the gap is closed, first where the memory measured so far
says that the limit is, then by halves. Lengths in tokens, memory in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from longctx.analysis.laws import Law, fit
from longctx.analysis.series import METRICS, names_of
from longctx.analysis.statistics import positive
from longctx.results import MIB, BenchmarkResult

START_LENGTH = 1024
RESOLUTION = 0.05
CPU_SHARE = 0.9
"""Of the free memory of a machine: what a length that is tried on its CPU may need. The rest keeps it alive."""

STEEPEST = 2.2
"""No block's memory or time grows faster than the square of its length; what seems to is noise or a first call."""
SPACING = 1.5
"""Ratio of lengths from which a slope is read: closer ones only show the noise of the reading."""

LAW_SPAN = 32
EXPLAINED_SHARE = 0.1
"""Of a device's memory: what the law must have come to where memory ran out. A process may be allowed less than all."""

CARD_GIB = (24, 40, 80, 141)
"""Memory of common cards: RTX 4090, A100, H100, H200."""

MEMORY, TIME = "Memory", "Time"
"""The type of error of a length that was not tried because of what shorter ones took."""
REFUSES = ("failed", "unsupported")
"""What a length may end in that a block does not take, rather than one that is too long."""
_LIMITS = {"oom": "memory", "timeout": "time", MEMORY: "memory", TIME: "time"}


# -- the search ----------------------------------------------------------------------------------------------------


def next_length(
    fits: int,
    fails: int | None,
    *,
    longest: int,
    resolution: float = RESOLUTION,
    start: int = START_LENGTH,
    guess: float | None = None,
    refused: Iterable[int] = (),
) -> int | None:
    """The length to try next, or None when the search is over.

    fits: the longest that fitted, 0 if none did. fails: the shortest beyond it that did not. longest: no longer one is
    asked for. guess: where the limit should be. refused: lengths between the two that the block does not take, as one
    does that wants multiples of something; what is tried then is a multiple of more than they are. The search ends
    within `resolution` of the limit, or where no such length is left.
    """
    if fails is None:
        if fits >= longest:
            return None
        return min(longest, 2 * fits if fits else start)
    if not fits:
        return fails // 2 or None
    if fails - fits <= max(1, resolution * fits):
        return None
    step = 1 << max(0, math.floor(math.log2(max(1.0, resolution * fits / 4))))
    coarse = 2 * max((length & -length for length in refused), default=0)
    step = max(step, coarse)
    aims = [math.sqrt(fits * fails)]
    if guess:
        # A length just below the limit and one just above it end the search, if the guess is good.
        aims = [guess * (1 - resolution / 3), guess * (1 + resolution / 3), *aims]
    if coarse:
        aims.append((fits // step + 1) * step)
    found = [round(aim / step) * step for aim in aims]
    return next((length for length in found if fits < length < fails), None if coarse else (fits + fails) // 2)


def refusals(tried: Mapping[int, str], fits: int) -> tuple[int | None, list[int]]:
    """The shortest length beyond `fits` that did not fit, and those before it that were refused for another reason.

    tried: length -> status. A block may not take each length: one that it raises an error at ends the search only where
    nothing else does.
    """
    beyond = sorted(length for length, status in tried.items() if length > fits and status != "ok")
    ended = next((length for length in beyond if tried[length] not in REFUSES), None)
    if ended is None or not fits:
        return (beyond[0] if beyond else None), []
    return ended, [length for length in beyond if length < ended]


def extrapolated(points: Mapping[int, float], length: float) -> float | None:
    """What grows with the length, at `length`: on log axes, with the slope that it has reached and its trend.

    points: length -> value, as measured. None without a point. Between points it is interpolated.
    """
    known = sorted((t, y) for t, value in points.items() if (y := positive(value)))
    if not known:
        return None
    before, beyond = [p for p in known if p[0] <= length], [p for p in known if p[0] >= length]
    if before and beyond:
        (t0, y0), (t1, y1) = before[-1], beyond[0]
        return y0 if t0 == t1 else y0 * (y1 / y0) ** (math.log(length / t0) / math.log(t1 / t0))
    if not before:
        return known[0][1]
    last, value = known[-1]
    return value * (length / last) ** _slope(known)


def reached_at(points: Mapping[int, float], limit: float) -> float | None:
    """The length beyond the last of `points` at which `extrapolated` comes to `limit`, or None."""
    known = sorted((t, y) for t, value in points.items() if (y := positive(value)))
    if len(known) < 2 or known[-1][1] >= limit or (slope := _slope(known)) < 0.05:
        return None
    return known[-1][0] * (limit / known[-1][1]) ** (1 / slope)


def _slope(known: list[tuple[int, float]]) -> float:
    """The exponent at the end of points in order; 1 of a single point. One that rises is expected to rise on."""
    apart = [known[-1]]
    for point in reversed(known):
        if point[0] * SPACING <= apart[-1][0]:
            apart.append(point)
    slopes = [math.log(b[1] / a[1]) / math.log(b[0] / a[0]) for b, a in pairwise(apart)]
    if not slopes:
        return 1.0
    trend = max(0.0, slopes[0] - slopes[1]) if len(slopes) > 1 else 0.0
    return min(STEEPEST, max(0.0, slopes[0] + trend))


# -- what the rows say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """How far one block goes. limit: memory, time, length (--max-length), a status, or unfinished."""

    name: str
    block: str
    mode: str
    row: BenchmarkResult
    """One of its rows: what it was asked of."""
    fits: int
    """The longest length that was run, 0 if none could be."""
    fails: int | None
    """The shortest beyond it that could not."""
    limit: str
    tried: bool
    """False where `fails` was only predicted from shorter lengths."""
    finished: bool
    """Whether the gap between the two is as small as was asked for."""
    said: str
    """In words, what became of `fails`."""
    refused: tuple[int, ...]
    """Lengths between the two that the block does not take."""
    refusal: str
    """In words, why not the first of them."""
    needed_bytes: float | None
    """Everything in memory at `fits`: weights, gradients, input, output, and what the call needs besides."""
    call_s: float | None
    """Seconds of the first call at `fits`."""
    peak: Law | None
    """Peak above the level before the call, in mode decode the state, against length."""
    total: Law | None
    """Everything in memory, against length."""
    growth: float | None
    """Bytes that one more token takes at `fits`."""
    explained: bool
    """False where memory ran out at a length at which the law has it all but empty: it says nothing of the end."""
    share: float
    """Part of a device's memory that is expected to be of use."""

    def would_hold(self, device_bytes: float) -> int | None:
        """Tokens that a device with so much memory would hold by the law, None where there is none.

        Not more than if memory went on as it grows at the end: input and output lie in memory, so that no block's can
        grow ever more slowly, though a law over lengths at which it worked in another way may look so.
        """
        law = self.total
        if law is None or not (law.is_law and self.explained) or law.factor <= 0 or law.exponent < 0.05:
            return None
        left = device_bytes * self.share - law.floor
        tokens = (left / law.factor) ** (1 / law.exponent) if left > 0 else 0.0
        if tokens > self.fits and self.growth and self.needed_bytes:
            more = (device_bytes * self.share - self.needed_bytes) / self.growth
            tokens = min(tokens, self.fits + max(0.0, more))
        return int(tokens) if tokens < 1e15 else None


def is_limits_row(row: BenchmarkResult) -> bool:
    """Whether `longctx limits` made it."""
    return isinstance(row.config, Mapping) and isinstance(row.config.get("limits"), Mapping)


def frontiers(results: Iterable[BenchmarkResult]) -> list[Frontier]:
    """The frontier of every block in a file of `longctx limits`, in the order of its rows."""
    results = [row for row in results if is_limits_row(row)]
    found: dict[str, dict[int, BenchmarkResult]] = {}
    for row, name in zip(results, names_of(results), strict=True):
        found.setdefault(name, {})[row.sequence_length] = row
    return [_frontier(name, rows) for name, rows in found.items()]


def _frontier(name: str, rows: Mapping[int, BenchmarkResult]) -> Frontier:
    ok = {t: rows[t] for t in sorted(rows) if rows[t].ok}
    fits = max(ok, default=0)
    fails, refused = refusals({t: row.status for t, row in rows.items()}, fits)
    any_row = next(iter(rows.values()))
    asked: Mapping[str, Any] = any_row.config["limits"]
    resolution, longest = positive(asked.get("resolution")) or RESOLUTION, positive(asked.get("max_length"))
    error = _error(rows[fails]) if fails else {}
    kind = str(error.get("type"))
    if fails is None:
        limit = "length" if longest and fits >= longest else "unfinished"
    else:
        status = rows[fails].status
        limit = _LIMITS.get(kind if status == "skipped" else status, status)
    closed = fails is not None and (
        next_length(fits, fails, longest=fails, resolution=resolution, refused=refused) is None
    )
    # What cannot be run at any length is not looked for at shorter ones.
    closed = closed or (not fits and limit not in ("memory", "time", "unfinished"))
    totals = {t: value * MIB for t, row in ok.items() if (value := positive(row.total_memory_mb))}
    total = fit(_upper(totals))
    gpu = positive(any_row.environment.get("gpu_memory_total_bytes")) if any_row.environment.get("gpu") else None
    share = CPU_SHARE
    if gpu and total and fails and limit == "memory":
        # As full as this card got before it had no more.
        share = min(1.0, total.at(math.sqrt(fits * fails)) / gpu) if fits else share
    device = gpu or positive(any_row.environment.get("memory_available_bytes"))
    leapt = limit == "memory" and fails and total and device and total.at(fails) < EXPLAINED_SHARE * device
    return Frontier(
        name=name,
        block=str(any_row.block_name),
        mode=str(any_row.mode),
        row=any_row,
        fits=fits,
        fails=fails,
        limit=limit,
        tried=fails is None or rows[fails].status != "skipped",
        finished=closed or limit == "length",
        said=str(error.get("message") or ""),
        refused=tuple(refused),
        refusal=str(_error(rows[refused[0]]).get("message") or "") if refused else "",
        needed_bytes=totals.get(fits),
        call_s=positive(ok[fits].first_call_s) if fits else None,
        peak=fit(_upper({t: value for t, row in ok.items() if (value := METRICS["memory"].value(row))})),
        total=total,
        growth=_growth(totals),
        explained=not leapt,
        share=share,
    )


def _error(row: BenchmarkResult) -> Mapping[str, Any]:
    return row.error if isinstance(row.error, Mapping) else {}


def _upper(points: Mapping[int, float]) -> dict[int, float]:
    """The longest lengths, over a span that makes a law: what short ones do says nothing of what lies beyond."""
    longest = max(points, default=0)
    return {t: y for t, y in points.items() if t * LAW_SPAN >= longest}


def _growth(totals: Mapping[int, float]) -> float | None:
    """The slope between the longest length and one well below it."""
    longest = max(totals, default=0)
    below = max((t for t in totals if t * SPACING <= longest), default=None)
    return None if below is None else positive((totals[longest] - totals[below]) / (longest - below))
