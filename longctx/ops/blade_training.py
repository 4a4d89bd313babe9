"""Whole chunks of BLADE with gradients: one operator forward, one backward.

The backward chain runs over the chunks in reverse and hands on the gradient of the state. On it is what that gradient
passes through; weight gradients and the projections at both ends are taken for all chunks of a slab at once:

    dmean = W_state^T ds / n;  dwide = gelu'(wide) (W_down^T dy + W_down^T dmean)      (W_down^T dy: off the chain)
    dr = dy + dmean + norm'(W_up^T dwide);  da = W_out^T dr;  dq, dk, dv from da through the attention
    ds = W_inject^T W_qkv^T (sum of dq, dk of the globals, sum of da)

Kept of the forward pass: the projection, the residual, the hidden rows before GELU, what attention gave, its
log-sum-exp and the states. Norms, GELU and softmax are computed again.

Letters: B batch, T sequence length, n tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width, N
state_dim, E = D + 2GK, m global tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights, sum_dtype
from longctx.ops.blade_training_chain import kept_chain, reverse_chain
from longctx.ops.blade_training_graph import TrainingChain, TrainingGraphs, backward_kernels, kernels, training_chain
from longctx.ops.chunk_attention_gradients import attention_backward
from longctx.ops.layer_norm import NormGradients, normalize
from longctx.ops.weight_gradient import GradientSums

CPU_SLAB_TOKENS = 1024
"""Tokens taken at once off the chain on a CPU: they stay in the cache."""
GPU_SLAB_TOKENS, MOST_SLAB_TOKENS, SLABS = 8192, 65536, 8
"""On a GPU between these two, an eighth of the call: few launches, and buffers small beside what is kept."""

NAMES = ("attn_w", "attn_b", "inject_w", "inject_b", "qkv", "out_w", "out_b", "norm_w", "norm_b", "up_w", "up_b")
NAMES += ("down_w", "down_b", "state_w", "state_b", "global_tokens")
"""The operators' parameters."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operators need beside tensors."""

    n_heads: int
    num_kv_heads: int
    chunk: int
    attn_eps: float
    ffn_eps: float


