"""How every command reads its words and how it ends: lists of several words, errors as text, signals, closed pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from longctx.cli._presets import OPTION, with_presets
from longctx.errors import LongctxError, UsageError

DEBUG = "LONGCTX_DEBUG"
BUG = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
# What Typer says of a wrong command line. It has had a public name since 0.28.
TYPER_ERROR = getattr(typer, "TyperException", None) or typer.BadParameter.__mro__[-4]
CLOSED_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1


class Interrupted(KeyboardInterrupt):
    """A signal asked us to stop. Ends the command in 128 + signal, after everything has been put back and saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


def interrupt_exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a command that `error` ended: Ctrl-C is SIGINT."""
    return getattr(error, "exit_code", 128 + signal.SIGINT)


# -- lists of several words ----------------------------------------------------------------------------------------


def spread(args: Sequence[str], lists: Collection[str], fail: Callable[[str], Any]) -> list[str]:
    """`--blocks A B` as `--blocks=A --blocks=B`, for the options named in `lists`.

    A list goes on until the next word that looks like an option; `-5` is a value. Words after `--` are left alone.
    `fail` is called with a message when a list has no value.
    """
    spreaded: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        name, equals, first = word.partition("=")
        if word == "--":
            return [*spreaded, word, *words]
        if name not in lists:
            spreaded.append(word)
            continue
        values = [first] if equals else []
        while words and not _looks_like_option(words[0]):
            values.append(words.pop(0))
        if not values:
            fail(f"{name} needs at least one value")
        spreaded += [f"{name}={value}" for value in values]
    return spreaded


def _looks_like_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not word[1].isdigit()


class Command(TyperCommand):
    """A command whose list options take several words, also for completion, and whose `--config` reads options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["longctx.words"] = list(args)

        def fail(message: str) -> None:
            # Completion asks about half-typed lines.
            if not ctx.resilient_parsing:
                ctx.fail(message)

        words = spread(args, self._list_options(), fail)
        if not ctx.resilient_parsing and any(OPTION in parameter.opts for parameter in self.params):
            words = with_presets(words, self.params)
        return super().parse_args(ctx, words)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        words = ctx.meta.get("longctx.words", [])
        last = next((word for word in reversed(words) if _looks_like_option(word)), None)
        if last and not incomplete.startswith("-"):
            for parameter in self.params:
                if last.partition("=")[0] in parameter.opts and last.partition("=")[0] in self._list_options():
                    return parameter.shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # Here, as Rich is slow to load.
        from longctx.cli._help import whole_names

        with whole_names():
            super().format_help(ctx, formatter)

    def _list_options(self) -> set[str]:
        return {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
            if name.startswith("--")
        }


# -- how a command ends --------------------------------------------------------------------------------------------


class Program(TyperGroup):
    """The whole program: every way in which a command can end becomes a message on stderr and an exit code."""

    def main(self, args: Any = None, *pos: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(args, *pos, standalone_mode=False, **extra)
        sys.exit(self._run(args, *pos, **extra))

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            with _signals():
                code = super().main(*args, standalone_mode=False, **extra)
                sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except LongctxError as error:
            _say("error", error.message, error.hint)
            return error.exit_code
        except BrokenPipeError:
            _drop_output()
            return CLOSED_PIPE
        except OSError as error:
            if error.errno not in FULL:
                return _bug(error)
            _drop_output()
            _say("error", f"cannot write: {error.strerror}", "make room, or write to another place")
            return UsageError.exit_code
        except KeyboardInterrupt as error:
            _say("interrupted", "", None)
            return interrupt_exit_code(error)
        except typer.Abort:
            _say("error", "stopped", None)
            return BUG
        except TYPER_ERROR as error:
            return self._usage_error(error)
        except Exception as error:
            return _bug(error)

    def invoke(self, ctx: Any) -> Any:
        # The library ends EPIPE and Ctrl-C itself, with codes of its own: take both out of its sight.
        try:
            with _closed_output():
                value = super().invoke(ctx)
                sys.stdout.flush()
                return value
        except KeyboardInterrupt as error:
            _say("interrupted", "", None)
            raise typer.Exit(interrupt_exit_code(error)) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from longctx.cli._help import whole_names

        with whole_names():
            super().format_help(ctx, formatter)

    @staticmethod
    def _usage_error(error: Any) -> int:
        ctx = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            return error.exit_code
        path = ctx.command_path if ctx is not None else "longctx"
        _say("error", error.format_message().strip().rstrip("."), f"`{path} --help` shows what there is")
        return error.exit_code


@contextlib.contextmanager
def _closed_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _drop_output()
        raise typer.Exit(CLOSED_PIPE) from None


def _drop_output() -> None:
    """Send what is still buffered nowhere, or the interpreter complains about it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop a command as Ctrl-C does, so that the terminal is put back and results are saved."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup sets SIGHUP to be ignored, and means it.
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(ValueError):
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(word: str, message: str, hint: str | None) -> None:
    """`error: what and why` and, below it, `hint: what to do`, on stderr, whatever the texts hold."""
    from rich.text import Text

    from longctx.terminal.console import status_console
    from longctx.terminal.format import plain
    from longctx.terminal.prose import say

    console = status_console()
    lines = [plain(line) for line in message.splitlines()] or [""]
    with contextlib.suppress(BrokenPipeError):
        first = Text.assemble((f"{word}:" if lines[0] else word, "bold red"), f" {lines[0]}" if lines[0] else "")
        say(console, first)
        for line in lines[1:]:
            say(console, f"  {line}", indent=4)
        if hint:
            say(console, Text.assemble(("hint:", "bold"), f" {plain(hint)}"))


def _bug(error: Exception) -> int:
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exc()
        return BUG
    _say(
        "error",
        f"longctx failed unexpectedly: {type(error).__name__}: {error}",
        f"this is a bug; {DEBUG}=1 or `longctx --debug ...` shows where it happened",
    )
    return BUG
