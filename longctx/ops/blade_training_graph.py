"""Training's chains of BLADE on CUDA: the fused kernels of both directions, replayed from CUDA graphs.

The graphs of a slab of chunks work on buffers of its own, copies of weights among them. So they outlast every change of
the weights, even of where these lie, and blocks of one shape share them.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch

from longctx.ops.blade_chain import ChainWeights
from longctx.ops.cuda_graphs import capture

try:
    from longctx.ops import blade_backward_kernels as backward_kernels
    from longctx.ops import blade_kernels as kernels
except ImportError:  # a torch without Triton: torch's own kernels then do both chains
    kernels = backward_kernels = None


class TrainingSlabs:
    """Keeps the slabs that a block has used: they go when the last block that used them goes.

    An operator takes no such object, so it is given its number. A copy or a pickle is a new one, without slabs.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.slabs: dict[tuple, TrainingSlab] = {}
        _holders[self.number] = self

    def __reduce__(self) -> tuple[type[TrainingSlabs], tuple[()]]:
        return TrainingSlabs, ()


_holders: weakref.WeakValueDictionary[int, TrainingSlabs] = weakref.WeakValueDictionary()
_shared: weakref.WeakValueDictionary[tuple, TrainingSlab] = weakref.WeakValueDictionary()


def fits(weights: ChainWeights) -> bool:
    """Whether the fused kernels can do both chains with these weights."""
    return kernels is not None and kernels.fits(weights)


def training_slab(number: int, weights: ChainWeights, count: int, batch: int, chunk: int) -> TrainingSlab | None:
    """A slab for up to `count` chunks, holding these weights now, for the holder of that number.

    None where the kernels do not fit, or the caller is capturing a graph of its own.
    """
    holder = _holders.get(number)
    if holder is None or not fits(weights):
        return None
    device, stream = weights.qkv.device, 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device).cuda_stream
    shapes = (weights.qkv.shape, weights.inject[0].shape, weights.n_heads, weights.num_kv_heads, weights.norm[2])
    key = (device, stream, weights.qkv.dtype, count, batch, chunk, *shapes)
    slab = holder.slabs.get(key) or _shared.get(key)
    if slab is None:
        # One shape at a time: a slab is large.
        holder.slabs.clear()
        with torch.inference_mode(False), torch.no_grad():
            slab = TrainingSlab(weights, count, batch, chunk)
        _shared[key] = slab
    holder.slabs[key] = slab
    slab.compose(weights)
    return slab


class TrainingSlab:
    """Buffers for some whole chunks, and graphs of both chains over them. Hold `lock` from filling to reading.

    residual `[count, B, C, D]`: x before the forward chain. The others as in `Kept` and `Reverse`.
    """

    def __init__(self, weights: ChainWeights, count: int, batch: int, chunk: int) -> None:
        qkv = weights.qkv
        rows, width = qkv.shape
        wide, states = weights.up[0].shape[0], weights.inject[0].shape[1]
        sums = {"dtype": torch.float32}
        padded = kernels.padded_states(states)
        self.composed = kernels.Composed(weights, copies=True)
        self.back = backward_kernels.ComposedBackward(self.composed)
        # Zeros, not whatever lay there: the run before a capture goes over them.
        self.residual, self.attended, self.from_dy, self.along, self.dattended = (
            qkv.new_zeros(count, batch, chunk, width) for _ in range(5)
        )
        self.qkv = qkv.new_zeros(count, batch, chunk, rows)
        self.wide, self.hidden = (qkv.new_zeros(count, batch * chunk, wide) for _ in range(2))
        self.lse = qkv.new_zeros(count, batch, weights.n_heads, chunk, **sums)
        self.rstd = qkv.new_zeros(count, batch, chunk, **sums)
        self.states, self.dstates = (qkv.new_zeros(count, batch, padded, **sums) for _ in range(2))
        self.s = qkv.new_zeros(batch, states, **sums)
        self.lock = threading.RLock()
        self.graphs: dict[tuple[str, int], Callable[[], None]] = {}

    def compose(self, weights: ChainWeights) -> None:
        self.composed.weights = weights
        self.composed.compose()
        self.back.compose()
        self.composed.weights = None

    def runner(self, direction: str, count: int) -> Callable[[], None]:
        """What runs the "forward" or "backward" chain over the first `count` chunks. Ask for it before filling them."""
        body = {"forward": self._forward, "backward": self._backward}[direction]
        if not self.s.is_cuda:
            return lambda: body(count)
        key = (direction, count)
        if key not in self.graphs:
            with torch.cuda.device(self.s.device):
                self.graphs[key] = capture(lambda: body(count), self.s.device)
        return self.graphs[key]

    def _forward(self, count: int) -> None:
        kept = kernels.Kept(wide=self.wide, attended=self.attended, lse=self.lse, states=self.states)
        kernels.fused_chain(self.composed, self.residual[:count], self.qkv, self.hidden, self.s, kept=kept)

    def _backward(self, count: int) -> None:
        chain = backward_kernels.Reverse(
            qkv=self.qkv,
            wide=self.wide,
            attended=self.attended[:count],
            lse=self.lse,
            rstd=self.rstd,
            from_dy=self.from_dy,
            along=self.along,
            dwide=self.hidden,
            dattended=self.dattended,
            dstates=self.dstates,
            ds=self.s,
        )
        backward_kernels.reverse_chain(self.back, chain)
