"""`longctx plot`: the pictures of saved runs, in the terminal or in a file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.cli import options
from longctx.cli._pictures import PUBLISHED
from longctx.config import BenchmarkConfig
from longctx.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from longctx.results import BenchmarkResult

ORDER = 30
METRICS = (*PUBLISHED, "tflops", "energy", "roofline")
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
            help=f"One or several of {', '.join(METRICS)}.",
            autocompletion=_complete_metrics,
            show_default="those of the first five that can be drawn",
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
            help="Write to a .txt, .html or .svg file instead; .png and .pdf need the extra `figures`.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Draw the file again whenever it changes, until its sweep is over or Ctrl-C."),
    ] = False,
    force: options.Force = False,
    results_dir: options.ResultsDir = BenchmarkConfig.results_dir,
) -> None:
    """Draw saved runs: time, throughput, memory, memory per token and scaling over sequence length.

    \b
    longctx plot                                   all pictures of the newest sweep
    longctx plot --metric time memory --x batch_size
    longctx plot monday.json tuesday.json --save overlay.svg
    longctx plot run.json --metric time --watch    while a sweep writes it
    """
    from longctx.analysis.runs import load_runs

    metrics = check_metrics(metric) if metric else None
    if watch:
        from longctx.cli._watch import watch_file

        watch_file(runs or (), metrics, save=save, x=x, results_dir=results_dir)
        return
    if save is not None:
        check_target(save, force=force)
    rows = load_runs(runs or (), results_dir=results_dir)
    if save is not None:
        save_pictures(rows, metrics, save, x=x)
    else:
        show_pictures(rows, metrics, x=x)


def check_metrics(names: Sequence[str]) -> list[str]:
    """`names` (a comma may part them too) without repetition. Raises UsageError for one that does not exist."""
    return list(dict.fromkeys(options.choice("metric", word, METRICS) for word in options.words(list(names))))


def check_target(path: Path, *, force: bool) -> None:
    """Refuse what cannot be written before anything is drawn. Raises UsageError or ResultsError."""
    from longctx.terminal.figures import ENDINGS, check_matplotlib

    if path.suffix.lower() not in (".txt", ".html", ".svg", *ENDINGS):
        kind = path.suffix or "a file without an ending"
        raise UsageError(f"cannot save as {kind}", "use .png, .pdf, .svg, .html or .txt")
    if path.suffix.lower() in ENDINGS:
        check_matplotlib()
    if path.exists() and not force:
        raise ResultsError(f"{path} exists already", "choose another name, or --force to write over it")


def show_pictures(
    rows: Mapping[str, Sequence[BenchmarkResult]], metrics: Sequence[str] | None, *, x: str | None = None
) -> None:
    """The pictures on standard output, as wide as it is. metrics: as `draw` takes them. x: as `--x`."""
    from longctx.cli._pictures import draw
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.plots import plot_size

    console = result_console()
    width, height = plot_size(console.width)
    drawn = draw(rows, metrics, width, height, x=x, ascii_only=ascii_only(console))
    for index, picture in enumerate(drawn):
        if index:
            console.print()
        console.print(picture)


def save_pictures(
    rows: Mapping[str, Sequence[BenchmarkResult]], metrics: Sequence[str] | None, path: Path, *, x: str | None = None
) -> None:
    """The pictures in one file, its kind told by its ending. Raises ResultsError when it cannot be written."""
    from rich.console import Console

    from longctx.cli._pictures import draw, figure_panels, machines_line
    from longctx.results import write_atomically
    from longctx.terminal.console import status_console
    from longctx.terminal.figures import ENDINGS, save_figure
    from longctx.terminal.plots import plot_size

    if path.suffix.lower() in ENDINGS:
        save_figure(figure_panels(rows, metrics, x=x), path, caption=machines_line(rows))
        status_console().print(f"saved to {path}", soft_wrap=True)
        return
    width, height = plot_size(SAVE_WIDTH)
    console = Console(
        record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="standard", markup=False
    )
    for picture in draw(rows, metrics, width, height, x=x):
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
