"""`longctx plot --watch`: the picture of a file that a sweep elsewhere is writing, drawn again whenever it changes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from rich.console import Group

LOOK_S = 0.5
"""Seconds between two looks at the file's date: a look costs microseconds, and a cell takes seconds."""


def watch_file(
    runs: Sequence[str], metrics: Sequence[str] | None, *, save: Path | None, x: str | None, results_dir: str
) -> None:
    """Draw the one file of `runs`, or the newest sweep, until its sweep is over; Ctrl-C ends it too. metrics: None for
    the first picture that can be drawn.

    Raises UsageError where there is no terminal to draw on again and again.
    """
    from longctx.analysis.runs import named_file
    from longctx.engine.locks import holder
    from longctx.results import last_results_path
    from longctx.terminal.console import result_console

    console = result_console()
    if save is not None:
        raise UsageError("--watch draws on the terminal and saves nothing", "leave out one of --watch and --save")
    if not console.is_interactive:
        raise UsageError("--watch needs a terminal to draw on", "without --watch the picture goes to a pipe or a file")
    if len(runs) > 1:
        raise UsageError("--watch takes one file", "name the one that the sweep is writing")
    path = named_file(runs[0], results_dir=results_dir) if runs else last_results_path(results_dir)
    if path is None:
        raise ResultsError(f"there are no results under {results_dir!r} yet", "name the file that the sweep will write")
    lock = f"file {path.resolve()}"
    began = holder(lock) is not None
    if not began and not path.exists():
        raise ResultsError(f"there is no file {path}, and no sweep is writing one", "begin the sweep first")
    from rich.live import Live

    drawn: tuple | None = None
    # Another screen: what was there before comes back at the end, and nothing is left half drawn.
    with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            over, state = holder(lock) is None, (_date(path), console.size)
            if state != drawn:
                live.update(_picture(path, metrics, x, over=over), refresh=True)
                drawn = state
            if over:
                break
            time.sleep(LOOK_S)
    console.print(_picture(path, metrics, x, over=True))


def _date(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _picture(path: Path, metrics: Sequence[str] | None, x: str | None, *, over: bool) -> Group:
    """The pictures that fit on the screen, and a line that says how far the sweep is."""
    from rich.console import Group
    from rich.text import Text

    from longctx.analysis.runs import load_runs
    from longctx.cli._pictures import draw
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.format import plain
    from longctx.terminal.plots import plot_size

    console = result_console()
    if not path.exists():
        return Group(Text(f"{plain(path)}: nothing is saved yet"))
    rows = load_runs([path], results_dir=".")
    width, height = plot_size(console.width)
    height = min(height, max(6, console.height - 8))
    pictures = draw(
        rows, metrics, width, height, x=x, most=1 if metrics is None else None, ascii_only=ascii_only(console)
    )
    count = sum(map(len, rows.values()))
    words = "the sweep is over" if over else f"at {time.strftime('%H:%M:%S')}, goes on; Ctrl-C ends the watching only"
    last = Text(f"{plain(path)}: {count} row{'' if count == 1 else 's'}, {words}", style="dim")
    if over:
        return Group(*pictures, last)
    fitting, room = [], console.height - 2
    for picture in pictures:
        room -= len(picture.plain.splitlines())
        if fitting and room < 0:
            break
        fitting.append(picture)
    return Group(*fitting, last)
