"""`longctx sweep --dry-run`: the cells, the least time and memory of each, and which would be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx.cli._measure import print_json
from longctx.config import BenchmarkConfig

if TYPE_CHECKING:
    from longctx.engine.dry_run import SweepPlan

NO_PEAKS = "no peaks of this machine are kept, so no times are predicted: `longctx sysinfo --peaks` measures them"
BOUND = "time: what one call takes at least, by the best rates kept for this machine; memory: the least that it needs"


def dry_run(
    names: Sequence[str], config: BenchmarkConfig, vary: Mapping[str, Sequence[Any]], *, command: str, json: bool
) -> None:
    """Show what a sweep would do. vary: as `run_sweep` takes it. command: the sweep itself."""
    from longctx.engine.dry_run import plan_sweep

    plan = plan_sweep(names or None, config, vary=vary)
    if json:
        print_json(_document(plan, command))
    else:
        _show(plan, command)


def _document(plan: SweepPlan, command: str) -> dict[str, Any]:
    from longctx.results import jsonable

    cells = []
    for planned in plan.cells:
        cell = planned.cell.to_json()
        place = {
            "block_name": planned.cell.block.name,
            "block_target": planned.cell.block.target,
            "block_options": dict(planned.cell.block.options),
            "sequence_length": cell.pop("length"),
        }
        del cell["block"]
        figures = ("verdict", "reason", "flops", "bytes", "state_bytes", "least_time_s", "least_memory_bytes")
        cells.append(place | cell | {name: getattr(planned, name) for name in figures})
    peaks = plan.peaks
    document = {
        "cells": cells,
        "rounds": plan.rounds,
        "free_memory_bytes": plan.free_bytes,
        "peaks": peaks and {"flops_per_s": dict(peaks.flops), "copy_bytes_per_s": peaks.copy_bytes},
        "environment": plan.environment,
        "command": command,
    }
    return jsonable(document)


def _show(plan: SweepPlan, command: str) -> None:
    from rich.text import Text

    from longctx.terminal import format as fmt
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.planned import planned_notes, planned_tables
    from longctx.terminal.prose import say
    from longctx.terminal.tables import environment_line

    console = result_console()
    dtypes = {planned.cell.dtype for planned in plan.cells}
    say(console, environment_line(plan.environment, dtypes.pop() if len(dtypes) == 1 else None))
    console.print()
    console.print(planned_tables(plan.cells, console.width, ascii_only=ascii_only(console)))
    console.print()
    for line in planned_notes(plan.cells):
        say(console, line)
    counts = Counter(planned.verdict for planned in plan.cells)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    rounds = f"{plan.rounds} round{'' if plan.rounds == 1 else 's'}"
    free = fmt.memory(plan.free_bytes)
    cells = f"{len(plan.cells)} cell{'' if len(plan.cells) == 1 else 's'}"
    say(console, f"{cells} in {rounds}: {said}; {free} are free")
    say(console, Text(BOUND if plan.peaks else NO_PEAKS, style="dim"))
    # The command has a line of its own, which can be copied however narrow the screen is.
    say(console, "nothing was measured; without --dry-run:")
    console.print(f"  {fmt.plain(command)}", soft_wrap=True, markup=False)
