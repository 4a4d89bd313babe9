"""Scaling curves as text: with roofline.py beside it, the one file that knows plotext.

plotext is given only finite numbers whose logarithm was taken here (its kernel aborts the process at a NaN,
and its own log axis loses explicit ticks), never prints by itself, and its colours pass through Rich, which
drops them for pipes and NO_COLOR. Curves differ by marker, not by colour alone; the legend is ordered as the
curves end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.analysis.curves import Curve, growth
from longctx.analysis.series import Missing, Series, collect, metric_for, places_of
from longctx.analysis.x_axis import LENGTH, XAxis
from longctx.results import BenchmarkResult
from longctx.terminal.format import (
    BYTES,
    ENERGIES,
    FLOP_RATES,
    RATES,
    SECONDS,
    Unit,
    number,
    plain,
    short_names,
    shorten,
    tokens,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

MIN_WIDTH, MAX_WIDTH = 40, 100
MIN_HEIGHT, MAX_HEIGHT = 12, 20
MARKERS = "●■▲◆○□△◇▼▽+x$abcdefghijkmnpqrstuwyzBCDEFGHIJKLMNPQRSTUVWZ"
# ANSI colours that are legible on light and dark backgrounds, in the order in which curves take them.
COLORS = ("blue", "red", "green", "magenta", "cyan", "yellow")
COLOR_CODES = {"blue": 4, "red": 1, "green": 2, "magenta": 5, "cyan": 6, "yellow": 3}
_GREY = 8
NAME_WIDTH = 48
BAR = "┃"
"""A 95% interval; drawn where it is wider than the character that marks the point."""
REFERENCES = {1: "·", 2: ":"}
"""Exponent -> the character that its line is made of."""

_UNITS = {
    "s": SECONDS,
    "bytes": BYTES,
    "bytes/token": tuple(Unit(name=f"{unit.name}/token", size=unit.size) for unit in BYTES),
    "tokens/s": RATES,
    "FLOP/s": FLOP_RATES,
    "J/token": ENERGIES,
}
_STATUS_WORDS = {"oom": "OOM"}
# Each marker has a character of its own here too, and none is that of a line, a bar or a roof.
_ASCII = str.maketrans("─│┃┌┐└┘├┤┬┴┼·●■▲◆○□△◇▼▽…", "-||+++++++++.*#^%o@A&vY~")


@dataclass(kw_only=True)
class StyledCurve(Series):
    """A curve with its look: a block keeps marker and colour in all pictures of one output."""

    marker: str
    color: str


@dataclass(frozen=True, kw_only=True)
class PlotText:
    """A drawn plot: title, picture, legend and caption, printable by Rich and readable as plain text."""

    title: Text
    body: Text
    legend: Text
    caption: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in (self.title, self.body, self.legend, self.caption):
            if part.plain:
                yield part

    @property
    def plain(self) -> str:
        return "\n".join(p.plain for p in (self.title, self.body, self.legend, self.caption) if p.plain)


def plot_size(console_width: int) -> tuple[int, int]:
    """(width, height) in characters of a plot that suits a console of this width."""
    width = max(1, min(console_width, MAX_WIDTH))
    return width, max(MIN_HEIGHT, min(width // 5, MAX_HEIGHT))


def scaling_plot(
    results: Sequence[BenchmarkResult] | Mapping[str, Sequence[BenchmarkResult]],
    *,
    metric: str,
    width: int,
    height: int,
    x: XAxis = LENGTH,
    places: Mapping[int, int] | None = None,
    title: str | None = None,
    color: bool = True,
    ascii_only: bool = False,
) -> PlotText:
    """Draw `metric` (time, throughput, memory, memory-per-token, scaling) over sequence length, or another `x`.

    results: the rows of a run, or of several under a label each, which are then laid over each other. places: as
    `places_of` has them of all rows that are drawn, where there are other pictures beside this one. Rows
    without a figure are named in the caption. One length alone is drawn as bars; under 40 columns a table
    takes the place of the picture. Names and labels are shown as plain text whatever they hold.
    """
    from rich.text import Text

    runs = results if isinstance(results, Mapping) else {"": results}
    chosen = metric_for(metric, [row for rows in runs.values() for row in rows])
    curves, missing = collect(runs, chosen, x)
    over_length = x.name == LENGTH.name
    places = places_of(runs, x) if places is None else places
    looks = [styled(places[id(next(iter(curve.rows.values())))], curve) for curve in curves]
    curves = sorted(looks, key=lambda curve: (-curve.points[-1][0], -curve.points[-1][1]))
    unit = unit_of(chosen.kind, [value for curve in curves for _, value in curve.points])
    scale = unit.size
    lengths = sorted({length for curve in curves for length, _ in curve.points})

    name = _name(title) if title else chosen.title
    heading = f"{name} ({unit.name}) over {x.title}"
    caption = _caption(missing, x)
    legend = Text()
    if not curves:
        body = Text("Nothing to draw: no row has this figure.")
    elif width < MIN_WIDTH:
        body = _table(curves, lengths, scale, x)
    elif len(lengths) == 1:
        heading = f"{name} ({unit.name}) at {_place(x, lengths[0])}"
        body = _bars(curves, scale, width)
    else:
        slopes = metric == "scaling" and over_length
        drawn = _draw(curves, lengths, scale, width, max(height, 6), x=x, references=slopes, color=color)
        body = Text.from_ansi(drawn, no_wrap=True)
        legend = _legend(curves, scale, width, x=x, slopes=slopes, bars=BAR in body.plain, color=color)
    parts = {"title": Text(heading, style="bold"), "body": body, "legend": legend, "caption": caption}
    if ascii_only:
        parts = {name: to_ascii(part) for name, part in parts.items()}
    return PlotText(**parts)


def unit_of(kind: str, values: Sequence[float]) -> Unit:
    """The largest unit in which the middle value is at least 1: a logarithmic axis reaches far to both sides."""
    middle = sorted(values)[len(values) // 2] if values else 1.0
    return next((unit for unit in _UNITS[kind] if middle >= unit.size), _UNITS[kind][-1])


def _name(text: object) -> str:
    return shorten(plain(text), NAME_WIDTH)


def styled(index: int, curve: Series) -> StyledCurve:
    return StyledCurve(
        name=_name(curve.name),
        points=curve.points,
        intervals=curve.intervals,
        rows=curve.rows,
        marker=MARKERS[index % len(MARKERS)],
        color=COLORS[index % len(COLORS)],
    )


def _draw(
    curves: Sequence[StyledCurve],
    lengths: Sequence[int],
    scale: float,
    width: int,
    height: int,
    *,
    x: XAxis,
    references: bool,
    color: bool,
) -> str:
    import plotext

    x_range = padded([math.log10(length) for length in lengths], 0.0)
    y_range = padded([math.log10(value / scale) for curve in curves for _, value in curve.points], 0.3)
    drawn = (height - 4) / (y_range[1] - y_range[0])
    ends = [end for curve in curves for pair in _bars_wider_than(curve, 1 / drawn).values() for end in pair]
    # Room for the bars, but not so much that one wild row presses the curves flat.
    if ends:
        room = 0.3 * (y_range[1] - y_range[0])
        low, high = math.log10(min(ends) / scale), math.log10(max(ends) / scale)
        y_range = (max(min(y_range[0], low), y_range[0] - room), min(max(y_range[1], high), y_range[1] + room))
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if color else "colorless")
    figure.plot_size(width, height)
    figure.legend(False)
    if references:
        start = math.log10(lengths[0]), min(math.log10(c.points[0][1] / scale) for c in curves)
        for exponent, dot in REFERENCES.items():
            ends = _reference(start, exponent, x_range[1], y_range[1])
            figure.draw(figure.signal(*ends, marker=plotext.marker(dot, _GREY if color else None)).lines())
    row = (y_range[1] - y_range[0]) / max(1, height - 4)
    for layer in ("line", "bars", "points"):
        for curve in curves:
            code = COLOR_CODES[curve.color] if color else None
            across = [math.log10(length) for length, _ in curve.points]
            y = [math.log10(value / scale) for _, value in curve.points]
            if layer == "points":
                figure.draw(figure.signal(across, y, marker=plotext.marker(curve.marker, code)))
            elif layer == "bars":
                for length, ends in _bars_wider_than(curve, row).items():
                    at = [math.log10(length)] * 2
                    ends = [min(max(math.log10(end / scale), y_range[0]), y_range[1]) for end in ends]
                    figure.draw(figure.signal(at, ends, marker=plotext.marker(BAR, code)).lines())
            elif len(across) > 1:
                figure.draw(figure.signal(across, y, marker=plotext.marker("braille", code)).lines())
    ticks = value_ticks(*y_range, rows=height - 4)
    canvas = width - 2 - max(len(label) for _, label in ticks)
    x_ticks = _x_ticks(lengths, x_range, canvas, x)
    for axis, limits, marks in (("x", x_range, x_ticks), ("y", y_range, ticks)):
        figure.ruler(axis).ticks([position for position, _ in marks], [label for _, label in marks])
        figure.ruler(axis).lim(*limits)
    return figure.build().string().rstrip("\n")


def _bars_wider_than(curve: Series, decades: float) -> dict[int, tuple[float, float]]:
    """length -> 95% interval, for the points where it is wider than `decades` and holds the point."""
    return {
        length: curve.intervals[length]
        for length, value in curve.points
        if length in curve.intervals
        and curve.intervals[length][0] <= value <= curve.intervals[length][1]
        and math.log10(curve.intervals[length][1]) - math.log10(curve.intervals[length][0]) > decades
    }


def padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """A range around `values`, at least `least` wide, with a twentieth of it to spare on both sides."""
    low, high = min(values), max(values)
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _reference(start: tuple[float, float], exponent: int, right: float, top: float) -> tuple[list[float], list[float]]:
    """The line of slope `exponent` from `start` to the edge of the picture, both axes logarithmic."""
    x0, y0 = start
    reach = min(right - x0, (top - y0) / exponent)
    return [x0, x0 + reach], [y0, y0 + exponent * reach]


def value_ticks(low: float, high: float, *, rows: int) -> list[tuple[float, str]]:
    """Ticks (log10 position, label) from 10^low to 10^high: decades, else 1-2-5, else finer, as rows let."""
    for mantissas in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(m / 20 for m in range(20, 200))):
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [d + math.log10(m) for d in decades for m in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [low + (high - low) * share for share in (0.1, 0.5, 0.9)]
    stride = max(1, math.ceil(2 * len(ticks) / max(2, rows)))
    return [(tick, _tick_label(10**tick)) for tick in ticks[::stride]]


def _tick_label(value: float) -> str:
    label = number(value)
    return label.rstrip("0").rstrip(".") if "." in label and "e" not in label else label


def _label(x: XAxis, value: float) -> str:
    """A value of the x axis as it stands below a picture."""
    if x.name == LENGTH.name:
        return tokens(int(value))
    return x.categories.get(value, "?") if x.categories else f"{value:g}"


def _place(x: XAxis, value: float) -> str:
    """The same in a sentence: `64K tokens`, `batch 4`."""
    return f"{_label(x, value)} tokens" if x.name == LENGTH.name else f"{x.title} {_label(x, value)}"


def _x_ticks(lengths: Sequence[float], limits: tuple[float, float], columns: int, x: XAxis) -> list[tuple[float, str]]:
    """The measured lengths as ticks, leaving out those whose label would touch its neighbour's."""
    low, high = limits
    kept: list[tuple[float, str]] = []
    taken = -math.inf
    for length in reversed(lengths):
        position = math.log10(length)
        column, label = (high - position) / (high - low) * columns, _label(x, length)
        if column - len(label) / 2 >= taken + 1:
            kept.append((position, label))
            taken = column + len(label) / 2
    return kept[::-1]