def whole_chunks(
    x: Tensor,
    s: Tensor,
    attn_norm: tuple[Tensor, Tensor, float],
    weights: ChainWeights,
    chunk: int,
    graphs: TrainingGraphs,
) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, T a multiple of the chunk, and s `[B, N]` -> y `[B, T, D]`, s after it. Differentiable once.

    All parameters in the dtype of x, s in that of sums. graphs: what keeps those of the caller.
    """
    parameters = [*attn_norm[:2], *weights.inject, weights.qkv, *weights.out, *weights.norm[:2], *weights.up]
    parameters += [*weights.down, *weights.state]
    if weights.global_tokens is not None:
        parameters.append(weights.global_tokens)
    settings = (weights.n_heads, weights.num_kv_heads, chunk, attn_norm[2], weights.norm[2], graphs.number)
    y, last, *_ = torch.ops.longctx.blade_chunks(x, s, parameters, *settings)
    return y, last


def _unpack(parameters: Sequence[Tensor], settings: Settings) -> tuple[tuple[Tensor, Tensor, float], ChainWeights]:
    attn_w, attn_b, inject_w, inject_b, qkv, out_w, out_b, norm_w, norm_b, *rest = parameters
    up_w, up_b, down_w, down_b, state_w, state_b, *global_tokens = rest
    weights = ChainWeights(
        n_heads=settings.n_heads,
        num_kv_heads=settings.num_kv_heads,
        inject=(inject_w, inject_b),
        qkv=qkv,
        out=(out_w, out_b),
        norm=(norm_w, norm_b, settings.ffn_eps),
        up=(up_w, up_b),
        down=(down_w, down_b),
        state=(state_w, state_b),
        global_tokens=global_tokens[0] if global_tokens else None,
    )
    return (attn_w, attn_b, settings.attn_eps), weights


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, D]` -> a view `[count, B, n, D]`: each chunk of the batch is one matrix then."""
    return x.unflatten(1, (x.shape[1] // chunk, chunk)).transpose(0, 1)


def _slabs(count: int, tokens: int, device: torch.device) -> list[slice]:
    """Slices of `count` chunks, each of `tokens` over the batch; the first is the largest."""
    most = CPU_SLAB_TOKENS
    if device.type == "cuda":
        most = min(max(GPU_SLAB_TOKENS, count * tokens // SLABS), MOST_SLAB_TOKENS)
    step = max(1, most // tokens)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _dense(rows: Tensor) -> Tensor:
    """Contiguous, and where a kernel that reads 16 bytes at a time may begin."""
    rows = rows.contiguous()
    return rows.clone() if rows.is_cuda and rows.data_ptr() % 16 else rows


def _token_sums(rows: Tensor) -> Tensor:
    """`[..., n, W]` -> sums over the n `[..., W]`, in fp32 or better."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        # As a product it is several times faster than as a reduction. What it rounds is the sum, not the addends.
        return (rows.new_ones(1, rows.shape[-2]) @ rows).squeeze(-2).float()
    return rows.sum(-2, dtype=sum_dtype(rows.dtype))


def _row_sum(rows: Tensor) -> Tensor:
    """`[..., W]` -> sum over all but the last dimension `[W]`, in fp32 or better."""
    flat = rows.flatten(0, -2)
    if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(flat.new_ones(1, len(flat)), flat, out_dtype=torch.float32)[0]
    return flat.sum(0, dtype=sum_dtype(flat.dtype))


# -- forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("longctx::blade_chunks", mutates_args=())
def _forward(
    x: Tensor,
    s: Tensor,
    parameters: Sequence[Tensor],
    n_heads: int,
    num_kv_heads: int,
    chunk: int,
    attn_eps: float,
    ffn_eps: float,
    graphs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, last s; kept: states `[count, B, N]` at the start of each chunk, qkv, residual, wide, attended, lse)."""
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    norm, weights = _unpack(parameters, settings)
    y, last, states, qkv, residual, wide, attended, lse = _empty(x, s, weights, chunk)
    rows, out, width = _chunks(x, chunk), _chunks(y, chunk), x.shape[2]
    last.copy_(s)
    slabs = _slabs(len(rows), x.shape[0] * chunk, x.device)
    buffer = torch.empty_like(wide[slabs[0]])
    with _fused(graphs, weights, x.shape[0], chunk) as fused:
        for slab in slabs:
            x_slab = _dense(rows[slab])
            normed = normalize(x_slab, *norm)
            torch.mm(normed.view(-1, width), weights.qkv.t(), out=qkv[slab].view(-1, qkv.shape[-1]))
            hidden = buffer[: len(x_slab)]
            kept = (states[slab], residual[slab], wide[slab], attended[slab], lse[slab])
            if fused is None:
                kept_chain(weights, x_slab, qkv[slab], last, *kept, hidden)
            else:
                _fused_chain(fused, x_slab, qkv[slab], last, *kept, hidden)
            # The norm is not needed any more.
            down = torch.addmm(
                weights.down[1], hidden.view(-1, 4 * width), weights.down[0].t(), out=normed.view(-1, width)
            )
            torch.add(residual[slab], down.view_as(x_slab), out=out[slab])
    return y, last, states, qkv, residual, wide, attended, lse


def _empty(x: Tensor, s: Tensor, weights: ChainWeights, chunk: int) -> tuple[Tensor, ...]:
    batch, length, width = x.shape
    shape = (length // chunk, batch, chunk)
    narrow = [x.new_empty(*shape, columns) for columns in (weights.qkv.shape[0], width, 4 * width, width)]
    lse = x.new_empty(shape[0], batch, weights.n_heads, chunk, dtype=s.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(s), s.new_empty(shape[0], *s.shape), *narrow, lse


@_forward.register_fake
def _(x, s, parameters, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, graphs):
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    return _empty(x, s, _unpack(parameters, settings)[1], chunk)


def _fused(
    number: int, weights: ChainWeights, batch: int, chunk: int, *, backward: bool = False
) -> AbstractContextManager[TrainingChain | None]:
    """The fused kernels, where they can do the chain and there is more of it than launches cost."""
    if batch * chunk > GPU_SLAB_TOKENS:
        return nullcontext()
    return training_chain(number, weights, batch, chunk, backward=backward)


def _fused_chain(
    fused: TrainingChain,
    x: Tensor,
    qkv: Tensor,
    last: Tensor,
    states: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
    hidden: Tensor,
) -> None:
    """`kept_chain` in fused kernels."""
    rows = kernels.Rows(
        x=x, residual=residual, qkv=qkv, hidden=hidden, attended=attended, states=states, lse=lse, wide=wide
    )
    fused.forward(rows, last)


# -- backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("longctx::blade_chunks_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    n_heads: int,
    num_kv_heads: int,
    chunk: int,
    attn_eps: float,
    ffn_eps: float,
    graphs: int,
) -> list[Tensor]:
    """Gradients of x, of s and of the parameters."""
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    norm, weights = _unpack(parameters, settings)
    states, qkv, residual, wide, attended, lse = kept
    sums, width = GradientSums(NAMES, parameters), x.shape[2]
    attn_norm, ffn_norm = (NormGradients(x, weight, eps) for weight, _, eps in (norm, weights.norm))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, grads, out = _chunks(x, chunk), _chunks(dy, chunk), _chunks(dx, chunk)
    chunks = _Chunks(states, chunk, qkv.shape[-1], width)
    ds = dlast.clone()
    dglobal = None if weights.global_tokens is None else states.new_zeros(len(weights.global_tokens), 2 * _kv(weights))
    slabs = _slabs(len(rows), x.shape[0] * chunk, x.device)
    buffer = torch.empty_like(wide[slabs[0]])
    with _fused(graphs, weights, x.shape[0], chunk, backward=True) as fused:
        for slab in reversed(slabs):
            dy_slab, hidden = grads[slab].contiguous(), buffer[: slab.stop - slab.start]
            torch.ops.aten.gelu.out(wide[slab], out=hidden)
            chunks.residual[slab], chunks.hidden[slab] = _token_sums(residual[slab]), _token_sums(hidden)
            sums.outer("down_w", dy_slab, hidden)
            # The gradient of wide goes where hidden was.
            kept_slab = (qkv[slab], residual[slab], wide[slab], attended[slab], lse[slab])
            written = (ds, chunks.dstates[slab], chunks.added[slab], hidden)
            if fused is None:
                inside = reverse_chain(weights, dy_slab, states[slab], *kept_slab, *written, dglobal, sums)
                sums.add("down_b", _row_sum(dy_slab))
            else:
                inside = _fused_reverse_chain(fused, weights, dy_slab, *kept_slab, *written, ffn_norm)
            normalized, dr, dqkv = inside
            sums.outer("up_w", hidden, normalized)
            sums.add("up_b", _row_sum(hidden))
            sums.outer("out_w", dr, attended[slab])
            chunks.dresidual[slab] = _token_sums(dr)
            x_slab = rows[slab].contiguous()
            sums.outer("qkv", dqkv, normalize(x_slab, *norm, out=normalized))
            dnormed = torch.mm(dqkv.flatten(0, 2), weights.qkv, out=normalized.view(-1, width))
            dx_slab = out[slab] if out[slab].is_contiguous() else torch.empty_like(x_slab)
            attn_norm.rows(dnormed, x_slab.view(-1, width), out=dx_slab.view(-1, width), beside=dr.view(-1, width))
            if dx_slab.data_ptr() != out[slab].data_ptr():
                out[slab] = dx_slab
    for name, gradient in zip(("attn_w", "attn_b", "out_b"), attn_norm.sums(), strict=True):
        sums.add(name, gradient)
    for name, gradient in zip(("norm_w", "norm_b", "down_b"), ffn_norm.sums(), strict=True):
        sums.add(name, gradient)
    _through_the_norm(weights, sums)
    _small_gradients(weights, states, chunks, dglobal, sums)
    return [dx, ds, *sums.finished()]


@_backward.register_fake
def _(dy, dlast, x, parameters, kept, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, graphs):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [
        dx,
        torch.empty_like(dlast),
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters),
    ]


def _kv(weights: ChainWeights) -> int:
    """Channels of all keys."""
    return (weights.qkv.shape[0] - weights.qkv.shape[1]) // 2


class _Chunks:
    """What the backward pass needs of each chunk beside its rows, `[count, B, ...]` in fp32 or better.

    dstates `[N]`: gradient of the state behind it. added `[E]`: of what its injection added to queries, keys and
    values. Sums over its tokens: residual `[D]`, hidden `[4D]` behind GELU, dresidual `[D]` the gradient of residual.
    """

    def __init__(self, states: Tensor, tokens: int, rows: int, width: int) -> None:
        self.tokens = tokens
        self.dstates = torch.empty_like(states)
        self.added, self.residual, self.hidden, self.dresidual = (
            states.new_empty(*states.shape[:2], n) for n in (rows, width, 4 * width, width)
        )


def _fused_reverse_chain(
    fused: TrainingChain,
    weights: ChainWeights,
    dy: Tensor,
    qkv: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
    ds: Tensor,
    dstates: Tensor,
    added: Tensor,
    dwide: Tensor,
    ffn_norm: NormGradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reverse_chain` in fused kernels, which leaves the sum of dy to `ffn_norm`."""
    width, heads = dy.shape[-1], (weights.n_heads, -1)
    out_w, flat = weights.out[0], dy.view(-1, width)
    normalized, _, rstd = torch.native_layer_norm(residual, (width,), None, None, weights.norm[2])
    torch.mm(flat, weights.down[0], out=dwide.view(-1, 4 * width))
    from_dy, along, dattended = (torch.empty_like(residual) for _ in range(3))
    torch.mm(flat, out_w, out=from_dy.view(-1, width))
    torch.mm(normalized.view(-1, width), out_w, out=along.view(-1, width))
    rows = backward_kernels.ReverseRows(
        qkv=qkv, wide=wide, attended=attended, lse=lse, rstd=rstd.to(lse.dtype), from_dy=from_dy, along=along,
        dwide=dwide, dattended=dattended, dstates=dstates,
    )  # fmt: skip
    fused.backward(rows, ds)
    # What is not on the chain: the gradient of the residual, and all of the attention's, for all chunks at once.
    dmean = (dstates / dy.shape[2]).to(dy.dtype) @ weights.state[0]
    dnormed = torch.mm(dwide.view(-1, 4 * width), weights.up[0], out=from_dy.view(-1, width))
    dr = along
    ffn_norm.rows(dnormed, residual.view(-1, width), out=dr.view(-1, width), beside=flat)
    dr += dmean[:, :, None]
    every = _token_sums(dattended).unflatten(-1, (weights.num_kv_heads, -1, width // weights.n_heads))
    seen = qkv.flatten(0, 1)
    keys, values = seen[..., width:].unflatten(-1, (2, weights.num_kv_heads, -1)).unbind(2)
    grads = attention_backward(
        dattended.flatten(0, 1).unflatten(-1, heads), seen[..., :width].unflatten(-1, heads), keys, values,
        attended.flatten(0, 1).unflatten(-1, heads), lse.flatten(0, 1),
    )  # fmt: skip
    dqkv = torch.cat([grad.flatten(2) for grad in grads], dim=-1).view_as(qkv)
    kv_width = _kv(weights)
    added[..., :width] = _token_sums(dqkv[..., :width])
    added[..., width : width + kv_width] = 0.0
    added[..., width + kv_width :] = every.sum(3).flatten(2)
    return normalized, dr, dqkv


def _through_the_norm(weights: ChainWeights, sums: GradientSums) -> None:
    """Of the gradient of W_up, which holds dwide^T n, make dwide^T (gain * n + bias)."""
    gain, bias, _ = weights.norm
    total = sums.sums["up_w"].total
    total.mul_(gain).addr_(sums.total("up_b"), bias.to(total.dtype))


def _small_gradients(
    weights: ChainWeights, states: Tensor, chunks: _Chunks, dglobal: Tensor | None, sums: GradientSums
) -> None:
    """What the parameters get once a chunk, through the injection and through the mean: all chunks at once."""
    dtype, width = weights.qkv.dtype, weights.qkv.shape[1]
    s, ds, added = states.to(dtype), chunks.dstates.to(dtype), chunks.added.to(dtype)
    _, _, dv = weights.injection(states.flatten(0, 1))
    sums.outer("out_w", chunks.dresidual.to(dtype), dv)
    dinjected = added @ weights.qkv
    sums.outer("qkv", added, F.linear(s, *weights.inject))
    sums.outer("inject_w", dinjected, s)
    sums.add("inject_b", _row_sum(dinjected))
    mean_hidden = (chunks.hidden / chunks.tokens).to(dtype)
    mean = (chunks.residual / chunks.tokens).to(dtype) + F.linear(mean_hidden, *weights.down)
    dmean = ds @ weights.state[0]
    sums.outer("state_w", ds, mean)
    sums.add("state_b", _row_sum(ds))
    sums.outer("down_w", dmean, mean_hidden)
    sums.add("down_b", _row_sum(dmean))
    if dglobal is not None:
        dglobal = dglobal.to(dtype)
        sums.outer("global_tokens", dglobal.t(), weights.qkv[width:])
        sums.add("qkv", F.pad(dglobal.t() @ weights.global_tokens, (0, 0, width, 0)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, s, parameters, *ctx.settings = inputs
    ctx.parameters = len(parameters)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, s, *parameters, *output[2:])


def _give_back(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, s, *saved = ctx.saved_tensors
    parameters, kept = saved[: ctx.parameters], saved[ctx.parameters :]
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = torch.zeros_like(s) if dlast is None else dlast
    dx, ds, *dparameters = torch.ops.longctx.blade_chunks_backward(dy, dlast, x, parameters, kept, *ctx.settings)
    return dx, ds, dparameters, *([None] * len(ctx.settings))


_forward.register_autograd(_give_back, setup_context=_keep)
