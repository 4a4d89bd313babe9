"""`longctx report`: a saved run again, as tables or for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.cli import options
from longctx.config import BenchmarkConfig
from longctx.errors import UsageError

if TYPE_CHECKING:
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

    parts = []
    for label, rows in runs.items():
        head = f"### {markdown_text(label)}\n\n" if len(runs) > 1 else ""
        parts.append(head + to_markdown(rows))
    return "\n".join(parts)


def show(runs: Mapping[str, Sequence[BenchmarkResult]]) -> None:
    """Tables, slopes, rankings and problems of every run on standard output."""
