"""The roofline as text: a picture on log axes, a marker a block under the roof of the machine, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longctx.analysis.roofline import Roof, RoofPoint, longest_points, roof_points
from longctx.analysis.series import Series, places_of
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt
from longctx.terminal.format import FLOP_RATES, Unit
from longctx.terminal.layout import Column, layout
from longctx.terminal.plots import (
    COLOR_CODES,
    MIN_WIDTH,
    PlotText,
    StyledCurve,
    packed,
    padded,
    styled,
    to_ascii,
    value_ticks,
)

if TYPE_CHECKING:
    from rich.text import Text

Trails = dict[str, list[RoofPoint]]
"""The points of each curve by its name, the shortest length first."""
ROOF = "▀"
ROOFLINE_HEAD = "Roofline at the longest length: what the work needs at least, and the part of it reached"
_ROOF_CODE = 8


def roofline_plot(
    results: Sequence[BenchmarkResult],
    roof: Roof,
    *,
    width: int,
    height: int,
    places: Mapping[int, int] | None = None,
    title: str = "Roofline",
    color: bool = True,
    ascii_only: bool = False,
) -> PlotText:
    """Rate over intensity, each block's lengths as a trail that ends in its marker at the longest.

    results: rows of one number format, that of `roof`. places: as `scaling_plot` takes them. Under 40 columns a table
    takes the place of the picture.
    """
    from rich.text import Text

    points = roof_points(results)
    unit = next((u for u in FLOP_RATES if roof.flops >= u.size), FLOP_RATES[-1])
    named: Trails = {}
    for point in sorted(points, key=lambda point: point.length):
        named.setdefault(point.name, []).append(point)
    heading = f"{title}: {unit.name} over FLOP/byte"
    caption = f"{ROOF * 2} roof: {fmt.number(roof.flops / unit.size)} {unit.name}, {fmt.memory(roof.bytes)}/s; "
    caption += f"they meet at {fmt.number(roof.ridge)} FLOP/byte"
    legend, body = Text(), Text("Nothing to draw: no row has a time and a cost model.")
    if named and width < MIN_WIDTH:
        body = roofline_table(results, width, ascii_only=ascii_only)
    elif named:
        looks = _looks(named, places_of({"": results}) if places is None else places)
        body = Text.from_ansi(_draw(named, looks, roof, unit, width, max(height, 8), color=color), no_wrap=True)
        legend = _legend(named, looks, unit, width, color=color)
    parts = {"title": Text(heading, style="bold"), "body": body, "legend": legend, "caption": Text(caption)}
    if ascii_only:
        # The roof must stay apart from the frame.
        parts = {name: to_ascii(Text(part.plain.replace(ROOF, "="))) for name, part in parts.items()}
    return PlotText(**parts)


def _draw(
    named: Trails, looks: Mapping[str, StyledCurve], roof: Roof, unit: Unit, width: int, height: int, *, color: bool
) -> str:
    import plotext

    points = [point for trail in named.values() for point in trail]
    across = [math.log10(point.intensity) for point in points]
    # The ridge belongs into the picture: it tells which of the two limits holds.
    x_range = padded([*across, math.log10(roof.ridge / 3)], 1.0)
    tops = [math.log10(roof.at(10**x) / unit.size) for x in x_range]
    y_range = padded([*(math.log10(point.rate / unit.size) for point in points), *tops], 1.0)
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if color else "colorless")
    figure.plot_size(width, height)
    figure.legend(False)
    corners = sorted({x_range[0], min(max(math.log10(roof.ridge), x_range[0]), x_range[1]), x_range[1]})
    heights = [math.log10(roof.at(10**x) / unit.size) for x in corners]
    marker = plotext.marker(ROOF, _ROOF_CODE if color else None)
    figure.draw(figure.signal(corners, heights, marker=marker).lines())
    for layer in ("trail", "end"):
        for name, trail in named.items():
            code = COLOR_CODES[looks[name].color] if color else None
            xs = [math.log10(point.intensity) for point in trail]
            ys = [math.log10(point.rate / unit.size) for point in trail]
            if layer == "end":
                figure.draw(figure.signal(xs[-1:], ys[-1:], marker=plotext.marker(looks[name].marker, code)))
            elif len(xs) > 1:
                figure.draw(figure.signal(xs, ys, marker=plotext.marker("braille", code)).lines())
    for axis, limits, rows in (("x", x_range, width // 4), ("y", y_range, height - 4)):
        marks = value_ticks(*limits, rows=rows)
        figure.ruler(axis).ticks([position for position, _ in marks], [label for _, label in marks])
        figure.ruler(axis).lim(*limits)
    return figure.build().string().rstrip("\n")


def _looks(named: Trails, places: Mapping[int, int]) -> dict[str, StyledCurve]:
    return {name: styled(places[id(trail[-1].row)], Series(name=name)) for name, trail in named.items()}


def _legend(named: Trails, looks: Mapping[str, StyledCurve], unit: Unit, width: int, *, color: bool) -> Text:
    from rich.text import Text

    entries = []
    for name, trail in sorted(named.items(), key=lambda item: -item[1][-1].rate):
        last = trail[-1]
        words = f" {looks[name].name} {fmt.number(last.rate / unit.size)} at {fmt.tokens(last.length)}"
        words += f", {fmt.percent(last.fraction)} of the roof" if last.fraction else ""
        entries.append(Text().append(looks[name].marker, style=looks[name].color if color else "").append(words))
    return packed(entries, width)


def roofline_columns(results: Sequence[BenchmarkResult]) -> list[Column]:
    """Every block at its longest length: intensity, rate, least time that its work needs here, part of it reached."""
    points = longest_points(results)
    if not points:
        return []
    unit = fmt.column_unit((point.rate for point in points), FLOP_RATES)
    columns = [
        Column(header="block", cells=[fmt.plain(p.name) for p in points], right=False, flexible=True),
        Column(header="tokens", cells=[fmt.tokens(p.length) for p in points]),
        Column(header="FLOP/byte", cells=[fmt.number(p.intensity) for p in points], keep=4),
        Column(header=unit.name, cells=[unit.text(p.rate) for p in points], keep=3),
        Column(header="time", cells=[fmt.duration(p.time_s) for p in points], keep=1),
        Column(header="least time", cells=[fmt.duration(p.least_s) for p in points], keep=2),
        Column(header="of the roof", cells=[fmt.percent(p.fraction) for p in points]),
    ]
    return [c for c in columns if c.keep is None or set(c.cells) != {fmt.NONE}]


def has_roof(results: Sequence[BenchmarkResult]) -> bool:
    """Whether what the machine can reach is known of any row."""
    return any(point.fraction for point in longest_points(results))


def roofline_table(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """The same as a table."""
    from rich.text import Text

    columns = roofline_columns(results)
    return layout(columns, width, ascii_only=ascii_only) if columns else Text()
