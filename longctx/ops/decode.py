"""Single tokens through a block by replays of a CUDA graph.

A step is microseconds of work: launched kernel by kernel it would wait for the host instead. So a stream of tokens
lives in the buffers of a slot, which a graph was captured over: its keys and values in a ring, its recurrent state and
its position in memory. A block has a few slots, each with a graph. A stream that finds no free one turns the one that
has been in its slot for longest out, whose state is then kept in tensors of its own until it goes on.

Letters: B batch, D d_model, G num_kv_heads, K head width, N state_dim, R rows of the ring, g globals.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longctx.ops.cuda_graphs import capture

try:
    from longctx.ops import decode_kernels as kernels
except ImportError:  # a torch without Triton
    kernels = None

MOST_SLOTS = 8


def decode_path(weight: Tensor) -> str:
    """How a block with this `qkv_proj.weight` steps, to be put behind how else it runs: nothing if as it does else."""
    return "; steps: Triton kernels in a CUDA graph" if kernels is not None and kernels.runs_on(weight) else ""


def step_key(block: nn.Module, x_t: Tensor) -> Hashable | None:
    """What a slot is good for: the input's shape, dtype and device, the CUDA stream, the weights where they lie.

    A change of weights in place needs no other graph; new weights do. None where a step is not one that graphs are for:
    not on CUDA, with autograd, autocast or dropout, being captured itself, or where a layer computes its weights, of
    which a graph would see those of one step.
    """
    if not _for_graphs(x_t) or (block.training and block.dropout):
        return None
    addresses = [p.data_ptr() for p in block._parameters.values() if p is not None]
    for module in block._modules.values():
        own = module._parameters
        if "weight" not in own or "bias" not in own:
            return None
        addresses += [p.data_ptr() for p in own.values() if p is not None]
    stream = torch.cuda.current_stream(x_t.device).cuda_stream
    return x_t.device, tuple(addresses), x_t.shape, x_t.dtype, stream


def _for_graphs(x_t: Tensor) -> bool:
    return (
        kernels is not None
        and x_t.is_cuda
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def step_weights(block: nn.Module, *, recurrence: tuple | None = None, injects: bool = False) -> kernels.StepWeights:
    """The parameters of a pre-norm block, with what `StepWeights` says of DPASSM's and BLADE's own."""
    block.check_layers()
    norms = (block.attn_norm, block.ffn_norm)
    attn_norm, ffn_norm = ((norm.weight, norm.bias, norm.eps) for norm in norms)
    out, up, down = ((linear.weight, linear.bias) for linear in (block.out_proj, block.ffn_up, block.ffn_down))
    return kernels.StepWeights(
        n_heads=block.n_heads,
        head_dim=block.head_dim,
        attn_norm=attn_norm,
        qkv=block.qkv_proj.weight,
        out=out,
        ffn_norm=ffn_norm,
        up=up,
        down=down,
        recurrence=None if recurrence is None else kernels.Recurrence(*recurrence),
        injects=injects,
    )


@dataclass(kw_only=True, eq=False)
class _Slot:
    key: Hashable
    buffers: Any
    replay: Callable[[], None]
    holder: Callable[[], Live | None]


class Live:
    """A stream in its slot. key: that of the slot, None once it was turned out."""

    def __init__(self, slot: _Slot, count: int, lead: int) -> None:
        self.key: Hashable | None = slot.key
        self._slot: _Slot | None = slot
        self._count, self._lead = count, lead
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """Tokens since the stream's keys began, or those of them that were there when it entered."""
        return self._count

    def run(self, x_t: Tensor) -> Tensor:
        """The next token: x_t `[B, 1, D]` -> y_t, a tensor of its own."""
        slot = self._slot
        slot.buffers.x.copy_(x_t)
        slot.replay()
        self._count += 1
        return slot.buffers.y.clone()

    def recent(self) -> Tensor:
        """Keys and values that later tokens may still need, oldest first, `[B, n, 2GK]`: a copy."""
        if self._slot is None:
            return self._kept[0]
        kv = self._slot.buffers.kv
        ring = kv.shape[1] - self._lead
        # The row that the next token takes is not needed any more.
        kept = min(self._count, ring - 1)
        first = (self._count - kept) % ring + self._lead
        behind = kv[:, first : first + kept]
        missing = kept - behind.shape[1]
        return torch.cat([behind, kv[:, self._lead : self._lead + missing]], dim=1) if missing else behind.clone()

    def s(self) -> Tensor:
        """The recurrent state `[B, N]`: a copy."""
        return self._kept[1] if self._slot is None else self._slot.buffers.s.clone()

    def total(self) -> Tensor:
        """The sum of outputs `[B, D]`: a copy."""
        return self._kept[2] if self._slot is None else self._slot.buffers.total.clone()

    def begin(self, *, for_q: Tensor, for_attended: Tensor, first: Tensor | None, total: Tensor | None = None) -> None:
        """What is added to queries and to what is attended `[B, D]`, keys and values that every token sees
        `[B, g, 2GK]`, and the sum of outputs so far `[B, D]`. Without that a new chunk begins: no keys, no sum."""
        buffers = self._slot.buffers
        buffers.for_q.copy_(for_q)
        buffers.for_attended.copy_(for_attended)
        if first is not None:
            buffers.kv[:, : self._lead] = first
        if total is not None:
            buffers.total.copy_(total)
            return
        buffers.total.zero_()
        buffers.position.zero_()
        self._count = 0

    def turn_out(self) -> None:
        """Leave the slot."""
        self._kept = self.recent(), self.s(), self.total()
        self.key = self._slot = None


