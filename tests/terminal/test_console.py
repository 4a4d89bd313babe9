"""Consoles: escapes and animation only on a real terminal, whatever the environment says."""

from __future__ import annotations

import io
import signal
import sys

import pytest
from rich.console import Console
from rich.text import Text

from longctx.terminal.console import PIPE_WIDTH, ascii_only, cursor_while_stopped, result_console, status_console
from longctx.terminal.prose import say


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch):
    """Replace stdout and stderr; the kind and the encoding are given, the text comes back."""
    for name in ("COLUMNS", "FORCE_COLOR", "CI", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def replace(kind=io.TextIOWrapper, encoding: str = "utf-8") -> io.BytesIO:
        buffer = io.BytesIO()
        wrapper = kind(buffer, encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", wrapper)
        monkeypatch.setattr(sys, "stderr", wrapper)
        return buffer

    return replace


def lines_on(*, terminal: bool, text: Text | str, stderr: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(
        file=out, stderr=stderr, width=30, force_terminal=terminal, color_system="standard" if terminal else None
    )
    console.file = out
    say(console, text)
    return out.getvalue().splitlines()


def test_prose_breaks_at_spaces_alone() -> None:
    said = "add --max-length to a launch-bound run of DPASSM:window_size=128,state_dim=64 and go on"
    lines = lines_on(terminal=True, text=said)
    assert " ".join(lines).split() == said.split()
    assert all(len(line) <= 30 or len(line.split()) == 1 for line in lines)
    assert all(line.startswith("  ") for line in lines[1:]) and not any(line.endswith(" ") for line in lines)
    assert lines_on(terminal=False, text=said, stderr=False) == lines


def test_a_log_keeps_one_line_for_each_thing_said() -> None:
    assert lines_on(terminal=False, text="word " * 20 + "end") == ["word " * 20 + "end"]


def test_broken_prose_keeps_its_styles() -> None:
    text = Text.assemble(("failed: ", "red"), "a reason of many words that goes on", style="bold")
    lines = lines_on(terminal=True, text=text)
    assert "\x1b[1;31mfailed" in lines[0] and "\x1b[1m" in lines[1]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE", None])
def test_a_pipe_never_gets_an_escape(stream, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    buffer = stream()
    for console in (result_console(), status_console()):
        console.print("[bold]text[/bold]", style="bold red")
        assert not console.is_interactive
        assert console.width == PIPE_WIDTH
    assert buffer.getvalue() == b"[bold]text[/bold]\n" * 2


def test_a_terminal_is_drawn_on_but_not_in_ci(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = stream(Terminal)
    assert status_console().is_interactive
    monkeypatch.setenv("CI", "true")
    console = status_console()
    assert console.is_terminal
    assert not console.is_interactive
    console.print("text", style="bold")
    assert b"\x1b[1m" in buffer.getvalue()


def test_a_dumb_terminal_is_not_drawn_on(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(Terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert not status_console().is_interactive


def test_columns_of_a_pipe_can_be_chosen(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream()
    monkeypatch.setenv("COLUMNS", "50")
    assert result_console().width == 50
    monkeypatch.setenv("COLUMNS", "zero")
    assert result_console().width == PIPE_WIDTH


def test_a_character_that_the_encoding_lacks_does_not_end_the_command(stream) -> None:
    buffer = stream(encoding="ascii")
    console = result_console()
    assert ascii_only(console)
    console.print("é\udc80")
    assert buffer.getvalue() == b"\\xe9\\udc80\n"
    stream(encoding="utf-8")
    assert not ascii_only(result_console())


def test_a_stopped_animation_gives_the_cursor_back_and_takes_it_again(monkeypatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True)
    told = []
    monkeypatch.setattr(signal, "raise_signal", lambda number: told.append((number, out.getvalue())))
    before = signal.getsignal(signal.SIGTSTP)
    with cursor_while_stopped(console):
        signal.getsignal(signal.SIGTSTP)(signal.SIGTSTP, None)
    assert told == [(signal.SIGSTOP, "\x1b[?25h")]
    assert out.getvalue().endswith("\x1b[?25l")
    assert signal.getsignal(signal.SIGTSTP) == before
