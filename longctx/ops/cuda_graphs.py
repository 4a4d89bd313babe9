"""Capture of CUDA graphs beside other work of the process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_capturing = threading.Lock()


def capture(
    body: Callable[[], None], device: torch.device, *, rehearsal: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Run `rehearsal`, or else `body`, whose work is on `device`, once; capture `body`, and return what replays it.

    To be replayed on the stream that is current now, and on no other: what it needs only while it runs it shares with
    all that was captured for that stream.
    """
    with torch.inference_mode():
        # Once for real: kernels are compiled and libraries make their handles, which a capture does not allow.
        (rehearsal or body)()
        with _capturing:
            graph = _place(device, torch.cuda.current_stream(device).cuda_stream).capture(body)
    return graph.replay


class _Place:
    """The stream to capture from, and the memory of what is captured: one of each for all that runs in turn.

    cuBLAS gives every stream a workspace of tens of MiB, which replays of its graphs write to. It lies in this memory,
    and lasts as long, also where the workspaces are let go of meanwhile, as Lightning does; and graphs that may run at
    once have different ones.
    """

    def __init__(self, device: torch.device) -> None:
        # Kernels of a graph have the priority of the stream that they were captured from. What is captured is bound by
        # latency, and comes before what may run beside it.
        self.stream, self.pool = torch.cuda.Stream(device, priority=-1), torch.cuda.graph_pool_handle()
        # This memory goes when the last graph that uses it goes, so one always does.
        self.anchor = self.capture(lambda: torch.zeros(1, device=device))

    def capture(self, body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            body()
        return graph


@functools.cache
def _place(device: torch.device, replayed_on: int) -> _Place:
    return _Place(device)
