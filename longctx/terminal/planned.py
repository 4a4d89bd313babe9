"""The cells of a sweep that was not run: a table for each mode, and why cells would be left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longctx.analysis.settings import varying
from longctx.terminal import format as fmt
from longctx.terminal.layout import Column, layout
from longctx.terminal.tables import MODE_HEADS, STYLES

if TYPE_CHECKING:
    from rich.text import Text


def planned_tables(cells: Sequence[Any], width: int, *, ascii_only: bool = False) -> Text:
    """Block, tokens, what varies besides, least time and memory, and what would become of each cell.

    cells: of `engine.dry_run.SweepPlan`.
    """
    from rich.text import Text

    modes: dict[str, list[Any]] = {}
    for planned in cells:
        modes.setdefault(planned.cell.mode, []).append(planned)
    text = Text(no_wrap=True, overflow="ignore")
    for index, (mode, rows) in enumerate(modes.items()):
        text.append("\n\n" if index else "")
        if len(modes) > 1 or mode != "forward":
            text.append(f"{fmt.shorten(MODE_HEADS[mode], width)}\n", style="bold")
        text.append_text(_table(rows, width, ascii_only=ascii_only))
    return text


def _table(rows: Sequence[Any], width: int, *, ascii_only: bool) -> Text:
    rows = sorted(rows, key=lambda planned: planned.cell.length)
    axes = varying(planned.cell for planned in rows)
    columns = [
        Column(header="tokens", cells=[fmt.tokens(planned.cell.length) for planned in rows]),
        *(
            Column(header=axis.header, cells=[fmt.plain(axis.of(planned.cell)) for planned in rows], right=False)
            for axis in axes
        ),
        Column(header="block", cells=[fmt.plain(p.cell.block.name) for p in rows], right=False, flexible=True),
        Column(header="least time", cells=[fmt.duration(planned.least_time_s) for planned in rows]),
        Column(header="least memory", cells=[fmt.memory(planned.least_memory_bytes) for planned in rows], keep=2),
        Column(header="state", cells=[_state(planned) for planned in rows], keep=1),
        Column(header="would", cells=[planned.verdict for planned in rows], right=False),
    ]
    columns = [column for column in columns if column.keep is None or set(column.cells) != {fmt.NONE}]
    styles = {(index, "would"): STYLES.get(p.verdict, "") for index, p in enumerate(rows) if p.verdict != "run"}
    breaks = [i for i in range(1, len(rows)) if rows[i].cell.length != rows[i - 1].cell.length]
    return layout(columns, width, ascii_only=ascii_only, styles=styles, breaks=breaks)


def _state(planned: Any) -> str:
    streamed = planned.cell.mode in ("decode", "prefill")
    return fmt.memory(planned.state_bytes) if streamed else fmt.NONE


def planned_notes(cells: Sequence[Any]) -> list[str]:
    """One line for each reason why cells would not be measured."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for planned in cells:
        if planned.reason and planned.verdict != "kept":
            why = fmt.shorten(fmt.plain(planned.reason), 200)
            groups.setdefault((planned.verdict, why), []).append(planned.cell)
    lines = []
    for (verdict, why), left_out in groups.items():
        names = dict.fromkeys(fmt.shorten(fmt.plain(cell.block.name), 40) for cell in left_out)
        lengths = dict.fromkeys(fmt.tokens(cell.length) for cell in left_out)
        lines.append(f"{verdict}: {', '.join(names)} at {', '.join(lengths)}: {why}")
    return lines
