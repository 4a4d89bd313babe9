"""`longctx report`: a saved run again, as tables or for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.cli import options
from longctx.config import BenchmarkConfig
from longctx.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from longctx.results import BenchmarkResult

ORDER = 31


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Results files, one after the other; the newest sweep if none."),
    ] = None,
    as_json: options.Json = False,
    as_csv: Annotated[
        bool,
        typer.Option("--csv", help="One line a row, for spreadsheets and pandas.", rich_help_panel=options.OUTPUT),
    ] = False,
    as_markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Tables to paste into a pull request.", rich_help_panel=options.OUTPUT),
    ] = False,
    results_dir: options.ResultsDir = BenchmarkConfig.results_dir,
) -> None:
    """Show a saved run: its tables, local slopes, rankings, and the rows that have no result.

    \b
    longctx report                                 the newest sweep
    longctx report run.json --markdown >> pull-request.md
    longctx report run.json --csv | head
    """
    from longctx.analysis.runs import load_runs
    from longctx.terminal.export import to_csv

    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown are three different documents", "choose one of them")
    rows = load_runs(runs or (), results_dir=results_dir)
    if as_json:
        typer.echo(json_text(rows), nl=False)
    elif as_csv:
        typer.echo(to_csv(rows), nl=False)
    elif as_markdown:
        typer.echo(markdown(rows), nl=False)
    else:
        show(rows)


def json_text(runs: Mapping[str, Sequence[BenchmarkResult]]) -> str:
    """One document: an object a run with its label, results, ratios to Dense and local slopes."""
    from longctx.terminal.export import document

    found = [{"run": label, **document(rows)} for label, rows in runs.items()]
    return json.dumps({"runs": found}, indent=2, allow_nan=False) + "\n"


def markdown(runs: Mapping[str, Sequence[BenchmarkResult]]) -> str:
    """The tables of every run, under its label if there are several."""
    from longctx.terminal.export import markdown_text, to_markdown
    from longctx.terminal.tables import environment_line

    parts = []
    for label, rows in runs.items():
        head = f"### {markdown_text(label)}\n\n" if len(runs) > 1 else ""
        parts.append(head + to_markdown(rows, environment=environment_line(_environment(rows), rows[0].dtype).plain))
    return "\n".join(parts)


def show(runs: Mapping[str, Sequence[BenchmarkResult]]) -> None:
    """Tables, rankings, local slopes and problems of every run on standard output."""
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.format import plain
    from longctx.terminal.tables import environment_line, notes, ranking_lines, results_table

    console = result_console()
    ascii_, width = ascii_only(console), console.width
    for index, (label, rows) in enumerate(runs.items()):
        if index:
            console.print()
        if len(runs) > 1:
            console.print(plain(label), style="bold")
        line = environment_line(_environment(rows), rows[0].dtype)
        sections = [
            line if line.plain else None,
            results_table(rows, width, ascii_only=ascii_),
            _headed("Fastest first, time against Dense", ranking_lines(rows, width, ascii_only=ascii_)),
            _headed("Growth with length (local slope: 1 is linear, 2 quadratic)", slopes_table(rows, width)),
            notes(rows, ascii_only=ascii_),
        ]
        shown = [section for section in sections if section is not None and section.plain.strip()]
        for number, section in enumerate(shown):
            if number:
                console.print()
            console.print(section)


def slopes_table(rows: Sequence[BenchmarkResult], width: int) -> Text:
    """The local slopes of time and memory, with the word for time's; empty under two lengths."""
    from rich.text import Text

    from longctx.analysis.summary import slopes
    from longctx.terminal.format import NONE, plain, tokens
    from longctx.terminal.tables import Column, layout

    found = slopes(rows)
    if not found:
        return Text()
    fits = [row.time or row.memory for row in found]
    columns = [
        Column(header="block", cells=[plain(row.name) for row in found], right=False, flexible=True),
        Column(header="time", cells=[f"{row.time.slope:.2f}" if row.time else NONE for row in found]),
        Column(header="memory", cells=[f"{row.memory.slope:.2f}" if row.memory else NONE for row in found]),
        Column(header="time is", cells=[row.time.word if row.time else NONE for row in found], keep=2, right=False),
        Column(
            header="lengths",
            cells=[f"{tokens(fit.shortest)} to {tokens(fit.longest)}" for fit in fits if fit],
            keep=1,
            right=False,
        ),
    ]
    return layout(columns, width)


def _environment(rows: Sequence[BenchmarkResult]) -> dict[str, Any]:
    return next((row.environment for row in rows if isinstance(row.environment, dict) and row.environment), {})


def _headed(title: str, body: Text) -> Text | None:
    from rich.text import Text

    if not body.plain.strip():
        return None
    return Text(no_wrap=True, overflow="ignore").append(f"{title}\n", style="bold").append_text(body)
