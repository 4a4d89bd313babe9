"""BLADE's slabs in training on CUDA: the chain of one beside what comes before and after the chain of others.

The chain leaves most of a GPU idle, and what is off it fills a GPU. So the rest of a slab runs on a second stream:

    caller's stream              chain 0       chain 1       chain 2
    second stream    before 0, | before 1, | after 0, before 2, | after 1, ...

Without gradients too little is off the chain to pay for the launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

TRAINING_BESIDE = True
"""Whether a second stream is used, where there is more than one slab: on an H200 a fortieth off a training step."""


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


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps a workspace of tens of MiB for every stream that it has seen.
    return torch.cuda.Stream(device)
