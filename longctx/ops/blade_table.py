"""Where the kernels of BLADE's chains find the rows of a call: a table of addresses in device memory.

A CUDA graph keeps the addresses that it was captured with. Kernels that look them up run over the tensors of any call
instead, without a copy into buffers and back: before a replay, one small kernel writes the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.launch import launch

ENTRIES = 10


def new_table(device: torch.device) -> Tensor:
    return torch.zeros(ENTRIES, dtype=torch.int64, device=device)


def point(table: Tensor, tensors: Sequence[Tensor]) -> None:
    """Entry i of the table = address of tensor i, once all that was launched before has run.

    Nothing here keeps the tensors alive.
    """
    # Tensors, not their addresses: a variant of a kernel is kept for every number that it was given.
    launch(_point, (1,), (table, *tensors, *[table] * (ENTRIES - len(tensors))), {}, num_warps=1)


def holds(rows: Tensor) -> bool:
    """Whether an entry can be these rows as they lie: without gaps, from a multiple of 16 bytes."""
    return rows.is_contiguous() and rows.data_ptr() % 16 == 0


@triton.jit(do_not_specialize_on_alignment=list("abcdefghij"))
def _point(table, a, b, c, d, e, f, g, h, i, j):
    tl.store(table, a.to(tl.int64))
    tl.store(table + 1, b.to(tl.int64))
    tl.store(table + 2, c.to(tl.int64))
    tl.store(table + 3, d.to(tl.int64))
    tl.store(table + 4, e.to(tl.int64))
    tl.store(table + 5, f.to(tl.int64))
    tl.store(table + 6, g.to(tl.int64))
    tl.store(table + 7, h.to(tl.int64))
    tl.store(table + 8, i.to(tl.int64))
    tl.store(table + 9, j.to(tl.int64))


@triton.jit
def at(table, ENTRY: tl.constexpr, like, offset):
    """`offset` elements, of the type that `like` points to, behind the address in an entry."""
    return tl.load(table + ENTRY).to(tl.pointer_type(like.dtype.element_ty)) + offset


@triton.jit
def rows_at(table, ENTRY: tl.constexpr, like, offset):
    """The same for rows that begin at multiples of 16 bytes, as all of a width that is one do."""
    start = tl.load(table + ENTRY).to(tl.pointer_type(like.dtype.element_ty)) + offset
    # Without the hint rows are read two bytes at a time. It counts where it is given to the sum, not to a call.
    return tl.multiple_of(start, 16)
