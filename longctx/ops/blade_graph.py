"""The chain of BLADE on CUDA, replayed from CUDA graphs.

A chunk is a row of kernels of a few microseconds each, one waiting for the other: launched one by one, they wait for
the host instead. A graph of some chunks works on fixed buffers, is captured once and replayed for every slab.

Letters: B batch, C tokens of a chunk, D d_model, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights, chain
from longctx.ops.cuda_graphs import capture
from longctx.ops.precision import wide_dtype

try:
    from longctx.ops import blade_composed, blade_table
    from longctx.ops import blade_kernels as kernels
except ImportError:  # a torch without Triton: the chain is then made of torch's own kernels
    kernels = blade_composed = blade_table = None

if TYPE_CHECKING:
    from longctx.ops.blade_kernels import Rows

MOST_GRAPHS = 32
"""Graphs of a block that are kept. Chunks are taken by powers of two up to those of a slab: some ten a batch size."""


@dataclass(kw_only=True, eq=False)
class Slab:
    """Buffers of some whole chunks: qkv `[count, B, C, E]`, hidden `[count, B * C, 4D]`, s `[B, N]`.

    rows: where fused kernels find these and others, their table to be pointed there; x and out are those of a call. Or
    residual `[count, B, C, D]`: where torch's kernels find x, and leave the residual and W_down's bias.
    """

    qkv: Tensor
    hidden: Tensor
    s: Tensor
    residual: Tensor | None = None
    rows: Rows | None = None
    table: Tensor | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def point(self, x: Tensor, out: Tensor) -> None:
        """Let what runs next read x and overwrite out, both `[count, B, C, D]` and contiguous."""
        blade_table.point(self.table, replace(self.rows, x=x, out=out).entries)


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
                    composed = blade_composed.Composed(weights)
                    composed.compose()
                else:
                    self._drop_stale(key)
                    if key not in self._composed:
                        while len(self._composed) >= MOST_GRAPHS:
                            self._composed.popitem(last=False)
                        with torch.inference_mode(False), torch.no_grad():
                            self._composed[key] = blade_composed.Composed(weights)
                    composed = self._composed[key]
                    self._graph((*key, "compose"), composed.compose).replay()
            return Prepared(graphs=self, weights=weights, key=key, captured=captured, composed=composed)

    def _graph(
        self,
        key: tuple,
        body: Callable[[], None],
        slab: Slab | None = None,
        *,
        rehearsal: Callable[[], None] | None = None,
    ) -> _Graph:
        with self._lock:
            found = self._graphs.get(key)
            if found is None:
                self._drop_stale(key)
                found = self._graphs[key] = _Graph(replay=capture(body, key[0], rehearsal=rehearsal), slab=slab)
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
    """A call's access to the graphs."""

    graphs: ChainGraphs
    weights: ChainWeights
    key: tuple
    captured: bool
    composed: Any

    def run(
        self,
        slabs: Sequence[tuple[Tensor, Tensor]],
        s: Tensor,
        project: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        """Whole chunks: x and y `[count, B, C, D]` of each slab, y to be overwritten, s `[B, N]` -> s after them.

        project(x, qkv, scratch) fills qkv; scratch is like x.
        """
        like = slabs[0][0]
        most = max(x.numel() for x, _ in slabs)
        scratch = like.new_empty(most)
        fused = self.composed is not None
        in_place = fused and all(map(blade_table.holds, itertools.chain(*slabs)))
        # Rows of a batch, which lie apart, go through a buffer.
        buffer = like.new_empty(most) if fused and not in_place else None
        for x, y in slabs:
            with self._slab(*x.shape[:3]) as (slab, replay):
                if slab.residual is not None:
                    source = out = slab.residual
                elif in_place:
                    source, out = x, y
                else:
                    source = out = buffer[: x.numel()].view(x.shape)
                if source is not x:
                    source.copy_(x)
                project(source, slab.qkv, scratch[: x.numel()].view(x.shape))
                slab.s.copy_(s)
                if slab.rows is not None:
                    slab.point(source, out)
                replay()
                flat = out.view(-1, out.shape[-1])
                torch.addmm(flat, slab.hidden.flatten(0, 1), self.weights.down[0].t(), out=flat)
                if out is not y:
                    y.copy_(out)
                # Behind this the slab may be another thread's.
                s = slab.s.clone()
        return s

    @contextmanager
    def _slab(self, count: int, batch: int, chunk: int) -> Iterator[tuple[Slab, Callable[[], None]]]:
        """Buffers for `count` chunks, to be filled, and what then runs the chain over them."""
        with torch.cuda.device(self.weights.qkv.device):
            if self.captured:
                # The chain becomes part of the caller's graph, over memory of that graph.
                slab = self._new_slab(count, batch, chunk)
                yield slab, lambda: self._chain(slab)
                return
            rows, width = self.weights.qkv.shape
            wide = self.weights.up[0].shape[0]
            shape = (count, batch, chunk, rows, width, wide, self.weights.inject[0].shape[1])
            shared = (self.key[0], self.key[2], self.weights.qkv.dtype, self.composed is not None, *shape)
            with _slabs_lock:
                slab = _slabs.get(shared)
                if slab is None:
                    with torch.inference_mode(False), torch.no_grad():
                        slab = _slabs[shared] = self._new_slab(count, batch, chunk)
            with slab.lock:
                rehearsal = None if slab.rows is None else lambda: self._rehearse(slab)
                key = (*self.key, shape)
                graph = self.graphs._graph(key, lambda: self._chain(slab), slab, rehearsal=rehearsal)
                yield slab, graph.replay

    def _new_slab(self, count: int, batch: int, chunk: int) -> Slab:
        like = self.weights.qkv
        columns, width = like.shape
        # Zeros, not whatever lay there: the run before the capture goes over them.
        qkv = like.new_zeros(count, batch, chunk, columns)
        hidden = like.new_empty(count, batch * chunk, self.weights.up[0].shape[0])
        s = like.new_zeros(batch, self.weights.inject[0].shape[1], dtype=wide_dtype(like.dtype))
        if self.composed is None:
            return Slab(qkv=qkv, hidden=hidden, s=s, residual=like.new_zeros(count, batch, chunk, width))
        residual, attended = (like.new_zeros(batch, chunk, width) for _ in range(2))
        rows = kernels.Rows(
            x=residual[None], out=residual[None], residual=residual, qkv=qkv, hidden=hidden, attended=attended,
            states=torch.empty_like(s), lse=s, wide=hidden,
        )  # fmt: skip
        return Slab(qkv=qkv, hidden=hidden, s=s, rows=rows, table=blade_table.new_table(like.device))

    def _chain(self, slab: Slab) -> None:
        if slab.rows is not None:
            self._kernels(slab).run(slab.table, slab.s, len(slab.qkv))
            return
        x = slab.residual
        slab.s.copy_(chain(self.weights, x, slab.qkv, slab.s, residual=x, hidden=slab.hidden))
        x.add_(self.weights.down[1])

    def _rehearse(self, slab: Slab) -> None:
        """One chunk over memory of the slab: the table may still say where another call had its rows."""
        slab.point(slab.rows.x, slab.rows.out)
        self._kernels(slab).run(slab.table, slab.s, 1)

    def _kernels(self, slab: Slab) -> Any:
        return kernels.Forward(self.composed, *slab.qkv.shape[1:3])


def kernels_fit(weights: ChainWeights) -> bool:
    """Whether fused Triton kernels do the chain of these weights, rather than torch's own."""
    return kernels is not None and blade_composed.fits(weights)


def _fp32_products() -> Any:
    """The setting for products of fp32 matrices: a graph keeps the one it was captured with."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
