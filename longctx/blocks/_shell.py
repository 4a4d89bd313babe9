"""The shell that every block shares, so that only the mixer differs between two rows of a table.

    x = x + mixer(attn_norm(x));  x = x + ffn_down(gelu(ffn_up(ffn_norm(x))))

Letters: B batch, T sequence length, D d_model, H n_heads, G num_kv_heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.blocks._recompute import recomputed
from longctx.blocks._states import usable
from longctx.errors import UsageError
from longctx.ops.feed_forward import infer, residual_feed_forward
from longctx.ops.layer_norm import hooks_are_set, kept_as_input, kernels_fit, layer_norm
from longctx.ops.precision import autocasts

# Tokens that inference takes through the block at a time. On a CPU the hidden tensor of a slab then stays in the
# cache and its pages are not faulted in again at every call; on a GPU slabs only bound the memory of long sequences.
CPU_SLAB_TOKENS = 1024
GPU_SLAB_TOKENS = 1 << 18

RECOMPUTE = ("norms", "block")
"""What backward computes again: what lies between matrix products, or the whole block from its input."""


class PreNormBlock(nn.Module):
    """Base of all blocks: norms, projections, feed-forward, dropout, streaming in slabs. A subclass gives `mix`.

    recompute: "norms" keeps what matrix products give until backward; "block" only the input, see `_recompute.py`.

    Parameters (names are part of the contract): attn_norm, ffn_norm, qkv_proj.weight `[D + 2GK, D]` (rows q, k, v),
    out_proj `[D, D]`, ffn_up `[4D, D]`, ffn_down `[D, 4D]`.
    """

    streams = True
    """Whether inference may take the sequence through `mix` slab by slab, the state carrying it on."""
    restarts = True
    """Whether the state stays so small that recompute="block" can keep one between any two slabs."""
    ffn_slabs = 2
    """Parts in which training on a GPU takes a call through the feed-forward: the more, the less memory and the more
    launches."""

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        causal: bool = True,
        recompute: str = "norms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = n_heads if num_kv_heads is None else num_kv_heads
        check_counts(d_model=d_model, n_heads=n_heads, num_kv_heads=num_kv_heads)
        if d_model % n_heads:
            raise UsageError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if n_heads % num_kv_heads:
            raise UsageError(f"n_heads {n_heads} is not divisible by num_kv_heads {num_kv_heads}")
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout must lie in [0, 1), not {dropout!r}")
        if not isinstance(causal, bool):
            raise UsageError(f"causal must be true or false, not {causal!r}")
        if recompute not in RECOMPUTE:
            raise UsageError(f"recompute must be one of {', '.join(RECOMPUTE)}, not {recompute!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.n_heads, self.num_kv_heads = d_model, n_heads, num_kv_heads
        self.head_dim = d_model // n_heads
        self.dropout, self.causal, self.recompute = float(dropout), causal, recompute
        self.attn_norm = nn.LayerNorm(d_model, **factory)
        self.qkv_proj = nn.Linear(d_model, d_model + 2 * num_kv_heads * self.head_dim, bias=False, **factory)
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        self.ffn_norm = nn.LayerNorm(d_model, **factory)
        self.ffn_up = nn.Linear(d_model, 4 * d_model, **factory)
        self.ffn_down = nn.Linear(4 * d_model, d_model, **factory)

    # -- what a block defines ---------------------------------------------------------------------------------------

    def mix(self, u: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        """The mixer: u `[B, t, D]` (normed) and the state so far -> (mixed `[B, t, D]`, state or None).

        state is what `init_state` or an earlier call gave, or None at the start of a sequence.
        """
        raise NotImplementedError

    def init_state(self, batch_size: int) -> Any:
        """The state at the start of a sequence, on the block's device and dtype. Raises UsageError if not causal."""
        raise NotImplementedError

    @property
    def mixer_path(self) -> str:
        """Which implementation of the mixer runs on this block's device and dtype, in words; none if empty."""
        return ""

    @property
    def shell_path(self) -> str:
        """The same of norms, residuals and GELU."""
        return "Triton norms and GELU" if kernels_fit(self.ffn_up.weight) else "torch norms and GELU"

    # -- what all blocks do alike -----------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """What runs on this block's device and dtype, in words, for the results."""
        recompute = f"recompute={self.recompute}" if self.recompute != "norms" else ""
        return ", ".join(part for part in (self.mixer_path, self.shell_path, recompute) if part)

    def forward(self, x: Tensor, state: Any = None, *, keep_state: bool = True) -> tuple[Tensor, Any]:
        """x `[B, T, D]` -> (y `[B, T, D]`, state).

        state carries a stream on from an earlier call; the returned one is None with keep_state=False or without
        causality. Raises UsageError for an input of the wrong shape, or a state where there can be none.
        """
        self.check_input(x, state)
        state, keep_state = usable(state), keep_state and self.causal
        if torch.compiler.is_exporting():
            return self._exported(x, state, keep_state)
        if torch.is_grad_enabled() or autocasts(x.device.type):
            return self._with_gradients(x, state, keep_state)
        return self._infer(x, state, keep_state)

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x_t `[B, 1, D]` -> (y_t `[B, 1, D]`, state). Equal to `forward`; consumes the state given."""
        self.check_step(x_t)
        return self.forward(x_t, state)

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv `[B, T, D + 2GK]` -> views q `[B, T, H, K]`, k and v `[B, T, G, K]`."""
        sizes = [self.n_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv.split([n * self.head_dim for n in sizes], dim=-1)
        return tuple(t.unflatten(-1, (n, self.head_dim)) for t, n in zip((q, k, v), sizes, strict=True))

    def _with_gradients(self, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        """`_differentiable`, or its recomputation where that was asked for and there can be a backward pass."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return recomputed(self, x, state, keep_state)
        return self._differentiable(x, state, keep_state)

    def _exported(self, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        """`_differentiable`: an exported program does not know in which mode it was made, and must run in both."""
        with torch.enable_grad():
            return self._differentiable(x, state, keep_state)

    def _differentiable(self, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        """Forward as autograd and autocast can follow it."""
        u = self.norm(x)
        keep: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not hooks_are_set():
            keep = kept_as_input(u, x, self.attn_norm.weight, self.attn_norm.bias, self.attn_norm.eps)
        with keep:
            mixed, state = self.mix(u, state, keep_state)
        del u
        drop = self.dropout if self.training else 0.0
        # Where the whole sequence is computed again at once, its hidden rows are left to the feed-forward's slabs.
        in_slabs = self.recompute == "block" and self.restarts and self.causal
        keep_hidden = self.recompute == "norms" or in_slabs
        mixed = F.dropout(mixed, drop)
        how = {"dropout_p": drop, "keep_hidden": keep_hidden, "slabs": self.ffn_slabs, "whole": in_slabs}
        y = residual_feed_forward(x, mixed, *self._feed_forward, **how)
        return y, state

    def _infer(self, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        """Forward without autograd: in slabs, through buffers that are reused, into one output."""
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        slabs = list(self._slabs(x))
        hidden: Tensor | None = None
        mixed_whole: Tensor | None = None
        if not self.streams or not self.causal:
            mixed_whole, state = self.mix(self.norm(x), state, keep_state)
        for slab in slabs:
            if mixed_whole is None:
                keep = keep_state or slab is not slabs[-1]
                mixed, state = self.mix(self.norm(x[:, slab]), state, keep)
            else:
                mixed = mixed_whole[:, slab]
            hidden = self.finish(x[:, slab], mixed, out=y[:, slab], hidden=hidden)
        return y, state

    def norm(self, x: Tensor) -> Tensor:
        """What the mixer is given: attn_norm(x), `[B, t, D]`."""
        return layer_norm(x, self.attn_norm.weight, self.attn_norm.bias, self.attn_norm.eps)

    def finish(self, x: Tensor, mixed: Tensor, *, out: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Both residuals and the feed-forward, without autograd: out = r + ffn(r) with r = x + mixed, all `[B, t, D]`.

        hidden: a buffer of at least B * t rows from an earlier call; returns the one used.
        """
        tokens = x.shape[0] * x.shape[1]
        if hidden is None or hidden.shape[0] < tokens:
            hidden = x.new_empty(tokens, self.ffn_up.out_features)
        if self.training and self.dropout:
            mixed = F.dropout(mixed, self.dropout)
            out.copy_(residual_feed_forward(x, mixed, *self._feed_forward, dropout_p=self.dropout))
        else:
            infer(x, mixed, *self._feed_forward, out=out, hidden=hidden[:tokens])
        return hidden

    @property
    def _feed_forward(self) -> tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What `residual_feed_forward` takes: norm, up and down."""
        norm, up, down = self.ffn_norm, self.ffn_up, self.ffn_down
        return (norm.weight, norm.bias, norm.eps), (up.weight, up.bias), (down.weight, down.bias)

    def _slabs(self, x: Tensor) -> Iterator[slice]:
        batch, length = x.shape[0], x.shape[1]
        tokens = CPU_SLAB_TOKENS if x.device.type == "cpu" else GPU_SLAB_TOKENS
        step = max(1, tokens // batch)
        if length <= step:
            # Apart from the loop, of which a compiler would make the steps of this one length.
            yield slice(0, length)
            return
        for start in range(0, length, step):
            yield slice(start, min(start + step, length))

    def check_input(self, x: Tensor, state: Any) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model or x.shape[0] < 1 or x.shape[1] < 1:
            raise UsageError(f"the input must be [B >= 1, T >= 1, {self.d_model}], not {list(x.shape)}")
        if not torch.compiler.is_compiling():
            self.check_layers()
        if state is not None:
            self.check_causal("a carried state")

    def check_layers(self) -> None:
        """Raises UsageError if a layer does more than its weight says, which is read without calling the layer."""
        for name, layer in self._modules.items():
            forward, own = type(layer).forward, layer._parameters
            if name != "parametrizations" and forward is not nn.Linear.forward and forward is not nn.LayerNorm.forward:
                reason = f"is a {type(layer).__name__}, with a forward of its own"
                hint = "merge what it does into the weight of a torch.nn.Linear"
            elif "forward" in layer.__dict__:
                reason = "has a forward that was put in place of its own"
                hint = "merge what it does into the layer's weight"
            elif layer._forward_pre_hooks and "weight" not in own and "parametrizations" not in layer._modules:
                reason = "has a hook that makes its weight"
                hint = "use torch.nn.utils.parametrizations, or torch.nn.utils.prune.remove"
            else:
                continue
            name = f"{type(self).__name__}.{name}"
            raise UsageError(f"{name} {reason}; blocks read weights and never call their layers", hint)

    def check_step(self, x_t: Tensor) -> None:
        self.check_causal("step")
        if x_t.dim() != 3 or x_t.shape[1] != 1:
            raise UsageError(f"step takes one token, [B, 1, D], not {list(x_t.shape)}")

    def check_causal(self, what: str) -> None:
        if not self.causal:
            raise UsageError(f"{type(self).__name__} with causal=False has no {what}: later tokens change earlier ones")


def check_batch(of_state: int, of_input: int) -> None:
    """Raises UsageError unless both are the same: torch would take one row of a state for every row of a batch."""
    if of_state != of_input:
        raise UsageError(f"the state is of a batch of {of_state}, the input of {of_input}")


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Raises UsageError unless every count is a whole number of at least `least`."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
