"""The program `longctx`: one command for each file of this package that defines a function of its own name.

A file may set COMMAND (the name to type, if it is not the file's), ORDER (its place in the help) and ALIASES.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from typing import Annotated, Any

import typer

from longctx import cli
from longctx._version import __version__
from longctx.cli.command import DEBUG, Command, Program


def _commands() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(cli.__path__)]
    names = [name for name in names if not name.startswith("_") and name != "main"]
    modules = [importlib.import_module(f"{cli.__name__}.{name}") for name in names]
    found = [module for module in modules if callable(getattr(module, _short(module), None))]
    return sorted(found, key=lambda module: (getattr(module, "ORDER", 50), _short(module)))


def _short(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"longctx {__version__}")
        raise typer.Exit()


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show where a bug happened, as {DEBUG}=1 does.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


HELP = """Which sequence-mixing block, at which context length, on this machine?

\b
longctx quick                             all blocks in seconds
longctx sweep --blocks BLADE DPASSM       over lengths, saved
longctx sweep --blocks my.py:MyBlock      a block of your own
longctx plot                              the last sweep's curves
longctx sysinfo                           is this machine fit to measure?
"""


def build() -> typer.Typer:
    """The program with all its commands."""
    text = _paragraphs(HELP)
    app = typer.Typer(cls=Program, no_args_is_help=True, pretty_exceptions_enable=False, help=text)
    app.callback(help=text)(root)
    for module in _commands():
        name = getattr(module, "COMMAND", _short(module))
        function = getattr(module, _short(module))
        text = _paragraphs(function.__doc__ or "")
        app.command(name, cls=Command, help=text)(function)
        for alias in getattr(module, "ALIASES", ()):
            app.command(alias, cls=Command, hidden=True, help=text)(function)
    return app


def _paragraphs(text: str) -> str:
    """A docstring whose paragraphs are a line each, for the terminal to break; one that \\b opens stays as it is.

    Typer would keep all line breaks and break the lines once more.
    """
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        each.removeprefix("\b\n") if each.startswith("\b") else each.replace("\n", " ") for each in paragraphs
    )


def main() -> None:
    """The entry point."""
    build()(prog_name="longctx")
