"""What a run that was ended early still lacks, told from the command and the configuration that its rows keep.

Both are a stranger's text: a command is split into words and counted, never run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.analysis.frontier import frontiers
from longctx.analysis.matching import rounds_of
from longctx.analysis.settings import AXES, without
from longctx.analysis.settle import search_again, with_rounds, words_of
from longctx.config import AXES as VARIED
from longctx.results import BenchmarkResult

MOST_CELLS = 100_000
_SETTINGS = without(AXES, ("device", "training_step"))


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """Of `cells` cells `missing` were not measured, and `short` in fewer than `rounds` rounds. searches: those are
    searches for limits, and `missing` not finished.

    lengths: of those that were not measured, if there are any, else of the others. command: measures what is missing,
    None where that is not known.
    """

    cells: int
    missing: int
    short: int
    rounds: int
    lengths: tuple[int, ...]
    command: str | None
    searches: bool = False


def unfinished_search(rows: Sequence[BenchmarkResult], path: str) -> list[Unfinished]:
    """The same of a search for limits, which its rows tell by themselves; none where all of it is finished."""
    found = frontiers(rows)
    left = sum(not each.finished for each in found)
    if not left:
        return []
    # A search that was gone on with has the command of its first part too, and that of the last part counts.
    command = next((str(row.command) for row in reversed(rows) if row.command), "")
    shared = {"cells": len(found), "missing": left, "short": 0, "rounds": 1, "lengths": (), "searches": True}
    return [Unfinished(**shared, command=search_again(command, path))]


def unfinished(rows: Sequence[BenchmarkResult], path: str, *, blocks: Sequence[str]) -> list[Unfinished]:
    """One for each command that wrote rows to the file at `path` and is not done. blocks: all of ours."""
    there = {_place(str(row.block_name), row.sequence_length, _values(row)): row for row in rows}
    found = []
    for command, row in {row.command: row for row in rows if row.command}.items():
        cells = _planned(str(command), row, blocks)
        rounds = _config(row).get("rounds")
        if not cells or not isinstance(rounds, int):
            continue
        short = [c for c in cells if c in there and there[c].ok and len(rounds_of(there[c])) < rounds]
        missing = [cell for cell in cells if cell not in there]
        if short or missing:
            found.append(
                Unfinished(
                    cells=len(cells),
                    missing=len(missing),
                    short=len(short),
                    rounds=rounds,
                    lengths=tuple(sorted({length for _, length, _ in missing or short})),
                    command=with_rounds(str(command), path, rounds),
                )
            )
    return found


def _planned(command: str, row: BenchmarkResult, blocks: Sequence[str]) -> list[tuple]:
    """The cells that `command`, which wrote `row`, set out to measure; none where that cannot be told."""
    options = _options(command)
    lengths = _config(row).get("sequence_lengths")
    if options is None or not isinstance(lengths, list) or not all(isinstance(t, int) for t in lengths):
        return []
    given = _values(row)
    choices = [_choices(axis.name, given[axis.name], options) for axis in _SETTINGS]
    names = [_name(word, blocks) for word in options.get("--blocks", ())] or list(blocks)
    # What `auto` stands for beside another format is not told.
    if any("auto" in values for values in choices) or math.prod(map(len, [names, lengths, *choices])) > MOST_CELLS:
        return []
    cells = []
    for values in itertools.product(*choices):
        setting = dict(zip(given, values, strict=True))
        if _config(row).get("num_kv_heads") is None:
            setting["num_kv_heads"] = setting["n_heads"]
        cells += [_place(name, length, setting) for length in lengths for name in names]
    # One that does not hold its own row is not understood.
    own = _place(str(row.block_name), row.sequence_length, given)
    return list(dict.fromkeys(cells)) if own in cells else []


def _options(command: str) -> dict[str, list[str]] | None:
    """Option -> its words, of a sweep of ours that measures one side; else None."""
    words = words_of(command)
    if not words or "--against" in words:
        return None
    options: dict[str, list[str]] = {}
    name = ""
    for word in words[2:]:
        if word.startswith("--"):
            name = word
            options[name] = []
        elif name:
            options[name].append(word)
    return options


def _choices(name: str, value: Any, options: Mapping[str, list[str]]) -> list[str]:
    """The values of an axis that a sweep varies, else the one that its rows have."""
    words = options.get(f"--{name.replace('_', '-')}", ()) if name in VARIED else ()
    return list(words) if len(words) > 1 else [value]


def _name(word: str, blocks: Sequence[str]) -> str:
    """The name of the rows of a word of `--blocks`, as `BlockRequest.name` has it."""
    head, colon, options = word.rpartition(":")
    if "=" not in options:
        head, colon, options = word, "", ""
    own = next((block for block in blocks if block.casefold() == head.casefold()), None)
    return (own or head.rpartition(":")[2]) + colon + options


def _values(row: BenchmarkResult) -> dict[str, str]:
    return {axis.name: str(axis.of(row)) for axis in _SETTINGS}


def _place(name: str, length: int, values: Mapping[str, str]) -> tuple:
    return name, length, tuple(values.values())


def _config(row: BenchmarkResult) -> dict[str, Any]:
    return row.config if isinstance(row.config, dict) else {}
