"""`longctx test`: are the blocks and the instruments right on this machine?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COMMAND = "test"
ORDER = 41
TITLES = {"timer": "timer", "memory": "memory reading", "faults": "faults"}


def verify(
    blocks: options.Blocks = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Every check with what was read.", rich_help_panel=options.OUTPUT)
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Check the blocks and the instruments on this machine. Takes about a minute; exit code 3 if a check fails.

    Blocks against their references: forward, gradients, causality, streaming, step. The timer against known
    delays, the memory reading against known allocations, the runner against a crash and a hang.

    \b
    longctx test
    longctx test --device cuda --dtype bf16 --blocks BLADE DPASSM --verbose
    """
    from longctx.terminal.console import ascii_only, result_console, status_console
    from longctx.terminal.prose import say

    progress = status_console()
    checks, setting = checks_of(requested(blocks), device=device, dtype=dtype, progress=progress)
    failed = sum(not check["passed"] for check in checks)
    if as_json:
        from longctx.cli._measure import print_json
        from longctx.results import jsonable

        print_json(jsonable({"passed": not failed, **setting, "checks": checks}))
    else:
        console = result_console()
        console.print(table_of(checks, console.width, verbose=verbose, ascii_only=ascii_only(console)))
        for line in failures_of(checks):
            say(console, line)
        where = f"on {setting['device']} in {setting['dtype']}"
        verdict = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
        say(console, f"{verdict} {where}")
    if failed:
        raise typer.Exit(3)


def requested(words: Sequence[str] | None) -> list[str]:
    """The blocks asked for, all of ours if none. Raises UsageError for one of ours that does not exist."""
    from longctx import blocks
    from longctx.config import parse_blocks

    requests = parse_blocks(words or blocks.names())
    for request in requests:
        if not request.is_user:
            blocks.resolve(request.target)
    return [str(request) for request in requests]


def checks_of(
    blocks: Sequence[str], *, device: str, dtype: str, progress: Console
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All checks, told on `progress` as they finish, and {device, dtype} as they were resolved."""
    from longctx.engine.run_selftest import check_faults, run_checks
    from longctx.terminal.format import plain

    parts = [*(f"block:{name}" for name in blocks), "timer", "memory"]
    checks: list[dict[str, Any]] = []
    setting = {"device": device, "dtype": dtype}

    def follow(events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "ready":
                setting.update(device=event["device"], dtype=event["dtype"])
            elif event["event"] == "part":
                progress.print(f"checking {plain(title_of(event['part']))} ...")
            elif event["event"] == "check":
                checks.append({name: value for name, value in event.items() if name != "event"})

    follow(run_checks(parts, device=device, dtype=dtype))
    follow(check_faults(device=setting["device"]))
    return checks, setting


def title_of(part: str) -> str:
    """How a part is named to people: the block, or the instrument."""
    return TITLES.get(part, part.removeprefix("block:"))


def table_of(checks: Sequence[dict[str, Any]], width: int, *, verbose: bool, ascii_only: bool = False) -> Text:
    """check, result, figure, limit. Without `verbose` a part that passed whole is one line: its closest call."""
    from longctx.terminal.format import plain
    from longctx.terminal.layout import Column, layout

    parts: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        parts.setdefault(check["part"], []).append(check)
    rows: list[tuple[str, dict[str, Any]]] = []
    for part, found in parts.items():
        title = plain(title_of(part))
        if all(row["passed"] for row in found) and len(found) > 1 and not verbose:
            rows.append((f"{title}: {len(found)} checks", max(found, key=_share)))
        else:
            rows += [(f"{title}: {row['name']}", row) for row in found]
    results = ["ok" if row["passed"] else "FAILED" for _, row in rows]
    columns = [
        Column(header="check", cells=[name for name, _ in rows], right=False, flexible=True),
        Column(header="result", cells=results, right=False),
        Column(header="figure", cells=[_figure(row) for _, row in rows], keep=2),
        Column(header="limit", cells=[_limit(row) for _, row in rows], keep=1),
    ]
    if verbose:
        notes = [plain(row["note"]) if row["passed"] else "" for _, row in rows]
        columns.append(Column(header="note", cells=notes, keep=0, right=False))
    styles = {(i, "result"): "green" if word == "ok" else "bold red" for i, word in enumerate(results)}
    return layout(columns, width, ascii_only=ascii_only, styles=styles)


def failures_of(checks: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each failed check that has something to say beyond its figure."""
    from longctx.terminal.format import plain

    failed = [check for check in checks if not check["passed"] and check["note"]]
    return [f"{plain(title_of(check['part']))}: {check['name']}: {plain(check['note'])}" for check in failed]


def _share(row: dict[str, Any]) -> float:
    return row["figure"] / row["limit"] if row["figure"] is not None and row["limit"] else 0.0


def _figure(row: dict[str, Any]) -> str:
    if row["figure"] is None:
        return ""
    return f"{row['figure']:.2f} {row['unit']}" if row["unit"] else f"{row['figure']:.1e}"


def _limit(row: dict[str, Any]) -> str:
    if row["limit"] is None:
        return ""
    return f"{row['limit']:g} {row['unit']}" if row["unit"] else f"{row['limit']:.0e}"
