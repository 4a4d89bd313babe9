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

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops import _window_flash as flash
from longctx.ops.blade_chain import ChainWeights, after_attention, sum_dtype
from longctx.ops.blade_training_graph import TrainingSlab, TrainingSlabs, training_slab
from longctx.ops.layer_norm import NormGradients, normalize

GPU_SLAB_TOKENS, CPU_SLAB_TOKENS = 8192, 1024
"""Tokens taken at once off the chain: enough for the products to run at full speed, or to stay in the cache."""

ATTENTION_ROWS = 128
"""Queries whose scores are held at a time."""


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
    slabs: TrainingSlabs,
) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, T a multiple of the chunk, and s `[B, N]` -> y `[B, T, D]`, s after it. Differentiable once.

    All parameters in the dtype of x, s in that of sums. slabs: what keeps the buffers and graphs of the caller.
    """
    parameters = [*attn_norm[:2], *weights.inject, weights.qkv, *weights.out, *weights.norm[:2], *weights.up]
    parameters += [*weights.down, *weights.state]
    if weights.global_tokens is not None:
        parameters.append(weights.global_tokens)
    settings = (weights.n_heads, weights.num_kv_heads, chunk, attn_norm[2], weights.norm[2], slabs.number)
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
    step = max(1, (CPU_SLAB_TOKENS if device.type == "cpu" else GPU_SLAB_TOKENS) // tokens)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _token_sums(rows: Tensor) -> Tensor:
    """`[..., n, W]` -> sums over the n `[..., W]`, in fp32 or better."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        # As a product it is several times faster than as a reduction. What it rounds is the sum, not the addends.
        return (rows.new_ones(1, rows.shape[-2]) @ rows).squeeze(-2).float()
    return rows.sum(-2, dtype=sum_dtype(rows.dtype))


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
    slabs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, last s; kept: states `[count, B, N]` at the start of each chunk, qkv, residual, wide, attended, lse)."""
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    norm, weights = _unpack(parameters, settings)
    y, last, states, qkv, residual, wide, attended, lse = _empty(x, s, weights, chunk)
    rows, out, width = _chunks(x, chunk), _chunks(y, chunk), x.shape[2]
    last.copy_(s)
    slabs_of_chunks = _slabs(len(rows), x.shape[0] * chunk, x.device)
    fused = _fused(slabs, weights, slabs_of_chunks, x.shape[0], chunk)
    run = functools.partial(_chain, weights) if fused is None else functools.partial(_fused_chain, fused)
    for slab in slabs_of_chunks:
        x_slab = rows[slab].contiguous()
        normed = normalize(x_slab, *norm)
        torch.mm(normed.view(-1, width), weights.qkv.t(), out=qkv[slab].view(-1, qkv.shape[-1]))
        kept = (states[slab], residual[slab], wide[slab], attended[slab], lse[slab])
        hidden = run(x_slab, qkv[slab], last, *kept)
        down = torch.addmm(weights.down[1], hidden.view(-1, 4 * width), weights.down[0].t())
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
def _(x, s, parameters, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, slabs):
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    return _empty(x, s, _unpack(parameters, settings)[1], chunk)


def _chain(
    weights: ChainWeights,
    x: Tensor,
    qkv: Tensor,
    last: Tensor,
    states: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
) -> Tensor:
    """The chain of a slab: fills what is kept of it, overwrites the state `last`, returns the hidden rows."""
    global_kv, width, hidden = weights.global_kv(), x.shape[-1], torch.empty_like(wide)
    s = last.clone()
    for index in range(len(x)):
        states[index] = s
        dq, dkv, dv = weights.injection(s)
        q, kv = qkv[index].split([width, qkv.shape[-1] - width], dim=-1)
        q = (q + dq[:, None]).unflatten(-1, (weights.n_heads, -1))
        out, norm = _attention(q, *weights.seen(global_kv, kv, dkv))
        attended[index], lse[index] = out.flatten(2), norm
        flat = {"hidden": hidden[index].flatten(0, 1), "wide": wide[index].flatten(0, 1)}
        s = weights.next_state(after_attention(weights, x[index], out, dv, residual=residual[index], **flat))
    last.copy_(s)
    return hidden


def _fused(number: int, weights: ChainWeights, slabs: list[slice], batch: int, chunk: int) -> TrainingSlab | None:
    """The fused kernels' slab, where they can do the chain and there is more of it than launches cost."""
    if batch * chunk > GPU_SLAB_TOKENS:
        return None
    return training_slab(number, weights, slabs[0].stop, batch, chunk)


