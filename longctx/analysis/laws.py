"""Scaling laws: y = floor + factor * T^exponent, fitted in relative error, with a 95% interval of the exponent.

The floor stands for launch overhead and whatever else does not grow: without it the exponent of a short range is
that of the overhead. Under five lengths or a span of 16 the two cannot be told apart, and the slope on log-log
axes is given as a `local slope`, with the lengths that would make it a law.

T is in tokens, y in any one unit. Three rounds have ten different resamples, whose percentiles hold the true
exponent in 54% (no floor) to 81% (a floor) of cases. So the noise of a point is pooled over lengths and rounds,
and an exponent is in the interval if the best curve that has it is not further off than that noise lets (Student's
t). Where whole rounds differ in slope by more, the exponents of the rounds decide.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from longctx.analysis.noise import (
    LEAST_NOISE,
    chi2,
    clean_rounds,
    median_factor,
    point_variance,
    pooled,
    steadied,
    student,
)
from longctx.analysis.statistics import positive

if TYPE_CHECKING:
    import numpy as np

LEAST_LENGTHS, LEAST_SPAN = 5, 16
BETWEEN_PROCESSES = 0.02
"""Relative standard deviation between processes, of which a single round knows nothing."""
LEAST_FREE = 3
"""Lengths at which the work, not the launching, takes the time: fewer give no law."""
K_LOW, K_HIGH = 0.02, 4.0


@dataclass(frozen=True, kw_only=True)
class Law:
    """y ~ floor + factor * T^exponent over `count` lengths, `shortest` to `longest`.

    low and high: 95% interval of the exponent, None where nothing tells the noise. is_law: else a local slope, with
    floor 0 and `missing`, the lengths that would make it a law. noise: relative standard deviation of a point, as the
    interval has it; residual: how far off the curve the points lie.
    """

    exponent: float
    low: float | None
    high: float | None
    floor: float
    factor: float
    is_law: bool
    shortest: int
    longest: int
    count: int
    noise: float
    residual: float = 0.0
    missing: tuple[int, ...] = ()
    points: tuple[tuple[int, float], ...] = ()

    @property
    def word(self) -> str:
        """What the interval, not the point alone, lets be said: constant, linear, quadratic, between, or unsure."""
        if self.low is None or self.high is None:
            return _word(self.exponent, self.exponent)
        return _word(self.low, self.high)

    def at(self, length: float) -> float:
        """y at `length` tokens."""
        return self.floor + self.factor * length**self.exponent


def _word(low: float, high: float) -> str:
    for target, name in ((0.0, "constant"), (1.0, "linear"), (2.0, "quadratic")):
        if target - 0.15 <= low and high <= target + 0.15:
            return name
    if high < 0:
        return "falling"
    if high < 1:
        return "sublinear"
    if low > 2:
        return "above quadratic"
    if low > 1 and high < 2:
        return "between"
    if high - low > 0.8 or (low <= 1 and high >= 2):
        return "unclear"
    return "about linear" if low <= 1 <= high else "about quadratic"


# -- the fit -------------------------------------------------------------------------------------------------------


def fit(
    points: Mapping[int, float],
    rounds: Mapping[int, Sequence[Sequence[float]]] | None = None,
    *,
    bound: Sequence[int] = (),
    failed: Sequence[int] = (),
) -> Law | None:
    """The law of `points` (length -> y), or the local slope of those not `bound`; None with under two of them.

    rounds: length -> samples, a list a round: where the noise is read from. bound: lengths whose time is that of
    launching, which the floor takes up and a slope must not. failed: lengths that will not be advised.
    """
    usable = {int(t): y for t, value in points.items() if positive(t) and (y := positive(value))}
    samples = {t: clean for t in usable if (clean := clean_rounds((rounds or {}).get(t, ())))}
    usable |= steadied({t: usable[t] for t in samples}, samples)
    free = sorted(set(usable) - set(bound))
    lengths = sorted(usable)
    if not lengths:
        return None
    missing = missing_lengths(lengths, bound=bound, failed=failed)
    if _enough(lengths) and len(free) >= LEAST_FREE:
        law = _fit_law({t: usable[t] for t in lengths}, samples)
        if len(free) == len(lengths):
            return law
        # A host that launches while the device works gives the larger of two times, not their sum: then the lengths
        # that are not launch-bound lie on a power law of their own, and the floor has no part in them.
        alone = _slope({t: usable[t] for t in free}, samples, missing)
        if not _off(law, point_variance(lengths, samples)) or alone.residual > 0.5 * law.residual:
            return law
        if _enough(free):
            return _fit_law({t: usable[t] for t in free}, samples)
        return dataclasses.replace(alone, missing=missing_lengths(free, failed=failed))
    if len(free) < 2:
        return None
    return _slope({t: usable[t] for t in free}, samples, missing)


def _off(law: Law, known: tuple[float, int] | None) -> bool:
    """Whether points lie further from the law than the noise of their rounds explains; 2% where no round tells it."""
    variance = max(known[0], LEAST_NOISE**2) if known else 0.02**2
    df = law.count - 3
    return law.residual**2 * df / variance > chi2(df, 1.645)


def _enough(lengths: Sequence[int]) -> bool:
    """Whether these lengths, in order, can tell a floor from a power."""
    return len(lengths) >= LEAST_LENGTHS and lengths[-1] >= LEAST_SPAN * lengths[0]


def _fit_law(points: Mapping[int, float], samples: Mapping[int, list[list[float]]]) -> Law:
    import numpy as np

    lengths = sorted(points)
    n = len(lengths)
    x, x_scale = _scaled(lengths)
    y, y_scale = _scaled([points[t] for t in lengths])
    grid = np.linspace(K_LOW, K_HIGH, 400)
    rss, _, _ = profile(x, y[None], grid)
    k, least = _search(lambda ks: profile(x, y[None], ks)[0][0], grid, rss[0])
    k0, least0 = _search(lambda ks: _power(x, y, ks), grid, _power(x, y, grid))

    variance, df = pooled(least, n - 3, point_variance(lengths, samples))
    margin = variance * student(df) ** 2
    flat = float(n - np.sum(1 / y) ** 2 / np.sum(1 / y**2))
    if flat - least <= margin:
        # Nothing that grows: a factor of nothing would fit any exponent.
        alone = _slope(points, samples, ())
        if alone.word == "constant":
            return dataclasses.replace(alone, is_law=True)
    # A floor that the points do not show is left out: it would only add its own error to the exponent.
    floorless = least0 - least <= variance * min(student(df) ** 2, 4.0)
    best = k0 if floorless else k
    low, high = _inside(lambda ks: profile(x, y[None], ks)[0][0], best, least + margin)
    low, high = _widened(x, samples, lengths, best, low, high, df, floor=not floorless)
    if floorless:
        a, b = 0.0, float(np.sum(x**best / y) / np.sum((x**best / y) ** 2))
    else:
        _, a_s, b_s = profile(x, y[None], np.array([best]))
        a, b = float(a_s[0, 0]), float(b_s[0, 0])
    return Law(
        exponent=best,
        low=low,
        high=high,
        floor=a * y_scale,
        factor=b * y_scale / x_scale**best,
        is_law=True,
        shortest=lengths[0],
        longest=lengths[-1],
        count=n,
        noise=math.sqrt(variance),
        residual=math.sqrt(least / (n - 3)),
        points=tuple((t, points[t]) for t in lengths),
    )


def profile(x: np.ndarray, y: np.ndarray, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best floor a and factor b, none negative, for each exponent: the sum of squares of (a + b x^k) / y - 1.

    x `[n]`, y `[S, n]` (S curves over the same x), ks `[M]`. Answers (sum of squares, a, b), each `[S, M]`.
    """
    import numpy as np

    power = x[None] ** ks[:, None]
    u = 1.0 / y
    uu, u1 = np.sum(u * u, axis=1)[:, None], np.sum(u, axis=1)[:, None]
    uv, vv, v1 = (u * u) @ power.T, (u * u) @ (power * power).T, u @ power.T
    # Columns that are the same but for rounding have no determinant; any split between them is as good.
    det = np.maximum(uu * vv - uv * uv, 1e-14 * uu * vv)
    a, b = (u1 * vv - v1 * uv) / det, (v1 * uu - u1 * uv) / det
    b = np.where(a < 0, v1 / vv, b)
    a = np.where(a < 0, 0.0, a)
    a = np.where(b < 0, u1 / uu, a)
    b = np.where(b < 0, 0.0, b)
    return np.maximum(x.size - a * u1 - b * v1, 0.0), a, b


