"""What a block leaves behind in the process that measured it, and that would be part of the next block's time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_LIBRARIES = ("torch", "triton", "concurrent", "tqdm", "multiprocessing")
_SPACES = (torch, F, torch.Tensor, nn.Module, nn.Linear, nn.LayerNorm)
"""Where a library that speeds blocks up puts functions of its own in the place of torch's."""


class Traces:
    """The process as it is now, to be compared with what it is later."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._functions = [_functions(vars(space)) for space in _SPACES]

    def left(self) -> bool:
        """Whether a thread goes on that was not there, or another function stands where one of torch's stood."""
        if any(_goes_on(thread) for thread in set(threading.enumerate()) - self._threads):
            return True
        now = (_functions(vars(space)) for space in _SPACES)
        pairs = zip(self._functions, now, strict=True)
        return any(new.get(name, old) is not old for before, new in pairs for name, old in before.items())


def _functions(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not name.startswith("_") and callable(value)}


def _goes_on(thread: threading.Thread) -> bool:
    """Whether a thread may work on: those of libraries wait to be asked."""
    source = getattr(getattr(thread, "_target", None), "__module__", None) or type(thread).__module__
    return thread.is_alive() and source.partition(".")[0] not in _LIBRARIES
