"""Sentences on a screen of any width: broken at spaces and nowhere else, so that flags, names and paths stay whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LEAST_WIDTH = 12


def broken(text: Text | str, width: int, *, indent: int = 0) -> Text:
    """`text` in lines of at most `width`, what goes on indented; a word that is wider than a line stays whole."""
    from rich.cells import cell_len
    from rich.text import Text

    whole = Text(text) if isinstance(text, str) else text
    lines: list[Text] = []
    for line in whole.split("\n", allow_blank=True):
        start = end = 0
        room = max(LEAST_WIDTH, width)
        margin = ""
        for word in re.finditer(r"\S+", line.plain):
            if end and cell_len(line.plain[start : word.end()]) > room:
                lines.append(Text(margin).append_text(line[start:end]))
                start, margin = word.start(), " " * indent
                room = max(LEAST_WIDTH, width - indent)
            end = word.end()
        lines.append(Text(margin).append_text(line[start:end]))
    # Text.join takes the style of the joint, and would lose that of the whole.
    joined = Text("\n", no_wrap=True, overflow="ignore").join(lines)
    joined.style, joined.no_wrap, joined.overflow = whole.style, True, "ignore"
    return joined


def say(console: Console, text: Text | str, *, indent: int = 2) -> None:
    """Print prose `broken` to the width of `console`. A log on standard error keeps one line for each thing said."""
    from rich.text import Text

    if console.stderr and not console.is_terminal:
        console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True)
    else:
        console.print(broken(text, console.width, indent=indent), soft_wrap=True)
