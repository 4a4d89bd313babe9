"""`longctx report`: a saved run again, as tables or for other programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.cli import options
from longctx.config import BenchmarkConfig
from longctx.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from longctx.analysis.crossover import Crossover
    from longctx.analysis.unfinished import Unfinished
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
    crossover: Annotated[
        tuple[str, str] | None,
        typer.Option("--crossover", metavar="A B", help="Where these two cross, not each block and Dense."),
    ] = None,
    results_dir: options.ResultsDir = BenchmarkConfig.results_dir,
) -> None:
    """Show a saved run: its tables, how time and memory grow, where blocks cross, which is best, what is missing.

    \b
    longctx report                                 the newest sweep
    longctx report run.json --crossover BLADE Longformer
    longctx report run.json --markdown >> pull-request.md
    longctx report run.json --csv | head
    """
    from longctx.analysis.runs import load_runs, run_paths
    from longctx.terminal.export import to_csv

    for word in crossover or ():
        if Path(word).is_file() or word.endswith(".json"):
            raise UsageError(f"--crossover takes two blocks, not the file {word}", "name files before the options")
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown are three different documents", "choose one of them")
    # Found once: the newest sweep may be another one a moment later.
    paths = run_paths(runs or (), results_dir=results_dir)
    rows = load_runs(list(paths.values()), results_dir=results_dir)
    left = {label: _left(rows[label], path) for label, path in paths.items()}
    if as_json:
        typer.echo(json_text(rows, crossover, left), nl=False)
    elif as_csv:
        typer.echo(to_csv(rows), nl=False)
    elif as_markdown:
        typer.echo(markdown(rows, crossover, left), nl=False)
    else:
        show(rows, crossover, left)


def _left(rows: Sequence[BenchmarkResult], path: Path) -> list[Unfinished]:
    """What the run in the file at `path` lacks."""
    from longctx.analysis.runs import is_of_older_source
    from longctx.analysis.unfinished import unfinished, unfinished_search
    from longctx.blocks import names

    # What an older source lacks cannot be measured any more.
    rows = [row for row in rows if not is_of_older_source(row)]
    return unfinished_search(rows, str(path)) if _of_limits(rows) else unfinished(rows, str(path), blocks=names())


def json_text(
    runs: Mapping[str, Sequence[BenchmarkResult]],
    pair: tuple[str, str] | None = None,
    left: Mapping[str, Sequence[Unfinished]] | None = None,
) -> str:
    """One document: an object a run with its label, results, what was derived from them, and what they lack."""
    from longctx.analysis.paired import judge_saved
    from longctx.terminal.export import document
    from longctx.terminal.limits import limits_document

    found = [
        {
            "run": label,
            **(limits_document(rows) if _of_limits(rows) else document(rows, crossovers=crossings(rows, pair))),
            "unfinished": [dataclasses.asdict(each) for each in (left or {}).get(label, ())],
            **({"paired": [cell.to_json() for cell in pairs]} if (pairs := judge_saved(rows)) else {}),
        }
        for label, rows in runs.items()
    ]
    return json.dumps({"runs": found}, indent=2, allow_nan=False) + "\n"


def markdown(
    runs: Mapping[str, Sequence[BenchmarkResult]],
    pair: tuple[str, str] | None = None,
    left: Mapping[str, Sequence[Unfinished]] | None = None,
) -> str:
    """The tables of every run, under its label if there are several, and what it lacks."""
    from longctx.terminal.findings import unfinished_lines
    from longctx.terminal.markdown import limits_markdown, markdown_text, to_markdown
    from longctx.terminal.tables import environment_line, one_dtype

    parts = []
    for label, rows in runs.items():
        head = f"### {markdown_text(label)}\n\n" if len(runs) > 1 else ""
        line = environment_line(_environment(rows), one_dtype(rows)).plain
        if _of_limits(rows):
            parts.append(head + limits_markdown(rows, environment=line))
        else:
            parts.append(head + to_markdown(rows, environment=line, crossovers=crossings(rows, pair)))
        said = unfinished_lines((left or {}).get(label, ()))
        parts += [f"{markdown_text(line)}\n" for line, _ in said]
    return "\n".join(parts)


def show(
    runs: Mapping[str, Sequence[BenchmarkResult]],
    pair: tuple[str, str] | None = None,
    left: Mapping[str, Sequence[Unfinished]] | None = None,
) -> None:
    """Tables, rankings, growth, crossovers, best blocks, problems and a summary of every run on standard output, and
    what it lacks."""
    from longctx.analysis.conclusions import conclude_modes
    from longctx.analysis.paired import judge_saved
    from longctx.cli._against import show_pairs
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.findings import sections as findings
    from longctx.terminal.findings import summary
    from longctx.terminal.format import plain
    from longctx.terminal.limits import limits_text
    from longctx.terminal.prose import broken, say
    from longctx.terminal.tables import environment_line, mode_tables, notes, one_dtype, ranked_by_ratio, ranking_lines

    console = result_console()
    ascii_, width = ascii_only(console), console.width
    for index, (label, rows) in enumerate(runs.items()):
        if index:
            console.print()
        if len(runs) > 1:
            console.print(plain(label), style="bold")
        if _of_limits(rows):
            say(console, environment_line(_environment(rows), one_dtype(rows)))
            console.print()
            console.print(limits_text(rows, width, ascii_only=ascii_))
            _show_left(console, (left or {}).get(label, ()))
            continue
        if pairs := judge_saved(rows):
            show_pairs(console, rows, pairs, _environment(rows))
            continue
        line, modes = environment_line(_environment(rows), one_dtype(rows)), conclude_modes(rows)
        asked = crossings(rows, pair)
        derived = []
        for mode, found in modes.items():
            extra = None if asked is None else asked.get(mode, [])
            derived += findings(found, width, ascii_only=ascii_, mode=mode if len(modes) > 1 else "", extra=extra)
        sections = [
            broken(line, width, indent=2),
            mode_tables(rows, width, ascii_only=ascii_),
            _headed(
                "Fastest first, time against Dense" if ranked_by_ratio(rows) else "Fastest first",
                ranking_lines(rows, width, ascii_only=ascii_),
            ),
            *(_headed(title, body) for title, body in derived),
            _roofline(rows, width, ascii_only=ascii_),
            broken(notes(rows, ascii_only=ascii_), width, indent=2),
            summary(modes, width, ascii_only=ascii_),
        ]
        shown = [section for section in sections if section is not None and section.plain.strip()]
        for number, section in enumerate(shown):
            if number:
                console.print()
            console.print(section)
        _show_left(console, (left or {}).get(label, ()))


def _show_left(console: Console, left: Sequence[Unfinished]) -> None:
    from rich.text import Text

    from longctx.terminal.findings import unfinished_lines
    from longctx.terminal.prose import say

    for line, command in unfinished_lines(left):
        console.print()
        say(console, Text(line, style="yellow"))
        if command:
            console.print(Text(f"go on: {command}"), soft_wrap=True)


def _roofline(rows: Sequence[BenchmarkResult], width: int, *, ascii_only: bool) -> Text | None:
    """What the work of each block needs at least on the machine that measured it, if that is known."""
    from longctx.terminal.roofline import ROOFLINE_HEAD, has_roof, roofline_table

    if not has_roof(rows):
        return None
    title = ROOFLINE_HEAD if width > len(ROOFLINE_HEAD) else "Roofline"
    return _headed(title, roofline_table(rows, width, ascii_only=ascii_only))


def _of_limits(rows: Sequence[BenchmarkResult]) -> bool:
    """Whether `longctx limits` made this run: it has no times, and an answer of its own."""
    from longctx.analysis.frontier import is_limits_row

    return all(map(is_limits_row, rows))


def crossings(rows: Sequence[BenchmarkResult], pair: tuple[str, str] | None) -> dict[str, list[Crossover]] | None:
    """mode -> the crossovers of two blocks in every setting that both have; None if none were asked for.

    Raises UsageError for a block that the run does not have.
    """
    from longctx.analysis.crossover import crossover
    from longctx.analysis.curves import curves, growth
    from longctx.analysis.settings import by_mode
    from longctx.errors import did_you_mean

    if pair is None:
        return None
    by_modes = {mode: curves(each) for mode, each in by_mode(rows).items()}
    sides, found = [], [curve for each in by_modes.values() for curve in each]
    for word in pair:
        matching = [c for c in found if word.casefold() in (c.block.casefold(), c.name.casefold())]
        if not matching:
            known = list(dict.fromkeys(c.block for c in found))
            hint = f"it has {', '.join(known)}" if known else "it has no row that is ok"
            raise UsageError(f"the run has no result of block {word!r}.{did_you_mean(word, known)}", hint)
        sides.append(matching)
    pairs = [(a, b) for a in sides[0] for b in sides[1] if a is not b and a.setting == b.setting]
    return {
        mode: [crossover(growth(a), growth(b)) for a, b in pairs if any(a is curve for curve in each)]
        for mode, each in by_modes.items()
    }


def _environment(rows: Sequence[BenchmarkResult]) -> dict[str, Any]:
    return next((row.environment for row in rows if isinstance(row.environment, dict) and row.environment), {})


def _headed(title: str, body: Text) -> Text | None:
    from rich.text import Text

    if not body.plain.strip():
        return None
    return Text(no_wrap=True, overflow="ignore").append(f"{title}\n", style="bold").append_text(body)
