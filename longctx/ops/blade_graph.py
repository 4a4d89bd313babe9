"""The chain of BLADE on CUDA, replayed from CUDA graphs.

A chunk is a row of kernels of a few microseconds each, one waiting for the other: launched one by one, they wait for
the host instead. A graph of some chunks works on fixed buffers, is captured once and replayed for every slab.

Letters: B batch, C tokens of a chunk, D d_model, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights, chain
from longctx.ops.cuda_graphs import capture
from longctx.ops.precision import wide_dtype

try:
    from longctx.ops import blade_kernels as kernels
    from longctx.ops import blade_table
except ImportError:  # a torch without Triton: the chain is then made of torch's own kernels
    kernels = blade_table = None

MOST_GRAPHS = 32
"""Graphs of a block that are kept. Chunks are taken by powers of two up to those of a slab: some ten a batch size."""


@dataclass(kw_only=True, eq=False)
class Slab:
    """Buffers of some whole chunks: residual `[count, B, C, D]`, qkv `[count, B, C, E]`, hidden `[count, B * C, 4D]`,
    s `[B, N]`. The chain reads x from residual and leaves the sum with the mixer there.

    attended `[B, C, D]`, states `[B, N]` and table: what the fused kernels need besides.
    """

    residual: Tensor
    qkv: Tensor
    hidden: Tensor
    s: Tensor
    attended: Tensor
    states: Tensor
    table: Tensor | None
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(kw_only=True, eq=False)
class _Graph:
    replay: Callable[[], None]
    slab: Slab | None = None


# Blocks of one shape run one after the other on a stream, so they share their buffers: a model of many layers does
# not hold many slabs. A slab goes when the last graph that was captured over it goes.
_slabs: weakref.WeakValueDictionary[tuple, Slab] = weakref.WeakValueDictionary()
_slabs_lock = threading.Lock()


class ChainGraphs:
    """The graphs of one block. A copy or a pickle of it is empty: graphs belong to the memory they were captured over.

    Graphs read the weights where they lie. A block whose parameters were replaced or moved gets new ones; a change in
    place needs none, since what depends on values is computed anew in every call.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._composed: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[ChainGraphs], tuple[()]]:
        return ChainGraphs, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def prepare(self, weights: ChainWeights) -> Prepared:
        """What the slabs of one call share. Weights must not change between this and the last of them."""
        device = weights.qkv.device
        with torch.cuda.device(device), self._lock:
            stream = torch.cuda.current_stream(device).cuda_stream
            # Memory of another format may be given out again at the same address.
            places = (weights.qkv.dtype, *((tensor.data_ptr(), tensor.stride()) for tensor in weights.tensors))
            key = (device, places, stream, _fp32_products())
            captured = torch.cuda.is_current_stream_capturing()
            composed = None
            if kernels_fit(weights):
                if captured:
                    composed = kernels.Composed(weights)
                    composed.compose()
                else:
                    self._drop_stale(key)
                    if key not in self._composed:
                        while len(self._composed) >= MOST_GRAPHS:
                            self._composed.popitem(last=False)
                        with torch.inference_mode(False), torch.no_grad():
                            self._composed[key] = kernels.Composed(weights)
                    composed = self._composed[key]
                    self._graph((*key, "compose"), composed.compose).replay()
            return Prepared(graphs=self, weights=weights, key=key, captured=captured, composed=composed)

    def _graph(self, key: tuple, body: Callable[[], None], slab: Slab | None = None) -> _Graph:
        with self._lock:
            found = self._graphs.get(key)
            if found is None:
                self._drop_stale(key)
                found = self._graphs[key] = _Graph(replay=capture(body, key[0]), slab=slab)
                while len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return found

    def _drop_stale(self, key: tuple) -> None:
        """Forget what was made for other weights on the same device: they are not the block's any more."""
        for kept in (self._graphs, self._composed):
            for other in [other for other in kept if other[0] == key[0] and other[1] != key[1]]:
                del kept[other]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A call's access to the graphs: for each slab `with slab(...)`, fill residual, qkv and s, then `run`."""

    graphs: ChainGraphs
    weights: ChainWeights
    key: tuple
    captured: bool
    composed: Any

    @contextmanager
    def slab(self, count: int, batch: int, chunk: int, number: int = 0) -> Iterator[tuple[Slab, Callable[[], None]]]:
        """Buffers for `count` chunks, to be filled, and what then runs the chain over them.

        number: others than those of another number.
        """
        with torch.cuda.device(self.weights.qkv.device):
            if self.captured:
                # The chain becomes part of the caller's graph, over memory of that graph.
                slab = _new_slab(self.weights, count, batch, chunk)
                yield slab, lambda: self._run(slab)
                return
            rows, width = self.weights.qkv.shape
            wide = self.weights.up[0].shape[0]
            shape = (count, batch, chunk, rows, width, wide, self.weights.inject[0].shape[1], number)
            shared = (self.key[0], self.key[2], self.weights.qkv.dtype, self.composed is not None, *shape)
            with _slabs_lock:
                slab = _slabs.get(shared)
                if slab is None:
                    with torch.inference_mode(False), torch.no_grad():
                        slab = _slabs[shared] = _new_slab(self.weights, count, batch, chunk)
            with slab.lock:
                graph = self.graphs._graph((*self.key, shape), lambda: self._run(slab), slab)
                yield slab, graph.replay

    def _run(self, slab: Slab) -> None:
        if self.composed is not None:
            count, batch, chunk, _ = slab.residual.shape
            kernels.Forward(self.composed, batch, chunk).run(slab.table, slab.s, count)
            return
        x = slab.residual
        slab.s.copy_(chain(self.weights, x, slab.qkv, slab.s, residual=x, hidden=slab.hidden))


def kernels_fit(weights: ChainWeights) -> bool:
    """Whether fused Triton kernels do the chain of these weights, rather than torch's own."""
    return kernels is not None and kernels.fits(weights)


def _new_slab(weights: ChainWeights, count: int, batch: int, chunk: int) -> Slab:
    like = weights.qkv
    rows, width = like.shape
    # Zeros, not whatever lay there: the run before the capture goes over them.
    residual, qkv = like.new_zeros(count, batch, chunk, width), like.new_zeros(count, batch, chunk, rows)
    hidden, attended = like.new_empty(count, batch * chunk, weights.up[0].shape[0]), torch.empty_like(residual[0])
    s = like.new_zeros(batch, weights.inject[0].shape[1], dtype=wide_dtype(like.dtype))
    states, table = torch.empty_like(s), None
    if kernels_fit(weights):
        table = blade_table.new_table(like.device)
        taken = kernels.Rows(
            x=residual, residual=residual, qkv=qkv, hidden=hidden, attended=attended, states=states, lse=s, wide=hidden
        )
        blade_table.point(table, taken.entries)
    return Slab(residual=residual, qkv=qkv, hidden=hidden, s=s, attended=attended, states=states, table=table)


def _fp32_products() -> Any:
    """The setting for products of fp32 matrices: a graph keeps the one it was captured with."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
