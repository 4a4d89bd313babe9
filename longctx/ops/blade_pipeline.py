"""Slabs of BLADE without gradients on CUDA, the chain of one beside what comes before and after the chain of others.

The chain leaves most of a GPU idle, and what is off it fills a GPU. So the projection of the next slab and the second
matrix of the feed-forward of the last one run on a second stream, over two sets of buffers:

    caller's stream             chain 0      chain 1       chain 2
    second stream    project 0, project 1, | contract 0, project 2, | contract 1, ...

Letters: B batch, C tokens of a chunk, D d_model, N state_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from longctx.ops.blade_graph import Prepared, Slab

BESIDE = True
"""Whether a second stream is used, where there is more than one slab and the caller is not capturing a graph."""


def run_slabs(
    prepared: Prepared,
    rows: Sequence[tuple[Tensor, Tensor]],
    s: Tensor,
    project: Callable[[Slab, Tensor], None],
    contract: Callable[[Slab, Tensor, Tensor], None],
) -> Tensor:
    """Whole chunks, slab by slab: rows of x and y `[count, B, C, D]` each, s `[B, N]` -> s after them.

    project(slab, scratch) fills qkv from residual, where x has been put; contract(slab, scratch, y) what is left to do
    behind the chain. scratch: a buffer `[count, B, C, D]`.
    """
    like = rows[0][0]
    scratch = like.new_empty(max(x.numel() for x, _ in rows))

    def begin(index: int, slab: Slab) -> None:
        x = rows[index][0]
        slab.residual.copy_(x)
        project(slab, scratch[: x.numel()].view(x.shape))

    def end(index: int, slab: Slab) -> None:
        x, y = rows[index]
        contract(slab, scratch[: x.numel()].view(x.shape), y)

    if not BESIDE or len(rows) == 1 or prepared.captured:
        for index, (x, _) in enumerate(rows):
            with prepared.slab(*x.shape[:3]) as (slab, run):
                begin(index, slab)
                slab.s.copy_(s)
                run()
                end(index, slab)
                s = slab.s.clone()
        return s
    with ExitStack() as held, torch.cuda.device(like.device):
        slabs = [held.enter_context(prepared.slab(*x.shape[:3], index % 2)) for index, (x, _) in enumerate(rows)]
        here, beside = torch.cuda.current_stream(), _second_stream(like.device)
        beside.wait_stream(here)
        try:
            with torch.cuda.stream(beside):
                begin(0, slabs[0][0])
                ready = beside.record_event()
            for index, (slab, run) in enumerate(slabs):
                here.wait_event(ready)
                slab.s.copy_(s)
                run()
                s, done = slab.s, here.record_event()
                with torch.cuda.stream(beside):
                    if index + 1 < len(slabs):
                        # Its buffers were those of the slab before this one, which is done with them by now.
                        begin(index + 1, slabs[index + 1][0])
                        ready = beside.record_event()
                    beside.wait_event(done)
                    end(index, slab)
        finally:
            # Whatever is let go of from here on may be used again by this stream.
            here.wait_stream(beside)
        return s.clone()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps a workspace of tens of MiB for every stream that it has seen.
    return torch.cuda.Stream(device)
