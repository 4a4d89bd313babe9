"""The two consoles of a command: results go to one, progress and warnings to the other.

Rich takes FORCE_COLOR for a terminal and would animate into a log, and knows nothing of CI. Here a stream that is
no terminal never gets an escape, and only a real terminal, outside CI, gets an animation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console

PIPE_WIDTH = 120
"""Columns when nobody says how wide the reader is: wide enough for every column of a table."""


def result_console() -> Console:
    """For the result: standard output."""
    return _console(sys.stdout, stderr=False)


def status_console() -> Console:
    """For progress, warnings and errors: standard error."""
    return _console(sys.stderr, stderr=True)


def _console(stream: TextIO, *, stderr: bool) -> Console:
    # A name with a character that the terminal's encoding lacks must not end the command.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    terminal = _isatty(stream)
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    width = None
    if not terminal:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() and int(columns) > 0 else PIPE_WIDTH
    return _Console(
        stderr=stderr,
        force_terminal=terminal,
        force_interactive=terminal and not dumb and not os.environ.get("CI"),
        no_color=True if not terminal else None,
        color_system="auto" if terminal else None,
        width=width,
        height=None if terminal else 50,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to the command, which knows the exit code; Rich would end it with 1."""
        raise BrokenPipeError


def _isatty(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (ValueError, AttributeError):
        return False


def ascii_only(console: Console) -> bool:
    """Whether this console cannot carry more than ASCII."""
    return not console.encoding.lower().startswith("utf")


@contextlib.contextmanager
def cursor_while_stopped(console: Console) -> Iterator[None]:
    """Ctrl-Z leaves a shell with its cursor, although an animation has hidden it; `fg` hides it again."""

    def stop(number: int, frame: Any) -> None:
        console.show_cursor(True)
        signal.raise_signal(signal.SIGSTOP)
        console.show_cursor(False)

    before = None
    # Not in other threads, nor where there are no such signals.
    with contextlib.suppress(ValueError, AttributeError):
        before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTSTP, before)
