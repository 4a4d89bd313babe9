"""Help pages whose names can be typed as they stand: Typer's pages, but for tables too wide for the terminal.

Typer puts names, types and texts side by side, and cuts what does not fit: `--cudnn-determini…`. It has no setting
against that, so while a page is printed the table that Typer fills is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

TEXT_WIDTH = 24
"""Columns that a text needs beside its name; where there are fewer, it goes below."""


class HelpTable(Table):
    """A table of names, types and, last, texts. Typer makes one for each panel of options and for the commands."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._has_room(console, options):
            for column in self.columns[:-1]:
                column.no_wrap = True
            yield from super().__rich_console__(console, options)
            return
        for *about, text in zip(*(column.cells for column in self.columns), strict=True):
            # Lines break at spaces; names of one option come as `--name,--other`.
            words = [word for cell in about if isinstance(cell, Text) for word in cell.split(",") if word]
            yield Text(" ").join(words)
            yield Padding(text, (0, 0, 0, 4))

    def _has_room(self, console: Console, options: ConsoleOptions) -> bool:
        """Whether a text finds its columns with all before it whole."""
        _, right, _, left = self.padding
        needed = TEXT_WIDTH
        for column in self.columns[:-1]:
            needed += max(Measurement.get(console, options, cell).maximum for cell in column.cells) + left + right
        return needed <= options.max_width


@contextlib.contextmanager
def whole_names() -> Iterator[None]:
    """While this is open, Typer prints help in tables of ours."""
    from typer import rich_utils

    utils: Any = rich_utils
    before = utils.Table
    utils.Table = HelpTable
    try:
        yield
    finally:
        utils.Table = before
