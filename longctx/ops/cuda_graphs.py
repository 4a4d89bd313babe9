"""Capture of CUDA graphs beside other work of the process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def capture(
    body: Callable[[], None], device: torch.device, *, rehearsal: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Run `rehearsal`, or else `body`, whose work is on `device`, once; capture `body`, and return what replays it."""
    with torch.inference_mode():
        # Once for real: kernels are compiled and libraries make their handles, which a capture does not allow.
        (rehearsal or body)()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate meanwhile.
        with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
            body()
    return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps a workspace of tens of MiB for every stream that it has seen.
    # Kernels of a graph have the priority of the stream that they were captured from. What is captured is bound by
    # latency, and comes before what may run beside it.
    return torch.cuda.Stream(device, priority=-1)
