"""The commands that would settle what a comparison left open: those that made the rows, with more rounds.

What a results file says of its command is a stranger's text: only a command of ours is taken, word by word, and
written anew with every word quoted.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass

from longctx.analysis.comparison import FEWEST_ROUNDS, Comparison
from longctx.analysis.matching import Pool, rounds_of
from longctx.config import going_on
from longctx.results import MAX_TEXT

_WITH_VALUE = ("--rounds", "--output-file", "--results-dir", "--max-time")
_ALONE = ("--resume", "--retry", "--force", "--json", "--quiet", "--strict")
_OF_QUICK = {"--seq-len": "--sequence-lengths", "--runs": "--benchmark-runs"}
_QUICK_DEFAULTS = {"--sequence-lengths": "2048", "--benchmark-runs": "5"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line that adds rounds to a file of one side, `base` or `new`."""

    side: str
    text: str


def settling(comparison: Comparison) -> list[Command]:
    """What to run, for all inconclusive cells together: one command a file, none where no command is recorded.

    A side that has rounds enough is asked for twice as many when the other has enough too. None for a cell that more
    rounds would leave where it is.
    """
    wanted: dict[tuple[str, str, str], int] = {}
    for cell in comparison.cells:
        if cell.verdict != "inconclusive" or not cell.more_rounds_help:
            continue
        sides = {"base": cell.base, "new": cell.new}
        enough = all(len(pool.rounds) >= FEWEST_ROUNDS for pool in sides.values())
        for side, pool in sides.items():
            missing = len(pool.rounds) if enough else FEWEST_ROUNDS - len(pool.rounds)
            if missing > 0 and pool.rows[-1].command:
                place = (side, str(pool.rows[-1].command), pool.paths[-1])
                wanted[place] = max(wanted.get(place, FEWEST_ROUNDS), _rounds_in_last_file(pool) + missing)
    lines = [(side, with_rounds(command, path, rounds)) for (side, command, path), rounds in wanted.items()]
    first_sides: dict[str, str] = {}
    for side, text in lines:
        if text:
            # A file that is both sides is measured once.
            first_sides.setdefault(text, side)
    return [Command(side=side, text=text) for text, side in first_sides.items()]


def _rounds_in_last_file(pool: Pool) -> int:
    return len(rounds_of(pool.rows[-1]))


def with_rounds(command: str, path: str, rounds: int) -> str | None:
    """`command` so that it brings the file at `path` to `rounds` rounds, None if it is no sweep of ours."""
    words = words_of(command)
    if not words:
        return None
    kept = _without_output(words[2:])
    if words[1] == "quick":
        kept = [_OF_QUICK.get(word, word) for word in kept]
        for flag, value in _QUICK_DEFAULTS.items():
            kept += [] if flag in kept else [flag, value]
    return _resumed(["longctx", "sweep", *kept, "--rounds", str(rounds)], path)


def search_again(command: str, path: str) -> str | None:
    """`command` so that it goes on with the search for limits in the file at `path`, None if it is none of ours."""
    words = words_of(command, ("limits",))
    return _resumed([*words[:2], *_without_output(words[2:])], path) if words else None


def _resumed(words: list[str], path: str) -> str:
    return shlex.join([*words, *going_on(path)])


def words_of(command: str, names: Collection[str] = ("sweep", "comprehensive", "quick")) -> list[str]:
    """The words of `command` if it is one of ours that is called so, else none."""
    try:
        # As long as a text can be that was read: its end may be missing.
        words = shlex.split(command) if len(command) < MAX_TEXT else []
    except ValueError:
        return []
    return words if words[:1] == ["longctx"] and words[1:2] and words[1] in names else []


def _without_output(words: list[str]) -> list[str]:
    """`words` without the options that say where to save and how much to measure."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in _WITH_VALUE:
            skip = True
        elif word not in _ALONE and word.partition("=")[0] not in _WITH_VALUE:
            kept.append(word)
    return kept
