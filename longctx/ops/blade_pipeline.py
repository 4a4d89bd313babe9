"""BLADE's slabs on CUDA: the chain of one beside what comes before and after the chain of others.

The chain leaves most of a GPU idle, and what is off it fills a GPU. So the rest of a slab runs on a second stream:

    caller's stream              chain 0       chain 1       chain 2
    second stream    before 0, | before 1, | after 0, before 2, | after 1, ...

Letters: B batch, C tokens of a chunk, D d_model, N state_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from longctx.ops.blade_graph import Prepared, Slab

TRAINING_BESIDE, INFERENCE_BESIDE = True, False
"""Whether a second stream is used, where there is more than one slab; without gradients never in a caller's graph.

On an H200 it takes a tenth off a training step; without gradients too little is off the chain to pay for the launches.
"""


def run(
    device: torch.device,
    count: int,
    before: Callable[[int], None],
    chain: Callable[[int], None],
    after: Callable[[int], None],
    *,
    beside: bool,
) -> None:
    """before(i), chain(i), after(i) for each i below count, chain(i) beside after(i - 1) and before(i + 1).

    When before(i + 2) begins after(i) has ended, and with it all use of what slab i had. What before and after allocate
    belongs to the second stream, so chain must not let go of it. beside: False for one after the other.
    """
    if not beside or count == 1:
        for index in range(count):
            before(index)
            chain(index)
            after(index)
        return
    with torch.cuda.device(device):
        here, second = torch.cuda.current_stream(), _second_stream(device)
        second.wait_stream(here)
        try:
            with torch.cuda.stream(second):
                before(0)
                ready = second.record_event()
            for index in range(count):
                here.wait_event(ready)
                chain(index)
                done = here.record_event()
                with torch.cuda.stream(second):
                    if index + 1 < count:
                        before(index + 1)
                        ready = second.record_event()
                    second.wait_event(done)
                    after(index)
        finally:
            # Whatever is let go of from here on may be used again by this stream.
            here.wait_stream(second)


def run_slabs(
    prepared: Prepared,
    rows: Sequence[tuple[Tensor, Tensor]],
    s: Tensor,
    project: Callable[[Slab, Tensor], None],
    contract: Callable[[Slab, Tensor, Tensor], None],
) -> Tensor:
    """Whole chunks without gradients: rows of x and y `[count, B, C, D]` for each slab, s `[B, N]` -> s after them.

    project(slab, scratch) fills qkv from residual, where x has been put; contract(slab, scratch, y) what is left to do
    behind the chain. scratch: a buffer `[count, B, C, D]`.
    """
    like = rows[0][0]
    scratch = like.new_empty(max(x.numel() for x, _ in rows))
    beside = INFERENCE_BESIDE and not prepared.captured
    last = [s]
    with ExitStack() as held:
        # In a graph of the caller's each slab is made anew, and there should be one at a time.
        slabs = (
            [held.enter_context(prepared.slab(*x.shape[:3], i % 2)) for i, (x, _) in enumerate(rows)] if beside else []
        )

        def before(index: int) -> None:
            x = rows[index][0]
            if not beside:
                held.close()
                slabs.append(held.enter_context(prepared.slab(*x.shape[:3])))
            slab, _ = slabs[index]
            slab.residual.copy_(x)
            project(slab, scratch[: x.numel()].view(x.shape))

        def chain(index: int) -> None:
            slab, replay = slabs[index]
            slab.s.copy_(last[0])
            replay()
            # One after the other, a slab may be another thread's before the next begins.
            last[0] = slab.s if beside else slab.s.clone()

        def after(index: int) -> None:
            x, y = rows[index]
            contract(slabs[index][0], scratch[: x.numel()].view(x.shape), y)
            if not beside:
                slabs[index] = None

        run(like.device, len(rows), before, chain, after, beside=beside)
        return last[0].clone()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps a workspace of tens of MiB for every stream that it has seen.
    return torch.cuda.Stream(device)
