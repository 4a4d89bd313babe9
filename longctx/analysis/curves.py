"""The curves of a run, each a block in one setting with its rows by length, and how they grow with length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from longctx.analysis.laws import Law, fit, missing_lengths
from longctx.analysis.series import METRICS, names_of
from longctx.analysis.settings import setting
from longctx.results import BenchmarkResult

LAUNCH_BOUND = "launch_bound"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One block in one setting. setting: what curves must share to be compared, length aside."""

    name: str
    """The block, with whatever else differs between the rows of the run."""
    block: str
    setting: tuple
    rows: dict[int, BenchmarkResult]
    """Its ok rows by length, shortest first."""
    failed: tuple[int, ...] = ()
    """Lengths that gave no figure."""

    @property
    def bound(self) -> tuple[int, ...]:
        """Lengths whose time is that of launching kernels."""
        return tuple(t for t, row in self.rows.items() if LAUNCH_BOUND in row.warnings)

    def values(self, metric: str) -> dict[int, float]:
        """length -> value of `metric` (time, memory), in SI units, where there is one."""
        read = METRICS[metric].value
        return {t: value for t, row in self.rows.items() if (value := read(row)) is not None}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a curve grows: laws or local slopes of its time and peak memory.

    said: in words, why its time has no exponent, empty where it has one. missing: the lengths that would give its
    time a law.
    """

    curve: Curve
    time: Law | None
    memory: Law | None
    said: str = ""
    missing: tuple[int, ...] = ()


def curves(results: Iterable[BenchmarkResult]) -> list[Curve]:
    """The curves of a run in the order of its rows; of two rows for the same point the later one counts."""
    results = list(results)
    found: dict[tuple, dict[int, BenchmarkResult]] = {}
    names: dict[tuple, str] = {}
    for result, name in zip(results, names_of(results), strict=True):
        # Rows that differ in nothing that a name shows are still no curve together: two devices, say.
        key = (name, str(result.block_name), setting(result))
        found.setdefault(key, {})[result.sequence_length] = result
        names[key] = name
    made = []
    for key, rows in found.items():
        ok = {t: rows[t] for t in sorted(rows) if rows[t].ok}
        failed = tuple(t for t in sorted(rows) if not rows[t].ok)
        if ok:
            made.append(Curve(name=names[key], block=key[1], setting=key[2], rows=ok, failed=failed))
    return made


def growths(found: Iterable[Curve]) -> list[Growth]:
    """Laws of time and memory of every curve that has two lengths."""
    return [growth(curve) for curve in found if len(curve.rows) > 1]


def growth(curve: Curve) -> Growth:
    """The law or local slope of one curve's time and memory, or why there is none."""
    times, bound = curve.values("time"), curve.bound
    samples = {t: row.samples for t, row in curve.rows.items()}
    time = fit(times, samples, bound=bound, failed=curve.failed)
    peaks = curve.values("memory")
    memory = fit(peaks, failed=curve.failed)
    if memory and time and not (memory.is_law or time.is_law):
        # Slopes of one line of a table are of the same lengths.
        memory = fit({t: peak for t, peak in peaks.items() if time.shortest <= t <= time.longest}, failed=curve.failed)
    said, missing = "", time.missing if time else ()
    if time is None and times:
        missing = missing_lengths(sorted(times), bound=bound, failed=curve.failed) if len(times) > 1 else ()
        free = len(set(times) - set(bound))
        part = "" if not free else "mostly " if 2 * free < len(times) else "partly "
        said = f"{part}launch-bound" if bound else "one length"
    return Growth(curve=curve, time=time, memory=memory, said=said, missing=missing)


def base_curve(curve: Curve, found: Sequence[Curve], is_base: Callable[[Curve], bool]) -> Curve | None:
    """The first other curve of the same setting for which `is_base` holds."""
    return next((c for c in found if c is not curve and c.setting == curve.setting and is_base(c)), None)
