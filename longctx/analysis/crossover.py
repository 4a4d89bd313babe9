"""From which length on one block is faster than another: inside the measured range, or by the laws beyond it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from longctx.analysis.curves import Curve, Growth, base_curve
from longctx.analysis.laws import K_HIGH, K_LOW, Law, profile
from longctx.analysis.matching import device_kind
from longctx.analysis.noise import median_factor, student
from longctx.analysis.ranking import BASE
from longctx.analysis.statistics import positive

REACH = 8
"""An extrapolation goes no further than this many times the longest length."""
LEVEL = 0.02
"""Without samples to tell, a difference below this share is none."""
UNSEEN = {"cpu": 0.10, "cuda": 0.05}
"""How far apart two processes may be, of which a single round knows nothing, by kind of device."""
NEAR = 0.10
"""What noise hides is called level up to this share."""
DRAWS = 400
GRID = 200
"""Parts of a stretch between two lengths, in which its crossing is looked for."""


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where the times of curves `a` and `b` cross. Lengths in tokens, all None where they do not.

    verdict: `crosses` inside the range, `extrapolated` beyond it, `below` (a faster at every length that is not
    `untold`), `above` (slower at all of those), `level` (no length tells them apart, nor are they far apart), `noisy`
    (no length tells them apart, for its noise), `none` (no length in common).
    faster_after: whether a is the faster one past the crossing. low, high: 95% interval, None for an end that nothing
    bounds.
    """

    a: str
    b: str
    verdict: str
    shortest: int | None = None
    longest: int | None = None
    at: float | None = None
    low: float | None = None
    high: float | None = None
    faster_after: bool | None = None
    crossings: int = 0
    """How often the sign changes; the last change is told."""
    launch_bound: bool = False
    """Whether up to the crossing one of them waits for its launches: another host would move it."""
    one_round: bool = False
    """Whether no length has two rounds of both: the interval then only supposes how far processes are apart."""
    told: tuple[int, ...] = ()
    """Lengths at which one of the two is faster beyond the noise."""
    untold: tuple[int, ...] = ()
    """Lengths at which the noise hides which of the two is faster."""
    reason: str = ""
    """Why nothing is said of the lengths beyond the range."""

    @property
    def extrapolated(self) -> bool:
        return self.verdict == "extrapolated"


def against_base(found: Sequence[Growth], base: str = BASE) -> list[Crossover]:
    """Every curve against that of block `base` in the same setting."""
    known = {id(growth.curve): growth for growth in found}
    pairs = []
    for growth in found:
        other = base_curve(growth.curve, [g.curve for g in found], lambda c: c.block == base)
        if other is not None and growth.curve.block != base:
            pairs.append(crossover(growth, known[id(other)]))
    return pairs


def crossover(a: Growth, b: Growth) -> Crossover:
    """Where a's time crosses b's: by log-time over log-length between measured lengths, by their laws beyond.

    A sign counts where the same-round ratios of that length exclude 1, with the scatter pooled over the lengths that
    are launch-bound and over those that are not. As each of many lengths may be told wrongly, each has its share of
    the 5% that all may.
    """
    names = {"a": a.curve.name, "b": b.curve.name}
    logs = _log_ratios(a.curve, b.curve)
    if not logs:
        return Crossover(**names, verdict="none", reason="no length in common")
    points = [(t, statistics.median(values)) for t, values in logs.items()]
    lengths = [t for t, _ in points]
    one_round = max(map(len, logs.values())) < 2
    names |= {"shortest": lengths[0], "longest": lengths[-1], "one_round": one_round}
    noise = _supposed(a.curve, b.curve, lengths) if one_round else _seen(logs, {*a.curve.bound, *b.curve.bound})
    margins = noise.halves(0.05 / len(points)) if noise else [math.log1p(LEVEL)] * len(points)
    signs = [
        0 if abs(value) <= margin else math.copysign(1, value)
        for (_, value), margin in zip(points, margins, strict=True)
    ]
    told = [i for i, sign in enumerate(signs) if sign]
    names["told"] = tuple(lengths[i] for i in told)
    names["untold"] = tuple(t for t in lengths if t not in names["told"])
    if not told:
        near = all(abs(value) <= math.log1p(NEAR) for _, value in points)
        return Crossover(**names, verdict="level" if near else "noisy")
    changes = [(i, j) for i, j in pairwise(told) if signs[i] != signs[j]]
    if changes:
        at, low, high = _inside(points, changes[-1], noise.halves(0.05) if noise else None)
        after = signs[changes[-1][1]] < 0
        before = lengths[changes[-1][0]]
        bound = before in a.curve.bound or before in b.curve.bound
        where = {"at": at, "low": low, "high": high, "crossings": len(changes), "launch_bound": bound}
        return Crossover(**names, verdict="crosses", faster_after=after, **where)
    slower = signs[told[0]] > 0
    names["verdict"] = "above" if slower else "below"
    return _beyond(a.time, b.time, names, slower=slower)