def _legend(
    curves: Sequence[StyledCurve], scale: float, width: int, *, x: XAxis, slopes: bool, bars: bool, color: bool
) -> Text:
    """Marker, name and last value of every curve, as they end from top to bottom; entries are not broken."""
    from rich.text import Text

    longest = max(curve.points[-1][0] for curve in curves)
    entries = []
    for curve in curves:
        length, value = curve.points[-1]
        words = f" {curve.name} {number(value / scale)}"
        words += f" at {_label(x, length)}" if length < longest else ""
        words += _exponent(curve) if slopes else ""
        entries.append(Text().append(curve.marker, style=curve.color if color else "").append(words))
    if slopes:
        entries.append(Text("··· T   ::: T²"))
    if bars:
        entries.append(Text(f"{BAR} 95% interval"))
    return packed(entries, width)


def _exponent(curve: Series) -> str:
    """`, T^1.98` of a law, `, local slope 1.95` of too few lengths for one: as the report has it of the same rows."""
    rows = {int(length): row for length, row in curve.rows.items()}
    found = growth(Curve(name=curve.name, block=curve.name, setting=(), rows=rows))
    if found.time is None:
        return f", {found.said}" if found.said and len(rows) > 1 else ""
    return f", {'T^' if found.time.is_law else 'local slope '}{found.time.exponent:.2f}"


