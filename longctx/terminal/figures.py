"""The pictures as figures for papers: the one file that knows matplotlib, which the extra `figures` brings.

One page, a panel for every metric of every mode, as the pictures in the terminal have them: log axes, 95% bars, slopes
of T and T², a legend, and below all what machine it was. Blocks differ by marker and line, not by colour alone.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.analysis.roofline import Roof, roof_points
from longctx.analysis.series import Series, collect, metric_for, places_of
from longctx.analysis.x_axis import LENGTH, XAxis
from longctx.errors import MissingError, ResultsError
from longctx.results import BenchmarkResult
from longctx.terminal.format import Unit, plain, shorten, tokens
from longctx.terminal.plots import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".pdf")
PANEL_INCHES = (4.6, 3.4)
DPI = 200
# Okabe and Ito's colours, which the colour-blind tell apart; yellow is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric of one mode. roof: of a roofline, whose rows are of one number format. places: as `places_of` has them
    of the rows of all panels."""

    metric: str
    runs: Mapping[str, Sequence[BenchmarkResult]]
    x: XAxis = field(default=LENGTH)
    roof: Roof | None = None
    title: str = ""
    places: Mapping[int, int] | None = None

    def look(self, row: BenchmarkResult) -> dict[str, Any]:
        """Colour, marker and line of the curve that `row` is of."""
        places = places_of(self.runs, self.x) if self.places is None else self.places
        return _look(places[id(row)])


def check_matplotlib() -> None:
    """Raises MissingError where the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingError(
            ".png and .pdf need matplotlib", "pip install 'longctx[figures]', or save as .svg, .html or .txt"
        ) from None


def save_figure(panels: Sequence[Panel], path: Path, *, caption: str) -> None:
    """Write `panels` as one page, whole or not at all. Raises MissingError without matplotlib, ResultsError when it
    cannot be written."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Names are shown as they are: a $ in one is no formula.
    with matplotlib.rc_context(
        {"text.parse_math": False, "pdf.fonttype": 42, "font.size": 8, "svg.hashsalt": "longctx"}
    ):
        size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for panel, place in zip(panels, axes.flat, strict=False):
            (_roofline if panel.roof else _curves)(panel, place)
        for place in list(axes.flat)[len(panels) :]:
            place.set_axis_off()
        figure.supxlabel(caption, fontsize=6, color="0.35", wrap=True)
        _write(
            path,
            lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=DPI, metadata=_about(path, caption)),
        )


def _about(path: Path, caption: str) -> dict[str, str]:
    key = "Description" if path.suffix.lower() == ".png" else "Subject"
    return {"Title": "longctx plot", key: caption}


def _write(path: Path, save: Callable[[io.BytesIO], Any]) -> None:
    buffer = io.BytesIO()
    save(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}", "choose another place") from error


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLORS) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _label(name: str) -> str:
    text = shorten(plain(name), 40)
    # matplotlib leaves names that begin so out of a legend.
    return f" {text}" if text.startswith("_") else text


def _curves(panel: Panel, axes: Axes) -> None:
    metric = metric_for(panel.metric, [row for rows in panel.runs.values() for row in rows])
    curves, missing = collect(panel.runs, metric, panel.x)
    unit = unit_of(metric.kind, [value for curve in curves for _, value in curve.points])
    places = sorted({place for curve in curves for place, _ in curve.points})
    for curve in curves:
        look = panel.look(next(iter(curve.rows.values())))
        xs, ys = [place for place, _ in curve.points], [value / unit.size for _, value in curve.points]
        axes.errorbar(xs, ys, yerr=_errors(curve, unit), capsize=2, label=_label(curve.name), **look)
    if curves:
        _log_axes(axes)
        axes.set_xticks(places, [_place(panel.x, place) for place in places], minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        if len(places) > 8:
            axes.tick_params(axis="x", labelrotation=60)
        if panel.metric in ("time", "scaling") and panel.x.name == LENGTH.name and len(places) > 1:
            _slopes(curves, unit, places, axes)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: labels[index].startswith("slope of"))
        axes.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=6, frameon=False)
    else:
        axes.text(0.5, 0.5, "no row has this figure", ha="center", transform=axes.transAxes)
    axes.set_title(metric.title, fontsize=8)
    axes.set_xlabel("sequence length (tokens)" if panel.x.name == LENGTH.name else panel.x.title)
    title = metric.title.partition(" (")[0]
    axes.set_ylabel(f"{title[0].lower()}{title[1:]} ({unit.name.replace('us', 'µs')})")
    if missing and curves:
        words = dict.fromkeys(f"{m.name}: {m.reason}" + (f" at {_place(panel.x, m.x)}" if m.x else "") for m in missing)
        axes.text(0.02, 0.02, shorten(plain("; ".join(words)), 64), fontsize=5, color="0.35", transform=axes.transAxes)


def _errors(curve: Series, unit: Unit) -> list[list[float]]:
    """Lengths of the bars below and above each point: its 95% interval, nothing where it has none."""
    below, above = [], []
    for place, value in curve.points:
        low, high = curve.intervals.get(place, (value, value))
        below.append(max(0.0, value - low) / unit.size)
        above.append(max(0.0, high - value) / unit.size)
    return [below, above]


def _slopes(curves: Sequence[Series], unit: Unit, places: Sequence[float], axes: Axes) -> None:
    start, end = places[0], places[-1]
    least = min(curve.points[0][1] for curve in curves) / unit.size
    top = 2 * max(value for curve in curves for _, value in curve.points) / unit.size
    for exponent, dots, name in ((1, ":", "T"), (2, (0, (5, 3, 1, 3)), "T²")):
        reach = min(end, start * (top / least) ** (1 / exponent))
        values = [least, least * (reach / start) ** exponent]
        axes.plot(
            [start, reach], values, linestyle=dots, color="0.6", linewidth=0.8, label=f"slope of {name}", zorder=0
        )


def _roofline(panel: Panel, axes: Axes) -> None:
    roof = panel.roof
    named: dict[str, list] = {}
    for point in sorted(roof_points([row for rows in panel.runs.values() for row in rows]), key=lambda p: p.length):
        named.setdefault(point.name, []).append(point)
    everything = [point for trail in named.values() for point in trail]
    unit = unit_of("FLOP/s", [roof.flops])
    xs = [*(p.intensity for p in everything), roof.ridge / 3]
    low, high = min(xs) / 1.3, max(*xs, roof.ridge) * 1.3
    corners = [low, roof.ridge, high]
    axes.plot(corners, [roof.at(x) / unit.size for x in corners], color="0.3", linewidth=1.5, label="roof, measured")
    for name, trail in named.items():
        look = panel.look(trail[-1].row)
        axes.plot([p.intensity for p in trail], [p.rate / unit.size for p in trail], label=_label(name), **look)
        axes.annotate(tokens(trail[-1].length), (trail[-1].intensity, trail[-1].rate / unit.size), fontsize=5)
    _log_axes(axes)
    axes.set_title(panel.title or "Roofline", fontsize=8)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel(f"rate ({unit.name})")
    axes.legend(fontsize=6, frameon=False)


def _log_axes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        wide = math.log10(high / low) > 2.5
        # Powers as 10^3 would be formulas, which names of strangers must not be.
        axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _place(x: XAxis, value: float) -> str:
    if x.name == LENGTH.name:
        return tokens(int(value))
    return x.categories.get(value, "?") if x.categories else f"{value:g}"
