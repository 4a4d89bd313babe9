"""From results to the curves of a picture: which figure, which rows form one curve, which rows have none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from longctx.analysis.settings import class_of, differing_options, options_of, varying, without
from longctx.analysis.statistics import positive
from longctx.analysis.x_axis import LENGTH, XAxis
from longctx.results import BenchmarkResult

MIB = 1024.0**2


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that can be drawn over length. kind says what it counts: s, tokens/s, bytes, bytes/token, FLOP/s,
    J/token."""

    name: str
    title: str
    kind: str
    value: Callable[[BenchmarkResult], float | None]


@dataclass(kw_only=True)
class Series:
    """One curve: (place on the x axis, a length in tokens as a rule; value in the metric's SI unit), by place."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    intervals: dict[float, tuple[float, float]] = field(default_factory=dict)
    """Place -> 95% interval of the value, for the points that have one."""
    rows: dict[float, BenchmarkResult] = field(default_factory=dict)
    """Place -> the row of its point."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A row that has no point on the curve `name`, and why: its status, or `no figure`. x: its place, None where it
    has none on this axis."""

    name: str
    x: float | None
    reason: str


def _throughput(result: BenchmarkResult) -> float | None:
    return positive(result.throughput_tokens_per_sec)


def _memory_bytes(result: BenchmarkResult) -> float | None:
    """The peak of a call; in mode decode the size of the state, which is what a context costs there."""
    if result.mode == "decode":
        return positive(result.state_bytes)
    peak = positive(result.peak_memory_mb)
    return peak and peak * MIB


def _peak_bytes_per_token(result: BenchmarkResult) -> float | None:
    """The peak of a call a token; in mode decode the state's bytes a token of the context."""
    if result.mode == "decode":
        state, tokens = positive(result.state_bytes), (result.batch_size or 1) * result.sequence_length
        return state and tokens and state / tokens
    return positive(result.peak_bytes_per_token)


def _allocated_bytes_per_token(result: BenchmarkResult) -> float | None:
    share = positive(result.memory_efficiency_mb_per_token)
    return share and share * MIB


def _flop_rate(result: BenchmarkResult) -> float | None:
    rate = positive(result.tflops)
    return rate and rate * 1e12


def _interval(result: BenchmarkResult, metric: Metric) -> tuple[float, float] | None:
    """The 95% interval of a time, or of the throughput that follows from it. Other figures have none."""
    ends = result.forward_time_ci95
    if metric.kind not in ("s", "tokens/s") or not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = map(positive, ends)
    if low is None or high is None or low > high:
        return None
    if metric.kind == "s":
        return low, high
    tokens = (result.batch_size or 1) * (1 if result.mode == "decode" else result.sequence_length)
    return tokens / high, tokens / low


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="time", title="Forward time", kind="s", value=lambda r: positive(r.time_s)),
        Metric(name="throughput", title="Throughput", kind="tokens/s", value=_throughput),
        Metric(name="memory", title="Peak memory", kind="bytes", value=_memory_bytes),
        Metric(
            name="memory-per-token",
            title="Peak memory per token",
            kind="bytes/token",
            value=_peak_bytes_per_token,
        ),
        Metric(name="scaling", title="Scaling of time", kind="s", value=lambda r: positive(r.time_s)),
        Metric(name="tflops", title="Rate of model FLOPs", kind="FLOP/s", value=_flop_rate),
        Metric(name="energy", title="Energy", kind="J/token", value=lambda r: positive(r.joules_per_token)),
    )
}
"""The five published pictures, in their order, then ours."""

_PUBLISHED_MEMORY = Metric(
    name="memory-per-token",
    title="Allocated memory per token",
    kind="bytes/token",
    value=_allocated_bytes_per_token,
)


def metric_for(name: str, results: Iterable[BenchmarkResult]) -> Metric:
    """The metric `name`; memory-per-token falls back on the published field where no record has ours.

    Peak over tokens and allocated over tokens are different figures, so one picture never mixes them.
    """
    results = list(results)
    ours, published = (any(map(f, results)) for f in (_peak_bytes_per_token, _allocated_bytes_per_token))
    if name == "memory-per-token" and published and not ours:
        return _PUBLISHED_MEMORY
    metric = METRICS[name]
    modes = {r.mode for r in results}
    if len(modes) == 1 and (mode := modes.pop()) != "forward":
        titles = {"time": f"{str(mode).capitalize()} time", "scaling": f"Scaling of {mode} time"}
        if mode == "decode":
            titles |= {"memory": "Size of the state", "memory-per-token": "State per token"}
        return replace(metric, title=titles.get(name, f"{metric.title} ({mode})"))
    return metric


