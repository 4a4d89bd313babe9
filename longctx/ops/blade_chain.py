"""The chain of BLADE: what must be done chunk after chunk, without autograd, written into the buffers of a slab.

Off the chain, for all tokens of a slab at once: the norm and the QKV projection before it, the second matrix of the
feed-forward after it, because only its mean enters the state: mean(y) = mean(r) + W_down mean(hidden) + b_down.
On the chain the injection is a handful of vectors. With d = W_qkv inject(s), split in dq, dk, dv:

    attention over injected keys and values  =  attention(q + dq, [kg - dk; k], [vg - dv; v]) + dv

(kg, vg: keys and values of the global tokens, which are not injected) since a vector added to every key shifts all
scores of a query alike. And dv, being the same for every token, passes through out_proj as part of its bias.

Letters: B batch, n tokens of a chunk, S keys, D d_model, H n_heads, G num_kv_heads, K head width, N state_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops import _window_flash as flash
from longctx.ops.precision import wide_dtype
from longctx.ops.window_attention import window_attention


@dataclass(frozen=True, kw_only=True)
class ChainWeights:
    """The parameters that the chain reads, matrices and their biases. global_tokens `[m, D]` or None."""

    n_heads: int
    num_kv_heads: int
    inject: tuple[Tensor, Tensor]
    qkv: Tensor
    out: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor, float]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    state: tuple[Tensor, Tensor]
    global_tokens: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        pairs = (self.inject, self.out, self.norm[:2], self.up, self.down, self.state)
        rest = (self.qkv,) if self.global_tokens is None else (self.qkv, self.global_tokens)
        return [*(tensor for pair in pairs for tensor in pair), *rest]

    def each(self, change: Callable[[Tensor], Tensor]) -> ChainWeights:
        """The same with every parameter changed."""

        def both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return change(pair[0]), change(pair[1])

        names = ("inject", "out", "up", "down", "state")
        return dataclasses.replace(
            self,
            **{name: both(getattr(self, name)) for name in names},
            qkv=change(self.qkv),
            norm=(*both(self.norm[:2]), self.norm[2]),
            global_tokens=None if self.global_tokens is None else change(self.global_tokens),
        )

    def injection(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s `[B, N]` -> what it adds to queries `[B, D]`, to keys and values `[B, 2GK]`, to attended `[B, D]`."""
        inject_w, inject_b = self.inject
        added = F.linear(F.linear(s.to(inject_w.dtype), inject_w, inject_b), self.qkv)
        width = inject_w.shape[0]
        dq, dkv = added.split([width, added.shape[-1] - width], dim=-1)
        dv = dkv[:, dkv.shape[-1] // 2 :]
        group = self.n_heads // self.num_kv_heads
        if group > 1:
            dv = dv.unflatten(-1, (self.num_kv_heads, -1)).repeat_interleave(group, dim=1).flatten(1)
        return dq, dkv, dv

    def global_kv(self) -> Tensor | None:
        """Keys and values of the global tokens `[m, 2GK]`, None if there are none."""
        if self.global_tokens is None:
            return None
        return F.linear(self.global_tokens, self.qkv[self.qkv.shape[1] :])

    def seen(self, global_kv: Tensor | None, kv: Tensor, dkv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that a chunk sees, `[B, m + S, G, K]` each: its own kv `[B, S, 2GK]` behind the globals."""
        if global_kv is not None:
            kv = torch.cat([(global_kv - dkv[:, None]).to(kv.dtype), kv], dim=1)
        return kv.unflatten(-1, (2, self.num_kv_heads, -1)).unbind(2)

    def next_state(self, mean: Tensor) -> Tensor:
        """Mean of y over the chunk's tokens `[B, D]` -> s `[B, N]`."""
        return F.linear(mean.to(self.state[0].dtype), *self.state).to(mean.dtype)


def chain(
    weights: ChainWeights,
    x: Tensor,
    qkv: Tensor,
    s: Tensor,
    *,
    residual: Tensor,
    hidden: Tensor,
    want_state: bool = True,
) -> Tensor:
    """Whole chunks, one after the other: x `[count, B, C, D]`, qkv `[count, B, C, D + 2GK]` (overwritten), s `[B, N]`
    -> s after them, or any s if none is wanted.

    Fills residual `[count, B, C, D]` (it may be x) and hidden `[count, B * C, 4D]` as `chain_chunk` does.
    """
    global_kv = weights.global_kv()
    count, width = x.shape[0], x.shape[-1]
    for index in range(count):
        q, kv = qkv[index].split([width, qkv.shape[-1] - width], dim=-1)
        parts = (weights, global_kv, x[index], q, kv, s)
        want_mean = want_state or index + 1 < count
        mean = chain_chunk(*parts, residual=residual[index], hidden=hidden[index], want_mean=want_mean)
        if mean is not None:
            s = weights.next_state(mean)
    return s


def chain_chunk(
    weights: ChainWeights,
    global_kv: Tensor | None,
    x: Tensor,
    q: Tensor,
    kv: Tensor,
    s: Tensor,
    *,
    residual: Tensor,
    hidden: Tensor,
    want_mean: bool,
) -> Tensor | None:
    """One chunk, or the part of one that is there: x `[B, n, D]`, its queries `[B, n, D]` and the chunk's keys and
    values up to its end `[B, S, 2GK]`, both without injection, s `[B, N]` -> mean over the n tokens of y, `[B, D]`.

    Overwrites q. Fills residual `[B, n, D]` (y without the feed-forward) and hidden `[B * n, 4D]` (after GELU), both
    contiguous. Not for autograd.
    """
    dq, dkv, dv = weights.injection(s)
    q.add_(dq[:, None])
    keys, values = weights.seen(global_kv, kv, dkv)
    attended = chunk_attention(q.unflatten(-1, (weights.n_heads, -1)), keys, values)
    return after_attention(weights, x, attended, dv, residual=residual, hidden=hidden, want_mean=want_mean)


def after_attention(
    weights: ChainWeights,
    x: Tensor,
    attended: Tensor,
    dv: Tensor,
    *,
    residual: Tensor,
    hidden: Tensor,
    wide: Tensor | None = None,
    want_mean: bool = True,
) -> Tensor | None:
    """The rest of `chain_chunk`: attended `[B, n, H, K]` and what is to be added to all of it, dv `[B, D]`.

    wide: the hidden rows before GELU, `[B * n, 4D]`, where they are to be kept.
    """
    batch, tokens, width = x.shape
    out_w, out_b = weights.out
    torch.add(x, F.linear(dv, out_w, out_b)[:, None], out=residual)
    residual.view(-1, width).addmm_(attended.reshape(-1, width), out_w.t())
    norm_w, norm_b, eps = weights.norm
    normed = F.layer_norm(residual, (width,), norm_w, norm_b, eps).view(-1, width)
    up_w, up_b = weights.up
    wide = hidden if wide is None else wide
    torch.addmm(up_b, normed, up_w.t(), out=wide)
    torch.ops.aten.gelu.out(wide, out=hidden)
    if not want_mean:
        return None
    dtype = wide_dtype(x.dtype)
    mean = hidden.view(batch, tokens, -1).mean(1, dtype=dtype)
    return residual.mean(1, dtype=dtype) + F.linear(mean.to(x.dtype), *weights.down)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Causal attention of the last n of S tokens: q `[B, n, H, K]`, k and v `[B, S, G, K]` -> `[B, n, H, K]`.

    Query i sees the keys 0 to S - n + i.
    """
    tokens, keys = q.shape[1], k.shape[1]
    if not q.is_cuda:
        return window_attention(q, k, v, window=keys, dropout_p=dropout_p)
    fits = flash.fits(q.device, q.dtype, q.shape[-1])
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if fits and not grad and not dropout_p:
        # Its causal mask is aligned with the last key, which is what is meant here; that of SDPA is not.
        return torch.ops.aten._flash_attention_forward(q, k, v, None, None, tokens, keys, 0.0, tokens > 1, False)[0]
    if tokens != keys:
        return window_attention(q, k, v, window=keys, dropout_p=dropout_p)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).transpose(1, 2)


def chunk_attention_path(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which attention runs without autograd, in words."""
    if device.type != "cuda":
        return "blocked matmul"
    return "flash-attention-2" if flash.fits(device, dtype, head_dim) else "SDPA"