def _power(x: np.ndarray, y: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """The same sum of squares `[M]` without a floor."""
    import numpy as np

    v = x[None] ** ks[:, None] / y[None]
    return np.maximum(x.size - np.sum(v, axis=1) ** 2 / np.sum(v * v, axis=1), 0.0)


def _search(loss, grid: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The exponent of least loss and that loss: the best of a grid, then ever finer grids around it."""
    import numpy as np

    at = int(np.argmin(values))
    step = float(grid[1] - grid[0])
    best, least = float(grid[at]), float(values[at])
    for _ in range(6):
        ks = np.clip(np.linspace(best - step, best + step, 21), K_LOW, K_HIGH)
        fine = loss(ks)
        at = int(np.argmin(fine))
        if fine[at] <= least:
            best, least = float(ks[at]), float(fine[at])
        step /= 8
    return best, least


def _inside(loss, best: float, limit: float) -> tuple[float, float]:
    """The outermost exponents, on both sides of `best`, with a loss up to `limit`."""
    import numpy as np

    ends = []
    for edge in (K_LOW, K_HIGH):
        inner, outer = best, edge
        for _ in range(3):
            ks = np.linspace(inner, outer, 60)
            good = np.flatnonzero(loss(ks) <= limit)
            last = int(good[-1]) if good.size else 0
            if last == ks.size - 1:
                inner = float(ks[-1])
                break
            inner, outer = float(ks[last]), float(ks[last + 1])
        ends.append(inner)
    return min(ends), max(ends)


def _slope(points: Mapping[int, float], samples: Mapping[int, list[list[float]]], missing: tuple[int, ...]) -> Law:
    import numpy as np

    lengths = sorted(points)
    x, x_scale = _scaled(lengths)
    y, y_scale = _scaled([points[t] for t in lengths])
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    rest = float(np.sum((np.log(y) - level - slope * np.log(x)) ** 2))
    known = point_variance(lengths, samples)
    # A bend of the curve is no noise: how far off the points lie counts only where no round tells the noise.
    if known:
        one_round = max(len(samples.get(t, [])) for t in lengths) == 1
        variance, df = max(known[0], (BETWEEN_PROCESSES if one_round else LEAST_NOISE) ** 2), known[1]
    elif len(lengths) >= 4:
        df = len(lengths) - 2
        variance = max(rest / df, LEAST_NOISE**2)
    else:
        variance, df = 0.0, 0
    low = high = None
    if df:
        half = student(df) * math.sqrt(variance / float(np.sum(np.log(x) ** 2)))
        low, high = _widened(
            x, samples, lengths, float(slope), float(slope) - half, float(slope) + half, df, floor=False
        )
    return Law(
        exponent=float(slope),
        low=low,
        high=high,
        floor=0.0,
        factor=math.exp(level) * y_scale * math.exp(-slope * math.log(x_scale)) if abs(slope) < 10 else 0.0,
        is_law=False,
        shortest=lengths[0],
        longest=lengths[-1],
        count=len(lengths),
        noise=math.sqrt(variance),
        residual=math.sqrt(rest / max(1, len(lengths) - 2)),
        missing=missing,
        points=tuple((t, points[t]) for t in lengths),
    )


def _scaled(values: Sequence[float]) -> tuple[np.ndarray, float]:
    """`values` over their geometric mean, and that mean."""
    import numpy as np

    array = np.asarray(values, dtype=float)
    mean = float(np.exp(np.mean(np.log(array))))
    return array / mean, mean


def _widened(
    x: np.ndarray,
    samples: Mapping[int, list[list[float]]],
    lengths: Sequence[int],
    best: float,
    low: float,
    high: float,
    df: int,
    *,
    floor: bool,
) -> tuple[float, float]:
    """[low, high], or the interval of the rounds' own exponents where those differ by more than its noise lets."""
    import numpy as np

    count = min(len(samples.get(t, [])) for t in lengths)
    if count < 3:
        return low, high
    curves = np.array([[statistics.median(samples[t][r]) for t in lengths] for r in range(count)])
    curves /= np.exp(np.mean(np.log(curves), axis=1, keepdims=True))
    if floor:
        grid = np.linspace(K_LOW, K_HIGH, 800)
        exponents = grid[np.argmin(profile(x, curves, grid)[0], axis=1)]
    else:
        centred = np.log(x)
        exponents = np.log(curves) @ centred / float(np.sum(centred**2))
    joint = float(np.var(exponents, ddof=1)) * median_factor(count) / count
    alone = ((high - low) / 2 / student(df)) ** 2
    if joint <= alone * chi2(count - 1, 1.645) / (count - 1):
        return low, high
    half = student(count - 1) * math.sqrt(joint)
    return min(low, max(K_LOW if floor else -K_HIGH, best - half)), max(high, min(K_HIGH, best + half))


# -- advice --------------------------------------------------------------------------------------------------------


def missing_lengths(
    lengths: Sequence[int], *, bound: Sequence[int] = (), failed: Sequence[int] = ()
) -> tuple[int, ...]:
    """The few lengths to add so that there are five over a span of 16, three of them not launch-bound.

    Upwards by doubling, unless that reaches a length that failed; then into the widest gaps, then downwards.
    """
    have = sorted(set(lengths))
    wall = min((t for t in failed if t > have[-1]), default=math.inf)
    added: list[int] = []

    def lacking() -> bool:
        free = len([t for t in have if t not in bound])
        return len(have) < LEAST_LENGTHS or have[-1] < LEAST_SPAN * have[0] or free < LEAST_FREE

    for _ in range(8):
        if not lacking():
            break
        gaps = [(b / a, a) for a, b in pairwise(have) if b >= 4 * a and b not in bound]
        longer, top_free = have[-1] * 2, have[-1] not in bound
        if have[-1] >= LEAST_SPAN * have[0] and gaps and top_free:
            ratio, start = max(gaps)
            new = start << max(1, int(math.log2(ratio)) // 2)
        elif longer < wall and longer <= 1 << 40:
            new = longer
        elif gaps:
            new = max(gaps)[1] * 2
        elif have[0] > 64:
            new = have[0] // 2
        else:
            break
        added.append(new)
        have = sorted({*have, new})
    return tuple(sorted(added)) if not lacking() else ()
