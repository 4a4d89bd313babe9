"""`longctx plot`: the pictures of saved runs, in the terminal or in a file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.cli import options
from longctx.config import BenchmarkConfig
from longctx.errors import ResultsError, UsageError, did_you_mean

if TYPE_CHECKING:
    from longctx.results import BenchmarkResult
    from longctx.terminal.plots import PlotText

ORDER = 30
METRICS = ("time", "throughput", "memory", "memory-per-token", "scaling")
SAVE_WIDTH = 100


def _complete_metrics(incomplete: str) -> list[str]:
    return [name for name in METRICS if name.startswith(incomplete)]


def plot(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Results files, laid over each other; the newest sweep if none."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME...",
            help=f"One or several of {', '.join(METRICS)}. All if not given.",
            autocompletion=_complete_metrics,
            show_default=False,
        ),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            metavar="NAME",
            help="What to draw over: length, batch_size, dtype, d_model, n_heads, or an option of a block.",
            show_default="length, or what else varies at one length",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write to a .txt, .html or .svg file instead.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that exists.", rich_help_panel=options.OUTPUT)
    ] = False,
    results_dir: options.ResultsDir = BenchmarkConfig.results_dir,
) -> None:
    """Draw saved runs: time, throughput, memory, memory per token and scaling over sequence length.

    \b
    longctx plot                                   all pictures of the newest sweep
    longctx plot --metric time memory --x batch_size
    longctx plot monday.json tuesday.json --save overlay.svg
    """
    from longctx.analysis.runs import load_runs

    metrics = check_metrics(metric or METRICS)
    if save is not None:
        check_target(save, force=force)
    rows = load_runs(runs or (), results_dir=results_dir)
    if save is not None:
        save_pictures(rows, metrics, save, x=x)
    else:
        show_pictures(rows, metrics, x=x)


def check_metrics(names: Sequence[str]) -> list[str]:
    """`names` (a comma may part them too) without repetition. Raises UsageError for one that does not exist."""
    words = [word.casefold() for word in options.words(list(names))]
    for word in words:
        if word not in METRICS:
            hint = f"there are {', '.join(METRICS)}"
            raise UsageError(f"unknown metric {word!r}.{did_you_mean(word, METRICS)}", hint)
    return list(dict.fromkeys(words))


def check_target(path: Path, *, force: bool) -> None:
    """Refuse what cannot be written before anything is drawn. Raises UsageError or ResultsError."""
    if path.suffix.lower() not in (".txt", ".html", ".svg"):
        raise UsageError(f"cannot save as {path.suffix or 'a file without an ending'}", "use .txt, .html or .svg")
    if path.exists() and not force:
        raise ResultsError(f"{path} exists already", "choose another name, or --force to write over it")


def show_pictures(
    rows: Mapping[str, Sequence[BenchmarkResult]], metrics: Sequence[str], *, x: str | None = None
) -> None:
    """The pictures on standard output, as wide as it is. x: as `--x`."""
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.plots import plot_size

    console = result_console()
    width, height = plot_size(console.width)
    drawn = _draw(rows, metrics, width, height, x=x, ascii_only=ascii_only(console))
    for index, picture in enumerate(drawn):
        if index:
            console.print()
        console.print(picture)


def save_pictures(
    rows: Mapping[str, Sequence[BenchmarkResult]], metrics: Sequence[str], path: Path, *, x: str | None = None
) -> None:
    """The pictures in one file, its kind told by its ending. Raises ResultsError when it cannot be written."""
    from rich.console import Console

    from longctx.results import write_atomically
    from longctx.terminal.console import status_console
    from longctx.terminal.plots import plot_size

    width, height = plot_size(SAVE_WIDTH)
    console = Console(
        record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="standard", markup=False
    )
    for picture in _draw(rows, metrics, width, height, x=x):
        console.print(picture)
        console.print()
    kind = path.suffix.lower()
    if kind == ".svg":
        # The template asks a server for its font; a picture of results should not.
        text = re.sub(r"@font-face\s*{.*?}\s*", "", console.export_svg(title="longctx plot"), flags=re.DOTALL)
    elif kind == ".html":
        text = console.export_html(inline_styles=True)
    else:
        text = "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip() + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}", "choose another place") from error
    status_console().print(f"saved to {path}", soft_wrap=True)


def _draw(
    rows: Mapping[str, Sequence[BenchmarkResult]],
    metrics: Sequence[str],
    width: int,
    height: int,
    *,
    x: str | None,
    ascii_only: bool = False,
) -> list[PlotText]:
    """Every metric of every mode: times of two modes have no picture in common."""
    from longctx.analysis.settings import by_mode
    from longctx.analysis.x_axis import natural_x, x_axis
    from longctx.terminal.plots import scaling_plot

    everything = [row for each in rows.values() for row in each]
    drawn = []
    for mode, found in by_mode(everything).items():
        runs = {label: [row for row in each if str(row.mode) == mode] for label, each in rows.items()}
        axis = natural_x(found) if x is None else x_axis(x, found)
        for name in metrics:
            drawn.append(scaling_plot(runs, metric=name, width=width, height=height, x=axis, ascii_only=ascii_only))
    return drawn