def collect(
    runs: Mapping[str, Iterable[BenchmarkResult]], metric: Metric, x: XAxis = LENGTH
) -> tuple[list[Series], list[Missing]]:
    """The curves of `runs` (label of a file -> its rows) over `x`, and the rows that have no point.

    A row's curve is its block, with whatever else differs among all rows added to the name: dtype, batch,
    mode, model shape, training step, length where that is not the axis, file. Of two rows for one point the later one
    counts.
    """
    rows = [(label, result) for label, results in runs.items() for result in results]
    names = _Names([result for _, result in rows], x)
    points: dict[str, dict[float, float]] = {}
    bars: dict[str, dict[float, tuple[float, float]]] = {}
    sources: dict[str, dict[float, BenchmarkResult]] = {}
    missing: dict[tuple[str, float | None], Missing] = {}
    for label, result in rows:
        name = names.of(result, label if len(runs) > 1 else "")
        place = x.value(result)
        value = metric.value(result) if result.ok else None
        if place is None:
            block = str(result.block_name)
            missing[block, None] = Missing(name=block, x=None, reason=f"no {x.title}")
        elif value is None:
            reason = "no figure" if result.ok else str(result.status)
            points.get(name, {}).pop(place, None)
            missing[name, place] = Missing(name=name, x=place, reason=reason)
        else:
            points.setdefault(name, {})[place] = value
            sources.setdefault(name, {})[place] = result
            interval = _interval(result, metric)
            bars.setdefault(name, {}).pop(place, None)
            if interval:
                bars[name][place] = interval
            missing.pop((name, place), None)
    curves = [
        Series(
            name=name,
            points=sorted(values.items()),
            intervals={t: i for t, i in bars[name].items() if t in values},
            rows={t: sources[name][t] for t in sorted(values)},
        )
        for name, values in points.items()
        if values
    ]
    return curves, sorted(missing.values(), key=lambda m: (m.x or 0.0, m.name))


def places_of(runs: Mapping[str, Iterable[BenchmarkResult]], x: XAxis = LENGTH) -> dict[int, int]:
    """id of each row of `runs` -> place of its curve among all of them, in the order of the rows.

    A block has one place in all modes, whether or not it has a figure there: pictures of one output then agree on what
    its curve looks like.
    """
    rows = [(label, result) for label, results in runs.items() for result in results]
    names = _Names([result for _, result in rows], x)
    names.axes = without(names.axes, ("mode",))
    named = [names.of(result, label) for label, result in rows]
    places = {name: place for place, name in enumerate(dict.fromkeys(named))}
    return {id(result): places[name] for (_, result), name in zip(rows, named, strict=True)}


def names_of(results: Iterable[BenchmarkResult]) -> list[str]:
    """The curve that each row belongs to: its block, with whatever differs between the rows added to it."""
    results = list(results)
    names = _Names(results)
    return [names.of(result) for result in results]


class _Names:
    """What tells the curves of some rows apart, and so stands in their names."""

    def __init__(self, results: Sequence[BenchmarkResult], x: XAxis = LENGTH) -> None:
        # A row that failed early does not know all of its traits, and differs in nothing for that.
        self.axes = without(varying(results, unknown=False), (x.name,))
        self.x, self.lengths = x, {row.sequence_length for row in results}
        options = differing_options(results)
        self.options = {block: [name for name in names if name != x.name] for block, names in options.items()}

    def of(self, result: BenchmarkResult, label: str = "") -> str:
        words = [self.x.block_name(result), *filter(None, [class_of(result)])]
        known, options = options_of(result), self.options.get(str(result.block_name), ())
        words += [f"{name}={known[name]}" for name in options if name in known]
        words += [f"{axis.mark}{value}" for axis in self.axes if (value := axis.of(result)) is not None]
        if self.x is not LENGTH and len(self.lengths) > 1:
            words.append(f"T={result.sequence_length}")
        return " ".join(words) + (f" ({label})" if label else "")
