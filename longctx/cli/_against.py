"""`longctx sweep --against`: both sides in turns, a verdict for every pair, an exit code that a build can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx.cli._measure import exit_code, print_json, watched
from longctx.config import BenchmarkConfig
from longctx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from longctx.analysis.paired import PairedCell
    from longctx.engine.run_against import Pair
    from longctx.events import Event
    from longctx.results import BenchmarkResult
    from longctx.terminal.live import SweepView

REGRESSION, INCONCLUSIVE = 4, 7


def check(*, against: str | None, guard: float | None, fail_on_regression: bool) -> None:
    """Raises UsageError for options that do not go together."""
    if against is None and (guard is not None or fail_on_regression):
        option = "--guard" if guard is not None else "--fail-on-regression"
        raise UsageError(
            f"{option} judges what --against measures",
            "name the other side: --against BLOCK or FOLDER; saved runs are compared by `longctx compare`",
        )
    if guard is not None and not 0 < guard < 100:
        raise UsageError(f"--guard must lie between 0 and 100 percent, not {guard:g}")


def sweep_against(
    names: Sequence[str],
    other: str,
    config: BenchmarkConfig,
    *,
    vary: Mapping[str, Sequence[Any]],
    guard: float | None,
    settle: bool,
    json: bool,
    strict: bool,
    fail_on_regression: bool,
) -> int:
    """Measure, show and judge. Returns the exit code. vary: as `run_sweep` takes it. guard: percent, None for what
    suits the device. settle: measure pairs that are inconclusive in more rounds.
    """
    from longctx.analysis.paired import judge
    from longctx.engine.run_against import against_command, run_against

    share = None if guard is None else guard / 100
    more = [] if guard is None else ["--guard", f"{guard:g}"]
    command = against_command(config, names, other, more, vary=vary)

    def run(on_event: Callable[[Event], None]) -> list[Pair]:
        judging = {"guard": share, "settle": settle}
        return run_against(names or None, other, config, vary=vary, on_event=on_event, command=command, **judging)

    pairs, view = watched(run, config, command=command, quiet=not config.verbose)
    cells = [judge(ours, theirs, guard=share) for ours, theirs in pairs]
    results = list(view.finished.results)
    if json:
        print_json({"results": [result.to_json() for result in results], "paired": [cell.to_json() for cell in cells]})
    else:
        _show(results, cells, view, command)
    return code_of(results, cells, strict=strict, fail_on_regression=fail_on_regression, complete=view.complete)


def code_of(
    results: Sequence[BenchmarkResult],
    cells: Sequence[PairedCell],
    *,
    strict: bool,
    fail_on_regression: bool,
    complete: bool,
) -> int:
    """As of any sweep; then 4 for a regression, 3 when no pair is ok or, if `strict`, any is not, 7 if undecided."""
    verdicts = {cell.outcome.verdict for cell in cells}
    if code := exit_code(results, strict=False):
        return code
    if fail_on_regression and any(cell.regressed for cell in cells):
        return REGRESSION
    if verdicts <= {"not ok"}:
        return 3
    if strict and (code := exit_code(results, strict=True, complete=complete)):
        return code
    return INCONCLUSIVE if strict and "inconclusive" in verdicts else 0


def _show(results: list[BenchmarkResult], cells: list[PairedCell], view: SweepView, command: str) -> None:
    from longctx.cli._show import tail
    from longctx.terminal.console import result_console

    console = result_console()
    show_pairs(console, results, cells, view.environment)
    tail(console, view, command)


def show_pairs(
    console: Console, results: Sequence[BenchmarkResult], cells: Sequence[PairedCell], environment: Mapping[str, Any]
) -> None:
    """Environment, the table of verdicts, why some are none, warnings, and what it comes to."""
    from rich.text import Text

    from longctx.analysis.paired import sentence
    from longctx.terminal import format as fmt
    from longctx.terminal.against import paired_table, reasons
    from longctx.terminal.console import ascii_only
    from longctx.terminal.prose import say
    from longctx.terminal.tables import environment_line, notes, one_dtype

    plain = ascii_only(console)
    say(console, environment_line(environment, one_dtype(results)))
    if cells:
        console.print()
        console.print(paired_table(cells, console.width, ascii_only=plain))
    # Of a single pair the sentence tells.
    for said in (reasons(cells if len(cells) > 1 else []), notes(results, ascii_only=plain)):
        if len(said):
            console.print()
            say(console, said)
    if cells:
        console.print()
        say(console, Text(fmt.plain(sentence(cells)), style="bold"), indent=0)
