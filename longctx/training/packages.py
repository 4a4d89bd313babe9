"""Base classes that both of Lightning's packages take for their own: `lightning` and the older `pytorch_lightning`.

Each package checks with isinstance that it is given objects of its own classes, and the user may import either, or
both, after this package was imported. So our classes descend from the classes of both where both are installed, and
what a module or data module inherits comes from the package whose Trainer it is attached to.
"""

from __future__ import annotations

import inspect
import sys
from types import FunctionType, ModuleType
from typing import Any

import lightning.pytorch as new_lightning
from lightning_utilities.core import rank_zero


def _import_old() -> ModuleType | None:
    """The older package, which is no dependency. Beside the newer one it takes a fifth of a second."""
    if "pytorch_lightning" in sys.modules:
        return sys.modules["pytorch_lightning"]
    # Both tell what they have to tell through one logger: it stays that of the package which the user asked for.
    log, category = rank_zero.log, rank_zero.rank_zero_deprecation_category
    try:
        import pytorch_lightning
    except ImportError:
        return None
    finally:
        rank_zero.log, rank_zero.rank_zero_deprecation_category = log, category
    return pytorch_lightning


old_lightning = _import_old()


def packages() -> list[ModuleType]:
    """The Lightning packages that are installed, the newer first."""
    return [package for package in (new_lightning, old_lightning) if package is not None]


def is_lightning_module(value: Any) -> bool:
    """Whether `value` is a LightningModule of either package."""
    return isinstance(value, tuple(package.LightningModule for package in packages()))


def package_of(trainer: Any) -> ModuleType:
    """The package that a Trainer is from; the newer one for None and for strangers."""
    # Trainers are handed out as weak proxies too, whose type isinstance sees through.
    if old_lightning is not None and isinstance(trainer, old_lightning.Trainer):
        return old_lightning
    return new_lightning


def package_in_use(objects: list[Any]) -> ModuleType:
    """The package whose Trainer goes with `objects` (callbacks, loggers, strategies) and with the user's own modules.

    Told by where the classes of the objects come from; else by which package's LightningModule has been subclassed.
    """
    if old_lightning is None:
        return new_lightning
    names = {base.__module__.partition(".")[0] for value in objects for base in type(value).__mro__}
    old, new = "pytorch_lightning" in names, "lightning" in names
    if old == new:
        old, new = (_is_subclassed(package.LightningModule) for package in (old_lightning, new_lightning))
    return old_lightning if old and not new else new_lightning


def _is_subclassed(base: type) -> bool:
    ours = ("lightning.", "pytorch_lightning.", "longctx.")
    return any(not f"{each.__module__}.".startswith(ours) for each in base.__subclasses__())


class _AsTheTrainer:
    """A method as the package of the attached Trainer has it: hooks count as overridden unless they are its own."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name

    def __get__(self, instance: Any, owner: type) -> Any:
        trainer = None if instance is None else getattr(instance, "_trainer", None) or vars(instance).get("trainer")
        return getattr(getattr(package_of(trainer), self.kind), self.name).__get__(instance, owner)


def _both(kind: str) -> type:
    """A class that descends from `kind` of every installed package."""
    bases = tuple(getattr(package, kind) for package in packages())
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"A {kind} of every installed Lightning package."}
    if len(bases) == 2 and kind != "Callback":
        for name in dir(bases[0]):
            first, second = (inspect.getattr_static(base, name, None) for base in bases)
            plain = isinstance(first, FunctionType) and isinstance(second, FunctionType)
            if plain and first is not second and not name.startswith("__"):
                members[name] = _AsTheTrainer(kind, name)
    return type(kind, bases, members)


Callback = _both("Callback")
LightningModule = _both("LightningModule")
LightningDataModule = _both("LightningDataModule")