def packed(entries: Sequence[Text], width: int) -> Text:
    """The entries of a legend, as many in a line as fit."""
    from rich.text import Text

    legend, used = Text(), 0
    for entry in entries:
        if used:
            fits = used + 3 + entry.cell_len <= width
            legend.append("   " if fits else "\n")
            used = used + 3 if fits else 0
        legend.append_text(entry)
        used += entry.cell_len
    return legend


def _bars(curves: Sequence[StyledCurve], scale: float, width: int) -> Text:
    """One length: a bar a block, longest value first, from zero."""
    from rich.text import Text

    values = [curve.points[-1][1] / scale for curve in curves]
    labels = [number(value) for value in values]
    short = short_names((curve.name for curve in curves), max(8, width // 3))
    names = [short[curve.name] for curve in curves]
    left, right = max(map(len, names)), max(map(len, labels))
    room = max(4, width - left - right - 3)
    lines = [
        f"{name:<{left}} {label:>{right}} {'━' * max(1, round(room * value / max(values)))}"
        for name, label, value in zip(names, labels, values, strict=True)
    ]
    return Text("\n".join(lines), no_wrap=True)


def _table(curves: Sequence[StyledCurve], lengths: Sequence[float], scale: float, x: XAxis) -> Text:
    """The figures in place of a picture, for a screen too narrow to draw on."""
    from rich.text import Text

    lines = []
    for curve in curves:
        values = dict(curve.points)
        lines.append(curve.name)
        lines += [f"  {_label(x, t):>6}  {number(values[t] / scale)}" for t in lengths if t in values]
    return Text("\n".join(lines))


def _caption(missing: Sequence[Missing], x: XAxis) -> Text:
    """Rows without a point, shortest length first, places with the same names together: `OOM at 128K: Dense`."""
    from rich.text import Text

    groups: dict[tuple[str, float | None], list[str]] = {}
    for row in missing:
        groups.setdefault((row.reason, row.x), []).append(_name(row.name))
    places: dict[tuple[str, tuple[str, ...]], list[float | None]] = {}
    for (reason, value), names in groups.items():
        places.setdefault((reason, tuple(names)), []).append(value)
    lines = []
    for (reason, names), values in places.items():
        place = ", ".join(_label(x, value) for value in values if value is not None)
        where = f" at {'' if x.name == LENGTH.name else f'{x.title} '}{place}" if place else ""
        lines.append(f"{_STATUS_WORDS.get(reason, _name(reason))}{where}: {', '.join(names)}")
    return Text("\n".join(lines))


def to_ascii(text: Text) -> Text:
    """The same text in ASCII, for terminals that cannot show more; dots of a curve become full stops."""
    text = text.copy()
    plain = text.plain.translate(_ASCII).replace("²", "^2").replace("━", "=")
    text.plain = "".join(c if c.isascii() else "." if 0x2800 <= ord(c) <= 0x28FF else "?" for c in plain)
    return text
