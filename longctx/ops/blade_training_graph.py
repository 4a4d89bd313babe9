"""Training's chains of BLADE on CUDA: the fused kernels of both directions, replayed from CUDA graphs.

A graph does some chunks, wherever they lie (ops/blade_table.py), so that what is kept for the backward pass is written
where it stays, and off the chain as many chunks are taken at once as is good there. It reads copies of the weights: it
outlasts every change of them, even of where they lie, and blocks of one shape share it. Where the caller captures a
graph of its own the same kernels go into that, one by one.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights
from longctx.ops.blade_graph import kernels_fit
from longctx.ops.blade_training_layout import GRAPH_CHUNKS
from longctx.ops.cuda_graphs import capture

try:
    from longctx.ops import blade_backward_kernels as backward_kernels
    from longctx.ops import blade_composed, blade_table
    from longctx.ops import blade_kernels as kernels
except ImportError:  # a torch without Triton: torch's own kernels then do both chains
    kernels = backward_kernels = blade_composed = blade_table = None

if TYPE_CHECKING:
    from longctx.ops.blade_backward_kernels import ReverseRows
    from longctx.ops.blade_kernels import Rows

MOST_CHUNKS = 64
"""Chunks of the longest graph. Any number of them is done in graphs of up to 64 by eights, and of 4, 2 and 1."""
MOST_CHUNK_TOKENS = 8192
"""Larger chunks, counted over the batch, wait for work, not for launches: torch's kernels then do as well."""
MOST_CHAINS = 4
"""Shapes that a block keeps graphs for, the last used."""


