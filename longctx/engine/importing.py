"""Importing a user's own code by file or by package, with errors that say what to do."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from longctx.config import names_file
from longctx.errors import UsageError, did_you_mean


def import_target(target: str) -> tuple[Callable[..., Any], bytes]:
    """What `path/to/file.py:Name` or `package.module:Name` names, and the text of the code that it is made of: its file
    and those of the user's own that it imports.

    Leaves the file's folder on sys.path, for imports made later. Raises UsageError for a file, package or name that
    is not there, code that fails when it is imported, and a name that nothing can be built with.
    """
    place, _, name = target.rpartition(":")
    source = _import_file(Path(place)) if names_file(place) else _import_package(place)
    if not hasattr(source, name):
        public = [known for known, value in vars(source).items() if callable(value) and not known.startswith("_")]
        raise UsageError(
            f"{place} has no {name!r}.{did_you_mean(name, public)}",
            f"write {place}:Name with the name of an nn.Module class or of a function that returns one",
        )
    found = getattr(source, name)
    if isinstance(found, nn.Module) or not callable(found):
        what = "a module already built" if isinstance(found, nn.Module) else f"of type {type(found).__name__}"
        raise UsageError(
            f"{target} is {what}, not something to build a block with",
            "name an nn.Module class or a function that returns a module",
        )
    return found, _source_of(source)


_FILES: dict[tuple[str, str], ModuleType] = {}
_SIBLINGS: dict[str, str] = {}


def _import_file(path: Path) -> ModuleType:
    """The file as a module of its own, run once as long as it stays the same."""
    if not path.is_file():
        raise UsageError(
            f"there is no file {str(path)!r}", "write path/to/file.py:Name, seen from the working directory"
        )
    path = path.resolve()
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if (str(path), digest) in _FILES:
        return _FILES[str(path), digest]
    # Files of two users' folders may import different modules of the same name.
    for sibling, home in list(_SIBLINGS.items()):
        if home != folder and (Path(folder, f"{sibling}.py").exists() or Path(folder, sibling).is_dir()):
            del _SIBLINGS[sibling]
            for stale in [known for known in sys.modules if known.partition(".")[0] == sibling]:
                del sys.modules[stale]
    before = set(sys.modules)
    name = f"longctx_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{str(path)!r} is not a Python file", "write path/to/file.py:Name")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        sys.modules.pop(name, None)
        raise UsageError(f"{path.name} cannot be loaded: {in_words(error)}", _way_out(error, path)) from error
    for found in set(sys.modules) - before - {name}:
        origin = getattr(sys.modules.get(found), "__file__", None)
        if origin and Path(origin).is_relative_to(folder):
            _SIBLINGS[found.partition(".")[0]] = folder
    _FILES[str(path), digest] = module
    return module


def _way_out(error: BaseException, path: Path) -> str:
    """What to do about a file that raised `error` when it was run."""
    if isinstance(error, SystemExit):
        return "what it does as a script belongs below `if __name__ == '__main__':`"
    if isinstance(error, ImportError) and "relative import" in said_by(error):
        names, folder = [path.stem], path.parent
        while Path(folder, "__init__.py").exists() or len(names) == 1:
            names, folder = [folder.name, *names], folder.parent
        return f"a file of a package is named as one: {'.'.join(names)}:Name, from the folder {folder}"
    return "run it by itself with python to see more"


def _import_package(place: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(
                f"there is no module {place!r} (nothing called {error.name!r} can be imported)",
                "install its package or run from its folder; a file is written path/to/file.py:Name",
            ) from error
        raise UsageError(f"{place} cannot be loaded: {in_words(error)}") from error
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise UsageError(f"{place} cannot be loaded: {in_words(error)}") from error


def _source_of(source: ModuleType) -> bytes:
    """The text of a module's file, and of each file of the user's that it imports, directly or through another.

    What is installed (site-packages, the standard library) has its version, and is left out; so are we.
    """
    todo, seen = [source], {}
    while todo:
        module = todo.pop()
        path = getattr(module, "__file__", None)
        if module.__name__ in seen or not path or not path.endswith(".py") or not Path(path).is_file():
            continue
        seen[module.__name__] = Path(path).read_bytes()
        todo += [found for name in _imports(module, seen[module.__name__]) if _is_users(found := sys.modules.get(name))]
    if source.__name__ not in seen:
        return source.__name__.encode()
    # Names of modules made from a file hold the place of that file, which says nothing of what it does.
    own = seen.pop(source.__name__)
    return b"\0".join([own, *(part for name in sorted(seen) for part in (name.encode(), seen[name]))])


def _imports(module: ModuleType, text: bytes) -> list[str]:
    """Full names of the modules that the code of `module` may import, wherever in it."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (module.__package__ or "").split(".")
                base = ".".join(filter(None, [*package[: len(package) - node.level + 1], base]))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    # Importing a.b.c runs a and a.b too.
    return [".".join(parts[: end + 1]) for name in names for parts in [name.split(".")] for end in range(len(parts))]


def _is_users(module: ModuleType | None) -> bool:
    path = getattr(module, "__file__", None)
    return bool(path) and module.__name__.partition(".")[0] != "longctx" and not _is_installed(path)


def _is_installed(path: str) -> bool:
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    installed += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(Path(path).is_relative_to(folder) for folder in installed)


def said_by(error: BaseException) -> str:
    """The message of an exception, also of one whose message cannot be made."""
    try:
        return str(error).strip()
    except Exception as second:
        return f"its message cannot be made: {type(second).__name__}"


def in_words(error: BaseException) -> str:
    """`ValueError in mine.py, line 12: the message`: the kind, the innermost line of the user's own, what was said."""
    ours = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    frames = [f for f in frames if not (_is_installed(f.filename) or Path(f.filename).is_relative_to(ours))]
    head, text = type(error).__name__, said_by(error)
    if frames:
        head += f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}"
    return f"{head}: {text}" if text else head
