"""Several blocks in a row, measured as one: `--layers N`.

Letters: B batch, T sequence length, D d_model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longctx.blocks._spec import ELEMENT_BYTES, Cost
from longctx.config import Cell
from longctx.engine.loading import LoadedBlock


class Stack(nn.Module):
    """x `[B, T, D]` through one block after another. Its state is the list of theirs, None if one of them has none."""

    def __init__(self, blocks: Sequence[nn.Module], *, takes_keep_state: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.takes_keep_state = takes_keep_state

    @property
    def path(self) -> str | None:
        return getattr(self.blocks[0], "path", None)

    def forward(self, x: Tensor, state: list[Any] | None = None, *, keep_state: bool = True) -> tuple[Tensor, Any]:
        after = []
        more = {} if keep_state or not self.takes_keep_state else {"keep_state": False}
        for index, block in enumerate(self.blocks):
            y = block(x, **more) if state is None else block(x, state[index], **more)
            x, *rest = y if isinstance(y, tuple | list) and y else (y,)
            after.append(rest[0] if rest else None)
        return x, after if keep_state and None not in after else None

    def step(self, x_t: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token, x_t `[B, 1, D]`. The states given are consumed."""
        after = []
        for block, given in zip(self.blocks, state, strict=True):
            x_t, kept = block.step(x_t, given)
            after.append(kept)
        return x_t, after

    def init_state(self, batch_size: int) -> list[Any]:
        return [block.init_state(batch_size) for block in self.blocks]


def stacked(layers: Sequence[LoadedBlock], cell: Cell) -> LoadedBlock:
    """The same block several times, each with weights of its own, as one. cell: that of the stack."""
    first = layers[0]
    modules = [each.module for each in layers]
    rebuild = None
    if all(each.rebuild is not None for each in layers):

        def rebuild(dtype: torch.dtype) -> nn.Module:
            return Stack([each.rebuild(dtype) for each in layers], takes_keep_state=first.takes_keep_state)

    return dataclasses.replace(
        first,
        module=Stack(modules, takes_keep_state=first.takes_keep_state),
        reference=None if first.reference is None else _reference(first.reference),
        cost=None if first.cost is None else _cost(first.cost, cell),
        # Each layer adds its own rounding to what it is given.
        tolerances={dtype: limit * len(layers) for dtype, limit in first.tolerances.items()},
        rebuild=rebuild,
        takes_keep_state=True,
    )


def _reference(of_block: Callable[[nn.Module, Tensor], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def reference(stack: Stack, x: Tensor) -> Tensor:
        for block in stack.blocks:
            y = of_block(block, x)
            x = y[0] if isinstance(y, tuple | list) else y
        return x

    return reference


def _cost(of_block: Cost, cell: Cell) -> Cost:
    """Of all layers. What goes from one to the next need not leave the chip, so its bytes are not counted."""
    between = 2 * cell.tokens * cell.d_model * ELEMENT_BYTES[cell.dtype] * (2 if cell.mode == "train" else 1)
    moved = of_block.bytes + (cell.layers - 1) * max(0.0, of_block.bytes - between)
    return Cost(flops=cell.layers * of_block.flops, bytes=moved, state_bytes=cell.layers * of_block.state_bytes)
