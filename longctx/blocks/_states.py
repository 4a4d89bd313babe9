"""States of streams, whatever the block: the tensors in them, where these may be used, and how short keys grow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.ops.decode import Stream
from longctx.ops.key_values import KeyValues


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors that a state carries on, with their graphs, in the order and shapes of those of `state.detach()`."""
    if state is None:
        return []
    kept = state.detach()
    found = []
    for name in _fields(kept):
        value = getattr(state, name)
        if isinstance(value, KeyValues):
            alive = min(value.alive, value.reach)
            value = value.buffer[:, value.end - alive : value.end]
        found.append(value)
    return found


def with_tensors(kept: Any, tensors: list[Tensor]) -> Any:
    """A state like `kept`, which came from `detach()`, with these tensors for its own."""
    changes: dict[str, Any] = {}
    for name, tensor in zip(_fields(kept), tensors, strict=True):
        value = getattr(kept, name)
        changes[name] = dataclasses.replace(value, buffer=tensor) if isinstance(value, KeyValues) else tensor
    return dataclasses.replace(kept, **changes)


def usable(state: Any) -> Any:
    """The state, with copies of what inference mode made where it does not hold any more: autograd may not save such
    tensors, and nothing may write to them."""
    if state is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return state
    if isinstance(state, Stream):
        return state
    changes: dict[str, Any] = {}
    for name in _fields(state):
        value = getattr(state, name)
        if isinstance(value, KeyValues):
            if value.buffer.is_inference():
                changes[name] = value.detach()
        elif value.is_inference():
            changes[name] = value.clone()
    return dataclasses.replace(state, **changes) if changes else state


def _fields(state: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(state)]
    return [name for name in names if isinstance(getattr(state, name), Tensor | KeyValues)]


@dataclass(eq=False)
class Tape:
    """Keys and values in arrival order, with room behind them, so that a token moves none of the others.

    rows `[B, capacity, 2GK]`; the first `used` of them are written, and never written again.
    """

    rows: Tensor
    used: int

    def goes_on(self, end: int, new: Tensor) -> bool:
        """Whether `new` `[B, t, 2GK]` can follow what ends at `end`."""
        return (
            # Another state may have gone on from the same one: what lies behind `end` is then the other's.
            self.used == end
            and end + new.shape[1] <= self.rows.shape[1]
            and self.rows.dtype == new.dtype
            and not (self.rows.is_inference() and not torch.is_inference_mode_enabled())
        )


def append(tape: Tape | None, end: int, kv: Tensor, new: Tensor, room: int) -> tuple[Tensor, Tape]:
    """(kv `[B, n, 2GK]`, which ends at `end` on the tape, and new `[B, t, 2GK]` behind it; the tape they are on: the
    same, or another one of `room` rows)."""
    if tape is None or not tape.goes_on(end, new):
        tape = Tape(rows=new.new_empty(new.shape[0], room, new.shape[2]), used=kv.shape[1])
        tape.rows[:, : kv.shape[1]] = kv
    first = tape.used - kv.shape[1]
    tape.rows[:, tape.used : tape.used + new.shape[1]] = new
    tape.used += new.shape[1]
    return tape.rows[:, first : tape.used], tape
