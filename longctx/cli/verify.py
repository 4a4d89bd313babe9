"""`longctx test`: are the blocks and the instruments right on this machine?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    from longctx.terminal.console import result_console, status_console

    progress = status_console()
    checks, setting = checks_of(requested(blocks), device=device, dtype=dtype, progress=progress)
    failed = sum(not check["passed"] for check in checks)
    if as_json:
        from longctx.cli._measure import print_json
        from longctx.terminal.export import jsonable

        print_json(jsonable({"passed": not failed, **setting, "checks": checks}))
    else:
        console = result_console()
        console.print(table_of(checks, verbose=verbose))
        where = f"on {setting['device']} in {setting['dtype']}"
        verdict = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
        console.print(f"{verdict} {where}")
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


def table_of(checks: Sequence[dict[str, Any]], *, verbose: bool) -> Table:
    """name, result, figure, limit. Without `verbose` a part that passed whole is one line: its closest call."""
    from rich.table import Table
    from rich.text import Text

    from longctx.terminal.format import plain

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=False)
    table.add_column("result")
    for name in ("figure", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    if verbose:
        table.add_column("note", overflow="fold")
    parts: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        parts.setdefault(check["part"], []).append(check)
    for part, rows in parts.items():
        whole = all(row["passed"] for row in rows) and len(rows) > 1 and not verbose
        shown = [max(rows, key=_share)] if whole else rows
        for row in shown:
            words = [plain(title_of(part)), f"{len(rows)} checks" if whole else row["name"]]
            result = Text("ok", style="green") if row["passed"] else Text("FAILED", style="bold red")
            figure = f"{row['name']} {_figure(row)}" if whole and row["figure"] is not None else _figure(row)
            cells = [Text(": ".join(words)), result, Text(figure), Text(_limit(row))]
            table.add_row(*cells, *([Text(plain(row["note"]))] if verbose else []))
            if not verbose and not row["passed"] and row["note"]:
                table.add_row(Text(f"  {plain(row['note'])}"))
    return table


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
