"""Another checkout of the user's code: this process works in its folder, and must load it and no other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longctx.config import names_file
from longctx.errors import UsageError

_INSTALLED = ("site-packages", "dist-packages")


def search_here_first() -> None:
    """Have the working directory, and `src` in it, come before what is installed and what PYTHONPATH names."""
    here = os.getcwd()
    folders = [folder for folder in (here, os.path.join(here, "src")) if os.path.isdir(folder)]
    sys.path[:] = folders + [folder for folder in sys.path if folder not in folders]


def check_origin(target: str, beside: str) -> None:
    """Raises UsageError unless the code of `target`, which has been loaded, is that of the working directory.

    beside: the folder that the other side works in. None of its files may have been loaded where this one has the same:
    both sides would then be one in part.
    """
    here, beside = os.path.realpath(os.getcwd()), os.path.realpath(beside)
    place = target.rpartition(":")[0]
    if not names_file(place):
        origin = _origin(place)
        if origin is None or not Path(origin).is_relative_to(here):
            raise UsageError(
                f"{place} was loaded from {origin or 'nowhere'}, not from the checkout {here}",
                "the checkout holds the package in its top folder, or in src",
            )
    for name in list(sys.modules):
        origin = None if name.partition(".")[0] == "longctx" else _origin(name)
        if origin is None or not Path(origin).is_relative_to(beside) or Path(origin).is_relative_to(here):
            continue
        part = Path(origin).relative_to(beside)
        if Path(here, part).exists() and not set(part.parts) & set(_INSTALLED):
            raise UsageError(
                f"{name} was loaded from {origin}, although the checkout {here} has a {part} of its own",
                "something in the environment leads there: PYTHONPATH, or code that changes sys.path",
            )


def _origin(name: str) -> str | None:
    """The file that a module was loaded from, or the folder of a package without one."""
    # Asked for an attribute, some modules import others or make it up.
    known = getattr(sys.modules.get(name), "__dict__", {})
    folders = known.get("__path__")
    paths = [known.get("__file__"), *(folders if folders is not None else [])]
    found = next((path for path in paths if isinstance(path, str) and os.path.isabs(path)), None)
    return os.path.realpath(found) if found else None
