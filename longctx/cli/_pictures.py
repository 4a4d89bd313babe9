"""From saved rows to pictures: one for every metric of every mode, and the roof that a roofline needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from longctx.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from longctx.analysis.roofline import Roof
    from longctx.analysis.x_axis import XAxis
    from longctx.results import BenchmarkResult
    from longctx.terminal.figures import Panel
    from longctx.terminal.plots import PlotText

PUBLISHED = ("time", "throughput", "memory", "memory-per-token", "scaling")
ROOFLINE = "roofline"


def draw(
    rows: Mapping[str, Sequence[BenchmarkResult]],
    metrics: Sequence[str] | None,
    width: int,
    height: int,
    *,
    x: str | None,
    most: int | None = None,
    ascii_only: bool = False,
) -> list[PlotText]:
    """Every metric of every mode: times of two modes have no picture in common. A roofline has number formats apart.

    metrics: None for the published ones that can be drawn, `most` of them in each mode.
    """
    from longctx.terminal.plots import scaling_plot
    from longctx.terminal.roofline import roofline_plot

    size = {"width": width, "height": height, "ascii_only": ascii_only, "places": _places(rows, x)}
    drawn = []
    for runs, found, axis in _modes(rows, x):
        for name in _chosen(runs, axis, metrics)[:most]:
            if name == ROOFLINE:
                drawn += [roofline_plot(group, roof, title=title, **size) for title, group, roof in _roofs(found)]
            else:
                drawn.append(scaling_plot(runs, metric=name, x=axis, **size))
    return drawn


def figure_panels(
    rows: Mapping[str, Sequence[BenchmarkResult]], metrics: Sequence[str] | None, *, x: str | None
) -> list[Panel]:
    """The same for a figure."""
    from longctx.terminal.figures import Panel

    panels, places = [], _places(rows, x)
    for runs, found, axis in _modes(rows, x):
        for name in _chosen(runs, axis, metrics):
            if name == ROOFLINE:
                panels += [
                    Panel(metric=name, runs={"": group}, roof=roof, title=title, places=places)
                    for title, group, roof in _roofs(found)
                ]
            else:
                panels.append(Panel(metric=name, runs=runs, x=axis, places=places))
    return panels


def _chosen(runs: Mapping[str, Sequence[BenchmarkResult]], x: XAxis, metrics: Sequence[str] | None) -> Sequence[str]:
    """The pictures asked for; if none were, those that have something to draw, else one that says why there is none."""
    from longctx.analysis.series import collect, metric_for

    if metrics is not None:
        return metrics
    rows = [row for each in runs.values() for row in each]

    def has_a_picture(name: str) -> bool:
        # Of one length the scaling is the time once more.
        least = 2 if name == "scaling" else 1
        return any(len(curve.points) >= least for curve in collect(runs, metric_for(name, rows), x)[0])

    return list(filter(has_a_picture, PUBLISHED)) or PUBLISHED[:1]


def machines_line(rows: Mapping[str, Sequence[BenchmarkResult]]) -> str:
    """The machines that the rows are from, in words."""
    from longctx.terminal.tables import environment_line

    lines = (environment_line(row.environment, row.dtype).plain for each in rows.values() for row in each)
    return "; ".join(dict.fromkeys(filter(None, lines)))


def _places(rows: Mapping[str, Sequence[BenchmarkResult]], x: str | None) -> dict[int, int]:
    """What `scaling_plot` takes as `places`, of all rows that are drawn."""
    from longctx.analysis.series import places_of
    from longctx.analysis.x_axis import LENGTH

    axes = {axis.name: axis for _, _, axis in _modes(rows, x)}
    return places_of(rows, axes.popitem()[1] if len(axes) == 1 else LENGTH)


def _modes(
    rows: Mapping[str, Sequence[BenchmarkResult]], x: str | None
) -> Iterator[tuple[dict[str, list[BenchmarkResult]], list[BenchmarkResult], XAxis]]:
    """(runs, all their rows, x axis) of every mode."""
    from longctx.analysis.settings import by_mode
    from longctx.analysis.x_axis import natural_x, x_axis

    everything = [row for each in rows.values() for row in each]
    for mode, found in by_mode(everything).items():
        runs = {label: [row for row in each if str(row.mode) == mode] for label, each in rows.items()}
        yield runs, found, natural_x(found) if x is None else x_axis(x, found)


def _roofs(rows: Sequence[BenchmarkResult]) -> list[tuple[str, list[BenchmarkResult], Roof]]:
    """(title, rows, roof) of each number format of `rows` that has kept peaks. Raises LongctxError if there is none."""
    found, lacking = [], None
    for dtype in dict.fromkeys(str(row.dtype) for row in rows):
        group = [row for row in rows if str(row.dtype) == dtype]
        try:
            roof = roof_of(group, dtype)
        except ResultsError as error:
            lacking = lacking or error
            continue
        if roof:
            found.append((f"Roofline of {group[0].mode}, {dtype}", group, roof))
    if lacking:
        if not found:
            raise lacking
        typer.echo(f"warning: {lacking.message}", err=True)
    if not found:
        raise ResultsError(
            "there is no roofline to draw: no row has a time and a cost model",
            "blocks of your own have one if they offer `cost`",
        )
    return found


def roof_of(rows: Sequence[BenchmarkResult], dtype: str) -> Roof | None:
    """The roof of the machine that measured `rows`, from its kept peaks; None if no row has a point under it.

    Raises LongctxError where the rows are of several machines, or nothing is kept of theirs.
    """
    from longctx.analysis.roofline import Roof, machines
    from longctx.engine.peaks import load_peaks, peaks_key

    found = machines(rows)
    if not found:
        return None
    if len(found) > 1:
        raise UsageError("these rows are of several machines, with a roof each", "draw them one by one")
    key = peaks_key(found[0])
    peaks = load_peaks(key)
    if peaks is None or not peaks.flops.get(dtype) or not peaks.copy_bytes:
        device = "cuda" if found[0].get("gpu") else "cpu"
        raise ResultsError(
            f"no peaks of {dtype} are kept for {key}", f"on that machine: longctx sysinfo --peaks --device {device}"
        )
    return Roof(flops=peaks.flops[dtype], bytes=peaks.copy_bytes)
