"""What quick and sweep share: run with a view on stderr, end with an exit code, name the command that reproduces it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from longctx.cli.command import interrupt_exit_code
from longctx.config import BenchmarkConfig, going_on
from longctx.results import BenchmarkResult

if TYPE_CHECKING:
    from longctx.events import Event
    from longctx.terminal.live import SweepView

Measured = TypeVar("Measured")


def measure(
    blocks: Sequence[str],
    config: BenchmarkConfig,
    *,
    vary: Mapping[str, Sequence[Any]],
    command: str,
    quiet: bool,
) -> tuple[list[BenchmarkResult], SweepView]:
    """`watched` a sweep over `blocks`. vary: as `run_sweep` takes it."""
    from longctx.engine.runner import run_sweep

    def run(on_event: Callable[[Event], None]) -> list[BenchmarkResult]:
        return run_sweep(blocks or None, config, vary=vary, on_event=on_event, command=command)

    return watched(run, config, command=command, quiet=quiet)


def watched(
    run: Callable[[Callable[[Event], None]], Measured],
    config: BenchmarkConfig,
    *,
    command: str,
    quiet: bool,
    view_for: Callable[..., SweepView] | None = None,
) -> tuple[Measured, SweepView]:
    """Measure with a view on stderr; the results, and the view that knows the environment and the results file.

    view_for: makes the view, `sweep_view` if None.

    Interrupted, it says what is saved and how to go on, and ends the command in 128 + signal.
    """
    from longctx.terminal.console import status_console
    from longctx.terminal.live import sweep_view
    from longctx.terminal.prose import say

    # Drawing from another thread would take time from what is measured in this very process.
    view = (view_for or sweep_view)(status_console(), quiet=quiet, animate=config.isolation == "worker")
    try:
        with view:
            return run(view.update), view
    except KeyboardInterrupt as error:
        for line in _farewell(view, command):
            if line.startswith("  "):
                view.console.print(line, soft_wrap=True, markup=False)
            else:
                say(view.console, line)
        raise typer.Exit(interrupt_exit_code(error)) from None


def _farewell(view: SweepView, command: str) -> list[str]:
    """What an interrupted run leaves behind, and how to go on."""
    from longctx.terminal.format import plain

    rows = "1 row is" if view.rows == 1 else f"{view.rows} rows are"
    if view.path and view.rows:
        again = f"{command} {shlex.join(going_on(view.path))}"
        return [f"interrupted; {rows} saved in {plain(view.path)}; go on with:", f"  {plain(again)}"]
    return [f"interrupted; {rows} finished, nothing is saved" if view.rows else "interrupted; nothing was measured yet"]


def exit_code(results: Sequence[BenchmarkResult], *, strict: bool, complete: bool = True) -> int:
    """6 when a number is wrong or impossible, 3 when none is ok or, if `strict`, any is not; else 0."""
    statuses = {result.status for result in results}
    if statuses & {"wrong", "impossible"}:
        return 6
    if "ok" not in statuses or (strict and (statuses != {"ok"} or not complete)):
        return 3
    return 0


def print_json(document: object) -> None:
    """One JSON document on stdout; a number that JSON cannot carry would be a bug, and is one here."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))
