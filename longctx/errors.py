"""Errors that a user can act on: what happened, why, what to do, and the exit code it ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LongctxError(Exception):
    """What went wrong (`message`), what to do about it (`hint`), and how the command ends (`exit_code`)."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            # Python shows it below the message where nobody catches the error.
            self.add_note(hint)
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(LongctxError):
    """Unusable input: an unknown block, a bad option, an impossible shape. Exit code 2."""


class ResultsError(LongctxError):
    """A results file that cannot be read, written or continued. Exit code 2."""


class CheckFailed(LongctxError):
    """A check failed, or no cell of a run is ok. Exit code 3."""

    exit_code = 3


class MissingError(LongctxError):
    """A device or an optional dependency that was asked for is not there. Exit code 5."""

    exit_code = 5


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'BLADE'?"`, or the empty string when nothing known is close to `word`."""
    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    return f" Did you mean '{by_fold[close[0]]}'?" if close else ""