class TrainingGraphs:
    """Keeps the chains that a block has used: they go when the last block that used them goes.

    An operator takes no such object, so it is given its number. A copy or a pickle is a new one, without chains.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.chains: dict[tuple, TrainingChain] = {}
        _holders[self.number] = self

    def __reduce__(self) -> tuple[type[TrainingGraphs], tuple[()]]:
        return TrainingGraphs, ()


_holders: weakref.WeakValueDictionary[int, TrainingGraphs] = weakref.WeakValueDictionary()
_shared: weakref.WeakValueDictionary[tuple, TrainingChain] = weakref.WeakValueDictionary()


def fused_chain(
    number: int, weights: ChainWeights, batch: int, chunk: int, *, backward: bool = False
) -> AbstractContextManager[TrainingChain | None]:
    """The chains of that shape with these weights, for the holder of that number, to be used inside the context.

    backward: whether the reverse chain will run. None where the kernels do not fit, or have less to do than launches
    cost.
    """
    if batch * chunk > MOST_CHUNK_TOKENS:
        return nullcontext()
    return _training_chain(number, weights, batch, chunk, backward=backward)


@contextmanager
def _training_chain(
    number: int, weights: ChainWeights, batch: int, chunk: int, *, backward: bool
) -> Iterator[TrainingChain | None]:
    chain = _find(number, weights, batch, chunk)
    if chain is None:
        yield None
        return
    with chain.lock:
        chain.load(weights, backward)
        yield chain


def _find(number: int, weights: ChainWeights, batch: int, chunk: int) -> TrainingChain | None:
    holder = _holders.get(number)
    if holder is None or not kernels_fit(weights):
        return None
    device, stream = weights.qkv.device, 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # What the caller's graph uses lies in its memory, and lasts as long.
            with torch.inference_mode(False), torch.no_grad():
                return TrainingChain(weights, batch, chunk, captured=True)
        stream = torch.cuda.current_stream(device).cuda_stream
    shapes = (weights.qkv.shape, weights.inject[0].shape, weights.n_heads, weights.num_kv_heads, weights.norm[2])
    key = (device, stream, weights.qkv.dtype, batch, chunk, *shapes)
    chain = holder.chains.pop(key, None) or _shared.get(key)
    if chain is None:
        with torch.inference_mode(False), torch.no_grad():
            chain = _shared[key] = TrainingChain(weights, batch, chunk)
    holder.chains[key] = chain
    while len(holder.chains) > MOST_CHAINS:
        del holder.chains[next(iter(holder.chains))]
    return chain


class TrainingChain:
    """Both chains over chunks of one shape, and their graphs. Hold `lock` from `load` to the last run.

    captured: whether they run within a graph of the caller's, and need none.
    """

    def __init__(self, weights: ChainWeights, batch: int, chunk: int, *, captured: bool = False) -> None:
        self.batch, self.chunk, self.captured = batch, chunk, captured
        self.composed = blade_composed.Composed(weights.each(torch.empty_like))
        self.back = backward_kernels.ComposedBackward(self.composed)
        self.kernels = {
            "forward": kernels.Forward(self.composed, batch, chunk, kept=True),
            "backward": backward_kernels.Backward(self.back, batch, chunk),
        }
        self.table = blade_table.new_table(weights.qkv.device)
        self.s = weights.qkv.new_zeros(batch, weights.inject[0].shape[1], dtype=torch.float32)
        self.lock = threading.RLock()
        self.graphs: dict[tuple, Callable[[], None]] = {}

    def load(self, weights: ChainWeights, backward: bool) -> None:
        """Take these weights, as they are now."""
        torch._foreach_copy_(self.composed.weights.tensors, weights.tensors)
        self._graph(("compose",), self.composed.compose)()
        if backward:
            self._graph(("compose backward",), self.back.compose)()

    def enter(self, s: Tensor) -> None:
        """Begin with s `[B, N]`: the state before the first chunk, or the gradient of that behind the last."""
        self.s.copy_(s)

    def leave(self, s: Tensor) -> None:
        """Overwrite s with where the chain has come to."""
        s.copy_(self.s)

    def forward(self, rows: Rows) -> None:
        """The next chunks, those of `rows`, with what is kept."""
        self._chunks("forward", rows.entries, _pieces(len(rows.x)))

    def backward(self, rows: ReverseRows) -> None:
        """The same in reverse. qkv's queries are the injected ones."""
        self._chunks("backward", rows.entries, _pieces(len(rows.attended))[::-1])

    def _chunks(self, direction: str, entries: list[Tensor], pieces: list[slice]) -> None:
        for piece in pieces:
            run = self._runner(direction, piece.stop - piece.start)
            blade_table.point(self.table, entries if len(pieces) == 1 else [entry[piece] for entry in entries])
            run()

    def _runner(self, direction: str, count: int = 0) -> Callable[[], None]:
        """What runs so many chunks, wherever the table points when it runs."""
        chain = self.kernels[direction]

        def rehearsal() -> None:
            rows = self._one_chunk(direction)
            blade_table.point(self.table, rows)
            # Another s than the one that a call may be under way with.
            chain.run(self.table, torch.zeros_like(self.s), 1)

        return self._graph((direction, count), lambda: chain.run(self.table, self.s, count), rehearsal)

    def _graph(
        self, key: tuple, body: Callable[[], None], rehearsal: Callable[[], None] | None = None
    ) -> Callable[[], None]:
        if self.captured or not self.s.is_cuda:
            return body
        if key not in self.graphs:
            with torch.cuda.device(self.s.device):
                self.graphs[key] = capture(body, self.s.device, rehearsal=rehearsal)
        return self.graphs[key]

    def _one_chunk(self, direction: str) -> list[Tensor]:
        """Rows of a chunk to rehearse with: the caller's would not survive a chain that runs twice."""
        composed, batch, chunk = self.composed, self.batch, self.chunk
        width, wide = composed.values.shape[0], composed.up.shape[0]
        x, attended, along, dattended = (composed.up.new_zeros(1, batch, chunk, width) for _ in range(4))
        hidden = x.new_zeros(1, batch, chunk, wide)
        qkv = x.new_zeros(1, batch, chunk, len(composed.inject))
        lse = self.s.new_zeros(1, batch, composed.heads, chunk)
        if direction == "forward":
            rows = kernels.Rows(
                x=x, out=x, residual=along, qkv=qkv, hidden=hidden, attended=attended, states=self.s[None].clone(),
                lse=lse, wide=hidden,
            )  # fmt: skip
        else:
            rows = backward_kernels.ReverseRows(
                qkv=qkv, wide=hidden, attended=attended, lse=lse, rstd=self.s.new_zeros(1, batch, chunk), from_dy=x,
                along=along, dwide=torch.zeros_like(hidden), dattended=dattended, dstates=self.s[None].clone(),
            )  # fmt: skip
        return rows.entries


def _pieces(count: int) -> list[slice]:
    """Slices of `count` chunks, one after the other, each of them as long as some graph."""
    start, slices = 0, []
    while start < count:
        left = count - start
        whole = left // GRAPH_CHUNKS * GRAPH_CHUNKS
        size = min(MOST_CHUNKS, whole or 1 << (left.bit_length() - 1))
        slices.append(slice(start, start + size))
        start += size
    return slices