def _log_ratios(a: Curve, b: Curve) -> dict[int, list[float]]:
    """Length -> log of a's time over b's in each round of both, at the lengths of both; of records without rounds, of
    the whole.

    Launch-bound or not: a crossing of times is one whatever bounds them.
    """
    times_a, times_b = a.values("time"), b.values("time")
    found = {}
    for t in sorted(set(times_a) & set(times_b)):
        found[t] = _paired(a.rows[t].samples, b.rows[t].samples) or [math.log(times_a[t] / times_b[t])]
    return found


@dataclass(frozen=True)
class _Noise:
    """Of each length in order: the standard error of its log ratio, and its degrees of freedom. least: how far off
    every ratio may be in any case."""

    errors: list[tuple[float, float]]
    least: float = 0.0

    def halves(self, outside: float) -> list[float]:
        """Half of the interval that leaves `outside` beyond it, of each length."""
        return [max(student(df, outside) * error, self.least) for error, df in self.errors]


def _seen(logs: Mapping[int, Sequence[float]], bound: Container[int]) -> _Noise:
    """As the rounds are apart: where launches decide, hosts make noise that the other lengths know nothing of."""

    def pooled(lengths: Sequence[int]) -> tuple[float, int]:
        many = [logs[t] for t in lengths if len(logs[t]) > 1]
        df = sum(len(values) - 1 for values in many)
        if not df:
            return math.inf, 1
        variance = sum(statistics.variance(values) * (len(values) - 1) for values in many) / df
        return math.sqrt(variance * statistics.fmean(median_factor(len(values)) / len(values) for values in many)), df

    groups = {kind: pooled([t for t in logs if (t in bound) == kind]) for kind in (True, False)}
    together = pooled(list(logs))

    def of(group: tuple[float, int]) -> tuple[float, int]:
        if math.isinf(group[0]):
            return together
        # The quieter ones are at least as sure as all are together.
        known = [group, together] if group[0] <= together[0] else [group]
        return min(known, key=lambda one: student(one[1]) * one[0])

    return _Noise([of(groups[t in bound]) for t in logs])


def _supposed(a: Curve, b: Curve, lengths: Sequence[int]) -> _Noise | None:
    """Of one round: the samples' scatter as far as it goes, and what may lie between processes."""
    variances = [v for curve in (a, b) for t in lengths if (v := _sample_variance(curve.rows[t].samples)) is not None]
    if len(variances) < 2 * len(lengths):
        return None
    error = math.sqrt(2 * statistics.fmean(variances))
    kinds = {device_kind(curve.rows[t]) for curve in (a, b) for t in lengths}
    unseen = max(UNSEEN.get(kind, UNSEEN["cpu"]) for kind in kinds)
    return _Noise([(error, math.inf)] * len(lengths), least=math.log1p(unseen))


def _paired(ours: object, theirs: object) -> list[float]:
    """Log of the ratio of the medians of each round that both have."""
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return []
    logs = []
    for mine, other in zip(ours, theirs, strict=False):
        values = [[v for v in side if positive(v)] if isinstance(side, list) else [] for side in (mine, other)]
        if all(values):
            logs.append(math.log(statistics.median(values[0]) / statistics.median(values[1])))
    return logs


def _sample_variance(samples: object) -> float | None:
    """Relative variance of the median of a cell's samples."""
    rounds = samples if isinstance(samples, list) else []
    logs = [math.log(v) for values in rounds if isinstance(values, list) for v in values if positive(v)]
    return statistics.variance(logs) * median_factor(len(logs)) / len(logs) if len(logs) > 1 else None


def _inside(
    points: Sequence[tuple[int, float]], change: tuple[int, int], halves: Sequence[float] | None
) -> tuple[float, float | None, float | None]:
    """(crossing, low, high) between the two points of `change`, whose signs differ.

    The interval holds every length at which the ratio may be 1: as unsure as the two ends of its stretch are, and as
    the bend of the curve, seen in the neighbours, makes a straight line between them.
    """
    start, stop = change
    first = points[start][1] > 0
    step = next(i for i in range(start + 1, stop + 1) if (points[i][1] > 0) != first)
    at = _between(points[step - 1], points[step])
    if halves is None:
        return at, None, None
    unsure = [at]
    for i in range(start, stop):
        (left, g_left), (right, g_right) = points[i], points[i + 1]
        bend = max((abs(_second(points, j)) for j in (i, i + 1)), default=0.0) * math.log(right / left) ** 2 / 2
        # A step of the grid belongs to it: it may be all that an exact one has.
        step_width = abs(g_right - g_left) / GRID
        for share in range(GRID + 1):
            w = share / GRID
            noise = math.hypot((1 - w) * halves[i], w * halves[i + 1])
            if abs((1 - w) * g_left + w * g_right) <= noise + bend * w * (1 - w) + step_width:
                unsure.append(math.exp((1 - w) * math.log(left) + w * math.log(right)))
    return at, min(unsure), max(unsure)


