"""Options from a TOML file: words that stand before those of the command line, which win."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UsageError, did_you_mean

OPTION = "--config"
NEVER = {
    "--against": "it runs the code of another folder, so it is written where it is meant: on the command line",
    OPTION: "a file does not read another one",
    "--help": "it is no option of a sweep",
}


def with_presets(args: Sequence[str], parameters: Sequence[Any]) -> list[str]:
    """`args` behind the options of the file that `--config` names in them; an option that is in both counts as in
    `args`. parameters: of the command. Raises UsageError.
    """
    path = _named(args)
    if path is None:
        return list(args)
    known = {name: parameter for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    # By parameter: `--flag` and `--no-flag` are the same one.
    given = {id(known[name]) for word in args if (name := word.partition("=")[0]) in known}
    words: list[str] = []
    for key, value in _read(path).items():
        name = _option(key, known, path)
        if id(known[name]) not in given:
            words += _words(name, known[name], value, path)
    return [*words, *args]


def _named(args: Sequence[str]) -> str | None:
    """The file after the last `--config`."""
    found = None
    for index, word in enumerate(args):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name == OPTION:
            found = value if equals else next(iter(args[index + 1 : index + 2]), None)
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {reason}", f"{OPTION} takes a TOML file of options") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}", 'a line is `batch-size = [1, 4]` or `dtype = "bf16"`') from None


def _option(key: str, known: Collection[str], path: str) -> str:
    name = "--" + key.replace("_", "-")
    if name in NEVER:
        raise UsageError(f"{name} cannot come from {path}", NEVER[name])
    if name not in known:
        options = [each.removeprefix("--") for each in known if each.startswith("--") and each not in NEVER]
        raise UsageError(
            f"{path} has {key!r}, which is no option.{did_you_mean(name.removeprefix('--'), options)}",
            "its keys are the options of the command, without the dashes in front",
        )
    return name


def _words(name: str, parameter: Any, value: Any, path: str) -> list[str]:
    """One option with its value as the command line would have it."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {name} is true or false, not {value!r}")
        if value:
            return [name]
        # `--flag/--no-flag` has a word for false; a plain flag is false by not being there.
        others = parameter.secondary_opts if name in parameter.opts else parameter.opts
        return list(others[:1])
    values = value if isinstance(value, list) else [value]
    if not parameter.multiple and len(values) != 1:
        raise UsageError(f"{path}: {name} takes one value, not {len(values)}")
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int | float | str):
            raise UsageError(f"{path}: {name} cannot be {each!r}", "values are numbers, texts, true, false and lists")
    return [f"{name}={each}" for each in values]