def _fused_chain(
    slab: TrainingSlab,
    x: Tensor,
    qkv: Tensor,
    last: Tensor,
    states: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
) -> Tensor:
    """`_chain` in fused kernels. The hidden rows are the slab's: to be read before the next run."""
    count = len(x)
    with slab.lock:
        run = slab.runner("forward", count)
        slab.residual[:count] = x
        slab.qkv[:count] = qkv
        slab.s.copy_(last)
        run()
        last.copy_(slab.s)
        states.copy_(slab.states[:count, :, : last.shape[1]])
        wide.copy_(slab.wide[:count].view(wide.shape))
        for kept, buffer in ((residual, slab.residual), (attended, slab.attended), (lse, slab.lse)):
            kept.copy_(buffer[:count])
        return slab.hidden[:count].view(wide.shape)


# -- backward ---------------------------------------------------------------------------------------------------------


class _Sums:
    """Gradients of the parameters, summed over slabs in fp32 or better."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.like = parameters
        self.sums = [p.new_zeros(p.shape, dtype=sum_dtype(p.dtype)) for p in parameters]
        names = ("attn_w", "attn_b", "inject_w", "inject_b", "qkv", "out_w", "out_b", "norm_w", "norm_b", "up_w")
        names += ("up_b", "down_w", "down_b", "state_w", "state_b", "global_tokens")
        self.places = {name: index for index, name in enumerate(names)}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[self.places[name]] += value

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right, both with their rows flattened."""
        self.add(name, left.flatten(0, -2).t() @ right.flatten(0, -2))

    def rows(self, name: str, value: Tensor) -> None:
        """Add the sum over all but the last dimension."""
        self.add(name, _token_sums(value.flatten(0, -2)))

    def finished(self) -> list[Tensor]:
        return [summed.to(parameter.dtype) for summed, parameter in zip(self.sums, self.like, strict=True)]


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
    slabs: int,
) -> list[Tensor]:
    """Gradients of x, of s and of the parameters."""
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    norm, weights = _unpack(parameters, settings)
    states, qkv, residual, wide, attended, lse = kept
    sums, width = _Sums(parameters), x.shape[2]
    attn_norm, ffn_norm = (NormGradients(x, weight, eps) for weight, _, eps in (norm, weights.norm))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, grads, out = _chunks(x, chunk), _chunks(dy, chunk), _chunks(dx, chunk)
    # Of each chunk: gradients of the state after it, and of what its injection added to queries, keys and values.
    dstates = torch.empty_like(states)
    added = states.new_empty(*states.shape[:2], qkv.shape[-1])
    means = states.new_empty(*states.shape[:2], 5 * width)
    dglobal = None if weights.global_tokens is None else states.new_zeros(len(weights.global_tokens), 2 * _kv(weights))
    ds = dlast.clone()
    dqs, _, dvs = (added.unflatten(0, states.shape[:2]) for added in weights.injection(states.flatten(0, 1)))
    slabs_of_chunks = _slabs(len(rows), x.shape[0] * chunk, x.device)
    fused = _fused(slabs, weights, slabs_of_chunks, x.shape[0], chunk)
    for slab in reversed(slabs_of_chunks):
        dy_slab = grads[slab].contiguous()
        hidden = F.gelu(wide[slab])
        means[slab, :, :width], means[slab, :, width:] = (
            t.mean(2, dtype=means.dtype) for t in (residual[slab], hidden)
        )
        sums.outer("down_w", dy_slab, hidden)
        kept_slab = (qkv[slab], residual[slab], wide[slab], attended[slab], lse[slab])
        written = (ds, dstates[slab], added[slab])
        if fused is None:
            inside = _reverse_chain(weights, dy_slab, states[slab], *kept_slab, *written, hidden, dglobal, sums)
        else:
            inside = _fused_reverse_chain(fused, weights, dy_slab, dqs[slab], *kept_slab, *written, ffn_norm)
        normed, dwide, dr, dqkv = inside
        sums.outer("up_w", dwide, normed)
        sums.rows("up_b", dwide)
        sums.outer("out_w", dr, attended[slab] + dvs[slab, :, None])
        sums.rows("down_b", dy_slab)
        x_slab = rows[slab].contiguous()
        sums.outer("qkv", dqkv, normalize(x_slab, *norm))
        dnormed = dqkv.flatten(0, 2) @ weights.qkv
        dx_slab = out[slab] if out[slab].is_contiguous() else torch.empty_like(x_slab)
        attn_norm.rows(dnormed, x_slab.view(-1, width), out=dx_slab.view(-1, width), beside=dr.view(-1, width))
        if dx_slab.data_ptr() != out[slab].data_ptr():
            out[slab] = dx_slab
    for name, gradient in zip(("attn_w", "attn_b", "out_b"), attn_norm.sums(), strict=True):
        sums.add(name, gradient)
    for name, gradient in zip(("norm_w", "norm_b"), ffn_norm.sums(), strict=False):
        sums.add(name, gradient)
    _small_gradients(weights, states, dstates, added, means, dglobal, sums)
    return [dx, ds, *sums.finished()]


