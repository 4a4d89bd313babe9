"""Columns of text as a table that stays true on any width: columns are left out and names shortened, numbers never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.terminal import format as fmt

if TYPE_CHECKING:
    from rich.text import Text

GAP = 2
NAME_WIDTH, NAME_WIDTH_NARROW = 20, 12
"""What a name keeps while columns are still there to be left out; the second on screens under 60 columns."""
LEAST_NAME_WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of strings. keep: columns with a smaller number are left out first; None: never left out."""

    header: str
    cells: list[str]
    keep: int | None = None
    right: bool = True
    flexible: bool = False
    """A name: it may be shortened in its middle."""

    @property
    def natural(self) -> int:
        from rich.cells import cell_len

        return max(map(cell_len, [self.header, *self.cells]))


def layout(
    columns: Sequence[Column],
    width: int,
    *,
    ascii_only: bool = False,
    styles: Mapping[tuple[int, str], str] | None = None,
    breaks: Iterable[int] = (),
) -> Text:
    """The table that fits into `width`: the least important columns left out, then names shortened, then rows as
    blocks of `name value` lines.

    styles: (row, header) -> Rich style of that cell. breaks: rows before which a blank line stands.
    """
    shown = list(columns)
    kept = NAME_WIDTH if width >= 60 else NAME_WIDTH_NARROW
    while (room := _name_room(shown, width)) < _wanted(shown, kept):
        droppable = [column for column in shown if column.keep is not None]
        if not droppable:
            break
        shown.remove(min(droppable, key=lambda column: column.keep))
    if room < _wanted(shown, LEAST_NAME_WIDTH):
        return _stacked(columns, width, ascii_only=ascii_only)
    return _lines(shown, room, ascii_only=ascii_only, styles=styles or {}, breaks=set(breaks))


def _name_room(columns: Sequence[Column], width: int) -> int:
    fixed = sum(column.natural for column in columns if not column.flexible)
    return width - fixed - GAP * (len(columns) - 1)


def _wanted(columns: Sequence[Column], most: int) -> int:
    return sum(min(column.natural, most) for column in columns if column.flexible)


def _lines(
    columns: Sequence[Column],
    room: int,
    *,
    ascii_only: bool,
    styles: Mapping[tuple[int, str], str],
    breaks: set[int],
) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    widths = [min(column.natural, room) if column.flexible else column.natural for column in columns]
    ellipsis = "~" if ascii_only else "…"
    shown = [
        fmt.short_names(column.cells, width, ellipsis=ellipsis) if column.flexible else {}
        for column, width in zip(columns, widths, strict=True)
    ]
    text = Text(no_wrap=True, overflow="ignore")

    def line(cells: Sequence[str], row: int | None) -> None:
        for index, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
            cell = shown[index].get(cell, cell) if row is not None else fmt.shorten(cell, width, ellipsis=ellipsis)
            padding = " " * (width - cell_len(cell))
            style = "bold" if row is None else styles.get((row, column.header), "")
            last = index == len(columns) - 1
            text.append(padding if column.right else "").append(cell, style=style)
            text.append("" if column.right or last else padding).append("" if last else " " * GAP)
        text.append("\n")

    line([column.header for column in columns], None)
    for row in range(len(columns[0].cells)):
        if row in breaks:
            text.append("\n")
        line([column.cells[row] for column in columns], row)
    text.rstrip()
    return text


def _stacked(columns: Sequence[Column], width: int, *, ascii_only: bool) -> Text:
    from rich.text import Text

    ellipsis = "~" if ascii_only else "…"
    text = Text(no_wrap=True, overflow="ignore")
    label_width = max(len(column.header) for column in columns)
    room = max(LEAST_NAME_WIDTH, width - label_width - 1)
    shown = [fmt.short_names(c.cells, room, ellipsis=ellipsis) if c.flexible else {} for c in columns]
    for row in range(len(columns[0].cells)):
        text.append("\n" if row else "")
        for column, short in zip(columns, shown, strict=True):
            cell = short.get(column.cells[row], column.cells[row])
            if cell not in ("", fmt.NONE):
                text.append(f"{column.header:<{label_width}} ", style="dim").append(f"{cell}\n")
    text.rstrip()
    return text
