"""What a finished sweep prints: its tables, plots and conclusions, and how to get them again."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from longctx.results import BenchmarkResult


def show(console: Console, results: list[BenchmarkResult], environment: dict[str, Any]) -> None:
    """Environment, tables, notes, scaling plots and ranking of a finished sweep."""
    from rich.text import Text

    from longctx.analysis.series import places_of
    from longctx.analysis.settings import by_mode
    from longctx.analysis.x_axis import natural_x
    from longctx.terminal.console import ascii_only
    from longctx.terminal.findings import short_form
    from longctx.terminal.prose import say
    from longctx.terminal.tables import environment_line, mode_tables, notes, one_dtype, ranked_by_ratio, ranking_lines

    plain = ascii_only(console)
    say(console, environment_line(environment, one_dtype(results)))
    console.print()
    console.print(mode_tables(results, console.width, ascii_only=plain))
    if len(said := notes(results, ascii_only=plain)):
        console.print()
        say(console, said)
    places = places_of({"": results}, natural_x(results))
    for rows in by_mode(results).values():
        x = natural_x(rows)
        if len({x.value(result) for result in rows if result.ok}) > 1:
            from longctx.terminal.plots import plot_size, scaling_plot

            width, height = plot_size(console.width)
            color = console.is_terminal and not console.no_color
            console.print()
            look = {"width": width, "height": height, "color": color, "ascii_only": plain, "places": places}
            console.print(scaling_plot(rows, metric="time", x=x, **look))
    if len(ranking := ranking_lines(results, console.width, ascii_only=plain)):
        console.print()
        base = "time over Dense's, the median of same-round ratios"
        say(console, Text(f"Fastest first, {base}:" if ranked_by_ratio(results) else "Fastest first:", style="bold"))
        console.print(ranking)
    if len(said := short_form(results, console.width, ascii_only=plain)):
        console.print()
        console.print(said)


def tail(console: Console, view: Any, command: str) -> None:
    """What ended a sweep early, where it is saved, and the command that makes it again."""
    from rich.text import Text

    from longctx.terminal import format as fmt
    from longctx.terminal.prose import say

    console.print()
    # A file is written with its first row.
    path = view.path if view.rows else None
    if not view.complete and view.finished.reason:
        missing = len(view.cells) - view.rows
        left = f", {missing} of {len(view.cells)} cells not measured" if missing > 0 else ""
        say(console, Text(f"not complete: {fmt.plain(view.finished.reason)}{left}", style="yellow"))
        if path:
            again = f"{command} --output-file {shlex.quote(path)} --resume"
            console.print(Text(f"go on:     {fmt.plain(again)}"), soft_wrap=True)
    if path:
        console.print(Text(f"results:   {fmt.plain(path)}"), soft_wrap=True)
    console.print(Text(f"reproduce: {fmt.plain(command)}"), soft_wrap=True)