class Stream:
    """A state that steps go on from in place. Its copies and pickles are states in tensors of their own."""

    def detach(self) -> Any:
        """The same in tensors of its own, cut off from all that comes."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (self.detach(),)


def _itself(state: Any) -> Any:
    return state


class Decoder:
    """The slots of one block with window W and dilation d, `lead` tokens being seen by all later ones.

    A copy or a pickle of it is empty: graphs belong to the memory they were captured over.
    """

    def __init__(self, window: int, dilation: int, lead: int) -> None:
        self._shape = {"window": window, "dilation": dilation, "lead": lead}
        self._slots: list[_Slot] = []
        self._entering = threading.Lock()

    def __reduce__(self) -> tuple[type[Decoder], tuple[int, ...]]:
        return Decoder, tuple(self._shape.values())

    def __len__(self) -> int:
        return len(self._slots)

    def enter(
        self,
        key: Hashable,
        weights: kernels.StepWeights,
        *,
        kv: Tensor,
        s: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Live | None:
        """Put a stream in a slot: None if the kernels do not fit.

        kv `[B, n, 2GK]`: its keys and values so far, oldest first, those that are still needed or all of them. s
        `[B, N]`: its recurrent state. first `[B, g, 2GK]`: keys and values that every token sees. All are copied.
        """
        if not kernels.fits(weights):
            return None
        lead = self._shape["lead"]
        with self._entering:
            slot = self._slot(key, weights)
            kept = min(kv.shape[1], slot.buffers.kv.shape[1] - lead - 1)
            live = Live(slot, kept, lead)
            slot.holder = weakref.ref(live)
        buffers = slot.buffers
        buffers.kv[:, lead : lead + kept] = kv[:, kv.shape[1] - kept :]
        if first is not None:
            buffers.kv[:, :lead] = first
        if s is not None:
            buffers.s.copy_(s)
        buffers.position.fill_(kept)
        return live

    def _slot(self, key: Hashable, weights: kernels.StepWeights) -> _Slot:
        # Slots over other weights on the same device are not the block's any more; who is in one keeps it.
        self._slots = [slot for slot in self._slots if slot.key[0] != key[0] or slot.key[1] == key[1]]
        mine = [slot for slot in self._slots if slot.key == key]
        slot = next((slot for slot in mine if slot.holder() is None), None)
        if slot is None and len(self._slots) >= MOST_SLOTS:
            slot = (mine or self._slots)[0]
            holder = slot.holder()
            if holder is not None:
                holder.turn_out()
        if slot is not None:
            self._slots.remove(slot)
        if slot is None or slot.key != key:
            slot = self._new(key, weights)
        self._slots.append(slot)
        return slot

    def _new(self, key: Hashable, weights: kernels.StepWeights) -> _Slot:
        device, batch = weights.qkv.device, key[2][0]
        with torch.cuda.device(device):
            with torch.inference_mode(False), torch.no_grad():
                buffers = kernels.StepBuffers.new(weights, batch, **self._shape)
            replay = capture(lambda: kernels.step(weights, buffers, **self._shape), device)
        return _Slot(key=key, buffers=buffers, replay=replay, holder=lambda: None)