def _second(points: Sequence[tuple[int, float]], i: int) -> float:
    """Second derivative of the log ratio by log length at point i, 0 at an end."""
    if not 0 < i < len(points) - 1:
        return 0.0
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(t), value) for t, value in points[i - 1 : i + 2])
    return 2 * ((y2 - y1) / (x2 - x1) - (y1 - y0) / (x1 - x0)) / (x2 - x0)


def _between(left: tuple[int, float], right: tuple[int, float]) -> float:
    share = left[1] / (left[1] - right[1])
    return math.exp(math.log(left[0]) + share * (math.log(right[0]) - math.log(left[0])))


def _beyond(a: Law | None, b: Law | None, names: dict, *, slower: bool) -> Crossover:
    """The crossing that the laws foresee past the range, refused where they do not make it certain."""
    if a is None or b is None or not (a.is_law and b.is_law):
        return Crossover(**names, reason="too few lengths for laws that reach beyond")
    first, second = (a, b) if slower else (b, a)
    # `first` is the slower one now; it comes out ahead only by growing more slowly, beyond doubt.
    if first.exponent >= second.exponent:
        return Crossover(**names, reason="the slower one does not grow more slowly")
    if first.high is None or second.low is None or first.high >= second.low:
        return Crossover(**names, reason="the exponents' intervals overlap")
    longest = names["longest"]
    at = _meeting(first, second, longest, REACH)
    if at is None:
        return Crossover(**names, reason=f"not within {REACH} times the range")
    draws = sorted(_drawn(first, second, longest))
    low, high = draws[int(0.025 * len(draws))], draws[min(len(draws) - 1, int(0.975 * len(draws)))]
    return Crossover(
        **(names | {"verdict": "extrapolated"}),
        at=at,
        low=min(low, at),
        high=max(high, at) if math.isfinite(high) else None,
        faster_after=slower,
        crossings=1,
    )


def _meeting(first: Law, second: Law, longest: float, reach: float) -> float | None:
    """The length past `longest`, and up to `reach` times it, from which `first` is the lower one."""
    steps = [longest * reach ** (i / 400) for i in range(401)]
    return next((t for t in steps if first.at(t) <= second.at(t)), None)


def _drawn(first: Law, second: Law, longest: float) -> list[float]:
    """Crossings of laws fitted anew to the fitted curves with noise on them; infinite for a pair that never meets."""
    import numpy as np

    generator = np.random.default_rng(0)
    times = longest * np.logspace(-1, math.log10(REACH**2), 2000)
    sides = []
    for law in (first, second):
        t = np.array([length for length, _ in law.points], dtype=float)
        scale = float(np.exp(np.mean(np.log(t))))
        fitted = law.floor + law.factor * t**law.exponent
        # The noise is read from few points, so it may be larger: without that 83 to 93 of 100 intervals hold the truth.
        noise = law.noise * student(law.count) / 1.96
        y = fitted * np.exp(generator.normal(0.0, noise, (DRAWS, t.size)))
        if law.floor:
            # As fine as the exponent is known.
            reach = 2 * max(law.high - law.exponent, law.exponent - law.low, 1e-3)
            grid = np.linspace(max(K_LOW, law.exponent - reach), min(K_HIGH, law.exponent + reach), 201)
            rss, floor, factor = profile(t / scale, y, grid)
            best, rows = np.argmin(rss, axis=1), np.arange(DRAWS)
            k, a, b = grid[best], floor[rows, best], factor[rows, best]
        else:
            x = np.log(t / scale)
            k, a = np.log(y) @ x / float(x @ x), np.zeros(DRAWS)
            b = np.exp(np.mean(np.log(y), axis=1))
        sides.append(a[:, None] + b[:, None] * (times[None] / scale) ** k[:, None])
    ahead = sides[0] <= sides[1]
    meets = np.where(ahead.any(axis=1), times[np.argmax(ahead, axis=1)], math.inf)
    return [float(t) for t in meets]