@_backward.register_fake
def _(dy, dlast, x, parameters, kept, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, slabs):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [
        dx,
        torch.empty_like(dlast),
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters),
    ]


def _kv(weights: ChainWeights) -> int:
    """Channels of all keys."""
    return (weights.qkv.shape[0] - weights.qkv.shape[1]) // 2


def _reverse_chain(
    weights: ChainWeights,
    dy: Tensor,
    states: Tensor,
    qkv: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
    ds: Tensor,
    dstates: Tensor,
    added: Tensor,
    buffer: Tensor,
    dglobal: Tensor | None,
    sums: _Sums,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reverse chain of a slab: (normed residual, gradients of wide, of residual, of qkv).

    Overwrites ds, of the state after the slab before and of that before it after, dstates and added. buffer: of the
    shape of wide.
    """
    width = dy.shape[-1]
    normed, mean, rstd = torch.native_layer_norm(residual, (width,), *weights.norm)
    dwide = torch.mm(dy.view(-1, width), weights.down[0], out=buffer.view(-1, 4 * width)).view_as(wide)
    dr, dqkv = dy.clone(), torch.empty_like(qkv)
    for index in reversed(range(len(dy))):
        dstates[index] = ds
        kept = tuple(tensor[index] for tensor in (states, qkv, residual, wide, attended, lse))
        grads = (dwide[index], dr[index], dqkv[index], added[index])
        ds.copy_(_reverse(weights, ds, kept, (mean[index], rstd[index]), *grads, dglobal, sums))
    return normed, dwide, dr, dqkv


def _fused_reverse_chain(
    slab: TrainingSlab,
    weights: ChainWeights,
    dy: Tensor,
    dq: Tensor,
    qkv: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
    ds: Tensor,
    dstates: Tensor,
    added: Tensor,
    ffn_norm: NormGradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_reverse_chain` in fused kernels; dq `[count, B, D]`: what the injection adds to queries."""
    count, width, heads = len(dy), dy.shape[-1], (weights.n_heads, -1)
    norm_w, norm_b, eps = weights.norm
    along, _, rstd = torch.native_layer_norm(residual, (width,), None, None, eps)
    flat, out_w = dy.view(-1, width), weights.out[0]
    with slab.lock:
        run = slab.runner("backward", count)
        torch.mm(flat, weights.down[0], out=slab.hidden[:count].view(-1, 4 * width))
        torch.mm(flat, out_w, out=slab.from_dy[:count].view(-1, width))
        torch.mm(along.view(-1, width), out_w, out=slab.along[:count].view(-1, width))
        slab.rstd[:count] = rstd.squeeze(-1)
        torch.add(qkv[..., :width], dq[:, :, None], out=slab.qkv[:count, ..., :width])
        slab.qkv[:count, ..., width:] = qkv[..., width:]
        slab.wide[:count].copy_(wide.flatten(1, 2))
        slab.attended[:count] = attended
        slab.lse[:count] = lse
        slab.s.copy_(ds)
        run()
        ds.copy_(slab.s)
        dstates.copy_(slab.dstates[:count, :, : ds.shape[1]])
        dwide = slab.hidden[:count].view(wide.shape)
        dattended, seen = slab.dattended[:count], slab.qkv[:count].flatten(0, 1)
        # What is not on the chain: the gradient of the residual, and all of the attention's, for all chunks at once.
        dmean = (dstates / dy.shape[2]).to(dy.dtype) @ weights.state[0]
        dnormed, dr = dwide.flatten(0, 2) @ weights.up[0], torch.empty_like(residual)
        ffn_norm.rows(dnormed, residual.view(-1, width), out=dr.view(-1, width), beside=flat)
        dr += dmean[:, :, None]
        keys, values = seen[..., width:].unflatten(-1, (2, weights.num_kv_heads, -1)).unbind(2)
        grads = _attention_backward(
            dattended.flatten(0, 1).unflatten(-1, heads), seen[..., :width].unflatten(-1, heads), keys, values,
            attended.flatten(0, 1).unflatten(-1, heads), lse.flatten(0, 1),
        )  # fmt: skip
        dqkv = torch.cat([grad.flatten(2) for grad in grads], dim=-1).view_as(qkv)
        kv_width = _kv(weights)
        added[..., :width] = _token_sums(dqkv[..., :width])
        added[..., width : width + kv_width] = 0.0
        every = _token_sums(dattended).unflatten(-1, (weights.num_kv_heads, -1, width // weights.n_heads))
        added[..., width + kv_width :] = every.sum(3).flatten(2)
        normed = torch.addcmul(norm_b, along, norm_w)
        return normed, dwide, dr, dqkv


def _reverse(
    weights: ChainWeights,
    ds: Tensor,
    kept: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    dwide: Tensor,
    dr: Tensor,
    dqkv: Tensor,
    added: Tensor,
    dglobal: Tensor | None,
    sums: _Sums,
) -> Tensor:
    """One chunk: ds `[B, N]` of the state after it -> that of the state before.

    dwide `[B, n, 4D]` holds W_down^T dy and dr `[B, n, D]` dy: overwritten with the whole gradients. Fills dqkv
    `[B, n, E]` and added `[B, E]`.
    """
    s, qkv, residual, wide, attended, lse = kept
    tokens, width, dtype = qkv.shape[1], residual.shape[-1], qkv.dtype
    dmean = (ds / tokens).to(dtype) @ weights.state[0]
    dwide += (dmean @ weights.down[0])[:, None]
    torch.ops.aten.gelu_backward.grad_input(dwide, wide, grad_input=dwide)
    dnormed = (dwide.flatten(0, 1) @ weights.up[0]).view_as(residual)
    dr += dmean[:, None]
    dr += _ffn_norm_backward(dnormed, residual, *statistics, weights.norm[:2], sums)
    dattended = (dr.flatten(0, 1) @ weights.out[0]).view_as(attended)

    dq, dkv, _ = weights.injection(s)
    q, kv = qkv.split([width, qkv.shape[-1] - width], dim=-1)
    heads = (weights.n_heads, -1)
    keys, values = weights.seen(weights.global_kv(), kv, dkv)
    grads = _attention_backward(
        dattended.unflatten(-1, heads), (q + dq[:, None]).unflatten(-1, heads), keys, values,
        attended.unflatten(-1, heads), lse,
    )  # fmt: skip
    dq, dk, dv = (grad.flatten(2) for grad in grads)
    far = dk.shape[1] - tokens
    torch.cat([dq, dk[:, far:], dv[:, far:]], dim=-1, out=dqkv)
    kv_width = dk.shape[-1]
    added[:, :width] = dq.sum(1, dtype=added.dtype)
    group = weights.n_heads // weights.num_kv_heads
    every = dattended.sum(1, dtype=added.dtype).unflatten(-1, (weights.num_kv_heads, group, -1)).sum(2).flatten(1)
    added[:, width : width + kv_width] = 0.0
    added[:, width + kv_width :] = every
    if dglobal is not None:
        # They are not injected, so in what is seen of them the injection is taken off.
        globals_kv = torch.cat([dk[:, :far], dv[:, :far]], dim=-1).to(added.dtype)
        dglobal += globals_kv.sum(0)
        added[:, width:] -= globals_kv.sum(1)
    return (added.to(dtype) @ weights.qkv @ weights.inject[0]).to(ds.dtype)


def _small_gradients(
    weights: ChainWeights,
    states: Tensor,
    dstates: Tensor,
    added: Tensor,
    means: Tensor,
    dglobal: Tensor | None,
    sums: _Sums,
) -> None:
    """What the parameters get once a chunk, through the injection and through the mean: all chunks at once."""
    dtype, width = weights.qkv.dtype, weights.qkv.shape[1]
    s, ds, added = states.to(dtype), dstates.to(dtype), added.to(dtype)
    dinjected = added @ weights.qkv
    sums.outer("qkv", added, F.linear(s, *weights.inject))
    sums.outer("inject_w", dinjected, s)
    sums.rows("inject_b", dinjected)
    mean_hidden = means[..., width:].to(dtype)
    mean = means[..., :width].to(dtype) + F.linear(mean_hidden, *weights.down)
    dmean = ds @ weights.state[0]
    sums.outer("state_w", ds, mean)
    sums.rows("state_b", ds)
    sums.outer("down_w", dmean, mean_hidden)
    sums.rows("down_b", dmean)
    if dglobal is not None:
        dglobal = dglobal.to(dtype)
        sums.outer("global_tokens", dglobal.t(), weights.qkv[width:])
        sums.add("qkv", F.pad(dglobal.t() @ weights.global_tokens, (0, 0, width, 0)))


def _ffn_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, affine: tuple[Tensor, Tensor], sums: _Sums
) -> Tensor:
    every = [True, True, True]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, *affine, every)
    sums.add("norm_w", dw)
    sums.add("norm_b", db)
    return dx


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


# -- attention inside a chunk -----------------------------------------------------------------------------------------


def _by_heads(q: Tensor, groups: int) -> Tensor:
    """`[B, n, H, K]` -> a view `[B, G, H/G, n, K]`."""
    return q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _weights_of_rows(q: Tensor, k: Tensor, start: int, offset: int) -> tuple[Tensor, int]:
    """Scores of the queries q `[B, G, H/G, r, K]`, the first of which is number `start`: (scores, keys they see)."""
    stop = start + q.shape[3]
    seen = offset + stop
    scores = (q * q.shape[-1] ** -0.5) @ k[:, :, :, :seen].transpose(-1, -2)
    later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
    scores[..., offset + start :].masked_fill_(later, float("-inf"))
    return scores, seen


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q `[B, n, H, K]`, k and v `[B, m + n, G, K]` -> (`[B, n, H, K]`, log-sum-exp `[B, H, n]`): query i sees m + i."""
    if flash.fits(q.device, q.dtype, q.shape[3]):
        # Its causal mask is aligned with the last key, which is what is meant.
        lengths = (None, None, q.shape[1], k.shape[1])
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)[:2]
    groups, offset = k.shape[2], k.shape[1] - q.shape[1]
    rows, k, v = _by_heads(q, groups), _by_heads(k, groups), _by_heads(v, groups)
    out, lse = torch.empty_like(q), q.new_empty(*rows.shape[:4], dtype=sum_dtype(q.dtype))
    out_rows = _by_heads(out, groups)
    for start in range(0, q.shape[1], ATTENTION_ROWS):
        span = slice(start, start + ATTENTION_ROWS)
        scores, seen = _weights_of_rows(rows[:, :, :, span], k, start, offset)
        lse[..., span] = torch.logsumexp(scores.to(lse.dtype), -1)
        out_rows[:, :, :, span] = torch.softmax(scores, -1) @ v[:, :, :, :seen]
    return out, lse.flatten(1, 2)


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes."""
    if flash.fits(q.device, q.dtype, q.shape[3]):
        # The state of a random generator, of which nothing is read without dropout.
        unread = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        lengths = (None, None, q.shape[1], k.shape[1])
        return torch.ops.aten._flash_attention_backward(dout, q, k, v, out, lse, *lengths, 0.0, True, *unread)
    groups, offset = k.shape[2], k.shape[1] - q.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rows, out_rows, grads, dq_rows = (_by_heads(t, groups) for t in (q, out, dout, dq))
    k, v, dk_rows, dv_rows = (_by_heads(t, groups)[:, :, 0] for t in (k, v, dk, dv))
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    lse = lse.unflatten(1, (groups, -1))
    for start in range(0, q.shape[1], ATTENTION_ROWS):
        span = slice(start, start + ATTENTION_ROWS)
        mine, grad = rows[:, :, :, span], grads[:, :, :, span]
        scores, seen = _weights_of_rows(mine, k, start, offset)
        p = torch.exp(scores.to(lse.dtype) - lse[..., span, None]).to(q.dtype)
        delta = (grad * out_rows[:, :, :, span]).sum(-1, keepdim=True)
        dscores = p * (grad @ v[:, :, :, :seen].transpose(-1, -2) - delta)
        dscores *= q.shape[-1] ** -0.5
        dq_rows[:, :, :, span] = dscores @ k[:, :, :, :seen]
        dk_rows[:, :, :seen] += (dscores.transpose(-1, -2) @ mine).sum(2)
        dv_rows[:, :, :seen] += (p.transpose(-1, -2) @ grad).sum(2)
    return dq, dk, dv
