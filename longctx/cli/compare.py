"""`longctx compare`: two saved runs against each other, with a verdict for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.cli import options
from longctx.errors import UsageError

if TYPE_CHECKING:
    from longctx.analysis.comparison import Comparison
    from longctx.analysis.matching import Runs

ORDER = 32
REGRESSION, INCONCLUSIVE = 4, 7
JUDGING = "How to judge"


def compare(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Results file to compare with.", show_default=False)
    ] = None,
    new: Annotated[
        str | None, typer.Argument(metavar="NEW", help="Results file that is judged.", show_default=False)
    ] = None,
    more_base: Annotated[
        list[str] | None,
        typer.Option(
            "--base",
            metavar="FILE...",
            help="Files of the base, as several words: rounds of equal cells are put together.",
            show_default=False,
        ),
    ] = None,
    more_new: Annotated[
        list[str] | None,
        typer.Option("--new", metavar="FILE...", help="Files of the new side, likewise.", show_default=False),
    ] = None,
    guard: Annotated[
        float | None,
        typer.Option(
            "--guard",
            metavar="PERCENT",
            help="A shift up to this is none.",
            show_default="2 on a GPU, 5 on a CPU",
            rich_help_panel=JUDGING,
        ),
    ] = None,
    allow_different: Annotated[
        bool,
        typer.Option(
            "--allow-different",
            help="Compare even what ran on another device, in another dtype, with other threads or TF32 flags.",
            rich_help_panel=JUDGING,
        ),
    ] = False,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression",
            help="Exit with 4 if a cell is slower, no longer ok, or takes more memory.",
            rich_help_panel=JUDGING,
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with 7 if a cell is inconclusive, or missing in the new side.",
            rich_help_panel=JUDGING,
        ),
    ] = False,
    as_json: options.Json = False,
    as_markdown: Annotated[
        bool,
        typer.Option("--markdown", help="A comment for a pull request.", rich_help_panel=options.OUTPUT),
    ] = False,
) -> None:
    """Compare two saved runs: every cell is faster, slower, the same or inconclusive.

    \b
    longctx compare base.json new.json
    longctx compare base.json new.json --fail-on-regression --markdown > comment.md
    longctx compare --base monday.json tuesday.json --new wednesday.json thursday.json

    Slower or faster takes 5 rounds a side (`longctx sweep --rounds 5`) that do not overlap, and a shift that is larger
    than the guard and clear of the noise between rounds. What differs between the machines is listed.
    """
    from longctx.analysis.comparison import compare as compare_runs

    if as_json and as_markdown:
        raise UsageError("--json and --markdown are two different documents", "choose one of them")
    sides = [side_of("base", base, more_base), side_of("new", new, more_new)]
    first, second = ({Path(path).resolve() for path in side} for side in sides)
    if first == second:
        typer.echo("warning: base and new are the same, which tells no more than how noisy they are", err=True)
    found = compare_runs(*sides, guard=None if guard is None else guard / 100, allow_different=allow_different)
    if as_json:
        from longctx.cli._measure import print_json
        from longctx.terminal.comparison import document

        print_json(document(found))
    elif as_markdown:
        from longctx.terminal.comparison import to_markdown

        typer.echo(to_markdown(found), nl=False)
    else:
        show(found)
    raise typer.Exit(exit_code(found, fail_on_regression=fail_on_regression, strict=strict))


def side_of(name: str, first: str | None, others: Sequence[str] | None) -> Runs:
    """path -> rows of every file of a side. Raises UsageError if none is named, ResultsError for an unusable one."""
    from longctx.analysis.runs import load_runs, named_file
    from longctx.config import BenchmarkConfig

    paths = [path for text in ([first] if first else []) + list(others or ()) for path in _paths(text)]
    if not paths:
        raise UsageError(
            f"no file is named for the {name} side",
            "write `longctx compare base.json new.json`, or --base and --new with several files each",
        )
    different: dict[Path, str] = {}
    for path in (str(named_file(path, results_dir=BenchmarkConfig.results_dir)) for path in paths):
        # A file that is named twice holds its rounds once.
        different.setdefault(Path(path).resolve(), path)
    return {path: next(iter(load_runs([path], results_dir=".").values())) for path in different.values()}


def _paths(text: str) -> list[str]:
    return [text] if Path(text).exists() else options.words([text])


def exit_code(comparison: Comparison, *, fail_on_regression: bool, strict: bool) -> int:
    """4 for a regression, else 7 when `strict` and something is undecided, else 0."""
    if fail_on_regression and comparison.regressions:
        return REGRESSION
    return INCONCLUSIVE if strict and comparison.undecided else 0


def show(comparison: Comparison) -> None:
    """Files, table, notes, environment, the sentence, and how to settle what is open, on standard output."""
    from rich.text import Text

    from longctx.terminal.comparison import comparison_table, environment, legend, notes, settle_lines
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.prose import broken, say

    console = result_console()
    plain = ascii_only(console)
    sections = [
        broken(legend(comparison), console.width, indent=2),
        comparison_table(comparison, console.width, ascii_only=plain),
        broken(notes(comparison), console.width, indent=2),
        broken(environment(comparison), console.width, indent=2),
        broken(Text(f"{comparison.sentence}.", style="bold"), console.width),
    ]
    for index, section in enumerate(section for section in sections if section.plain.strip()):
        if index:
            console.print()
        console.print(section)
    lines = settle_lines(comparison)
    if lines:
        console.print()
    for line in lines:
        # A command is copied as one line, however narrow the screen.
        if line.startswith("  "):
            console.print(Text(line), soft_wrap=True)
        else:
            say(console, line)
