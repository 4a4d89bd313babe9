"""Whole chunks of BLADE with gradients: one operator forward, one backward.

The backward chain runs over the chunks in reverse and hands on the gradient of the state. On it is what that gradient
passes through; weight gradients and the projections at both ends are taken for all chunks of a slab at once:

    dmean = W_state^T ds / n;  dwide = gelu'(wide) (W_down^T dy + W_down^T dmean)      (W_down^T dy: off the chain)
    dr = dy + dmean + norm'(W_up^T dwide);  da = W_out^T dr;  dq, dk, dv from da through the attention
    ds = W_inject^T W_qkv^T (sum of dq, dk of the globals, sum of da)

Kept of the forward pass: the projection, the residual, the hidden rows before GELU, what attention gave, its
log-sum-exp and the states, some 9D a token beside x and y. Norms, GELU and softmax are computed again.

Letters: B batch, T sequence length, n tokens of a chunk, D d_model, N state_dim, E = D + 2GK, m global tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.ops import blade_pipeline as pipeline
from longctx.ops.blade_chain import ChainWeights
from longctx.ops.blade_training_backward import backward
from longctx.ops.blade_training_chain import kept_chain
from longctx.ops.blade_training_graph import TrainingGraphs, fused_chain, kernels
from longctx.ops.blade_training_layout import Settings, by_chunks, dense, listed, named, slabs
from longctx.ops.layer_norm import normalize
from longctx.ops.operators import first_order


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
    parameters = listed(attn_norm, weights)
    settings = (weights.n_heads, weights.num_kv_heads, chunk, attn_norm[2], weights.norm[2], graphs.number)
    if torch.compiler.is_compiling():
        y, last, *_ = torch.ops.longctx.blade_chunks(x, s, parameters, *settings)
        return y, last
    # An operator passes through schema checks and wrappers in Python, which short sequences would wait for.
    return _WholeChunks.apply(x, s, settings, *parameters)


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
    norm, weights = named(parameters, settings)
    y, last, states, qkv, residual, wide, attended, lse = _empty(x, s, weights, chunk)
    rows, out, width = by_chunks(x, chunk), by_chunks(y, chunk), x.shape[2]
    last.copy_(s)
    every = slabs(len(rows), x.shape[0] * chunk, x.device)
    with fused_chain(graphs, weights, x.shape[0], chunk) as fused:
        overlaps = pipeline.TRAINING_BESIDE and fused is not None and x.is_cuda
        at_once = 2 if overlaps and len(every) > 1 else 1
        buffers = [torch.empty_like(wide[every[0]]) for _ in range(at_once)]
        # What is passed on between products lies where y will be; without room for it there, beside it.
        split = not out[every[0]].is_contiguous()
        spares = [torch.empty_like(residual[every[0]]) for _ in range(at_once if split else 0)]
        dense_rows: dict[int, Tensor] = {}

        def passed(index: int) -> Tensor:
            slab = every[index]
            return spares[index % at_once][: slab.stop - slab.start] if split else out[slab]

        def hidden(index: int) -> Tensor:
            return buffers[index % at_once][: every[index].stop - every[index].start]

        def before(index: int) -> None:
            x_slab = dense_rows[index] = dense(rows[every[index]])
            normed = normalize(x_slab, *norm, out=passed(index))
            torch.mm(normed.view(-1, width), weights.qkv.t(), out=qkv[every[index]].view(-1, qkv.shape[-1]))

        def chain(index: int) -> None:
            slab, x_slab = every[index], dense_rows[index]
            if fused is None:
                kept = (states[slab], residual[slab], wide[slab], attended[slab], lse[slab])
                kept_chain(weights, x_slab, qkv[slab], last, *kept, hidden(index))
                return
            fused.forward(
                kernels.Rows(
                    x=x_slab, out=passed(index), residual=residual[slab], qkv=qkv[slab], hidden=hidden(index),
                    attended=attended[slab], states=states[slab], lse=lse[slab], wide=wide[slab],
                )
            )  # fmt: skip

        def after(index: int) -> None:
            del dense_rows[index]
            down = passed(index)
            flat, narrow = hidden(index).view(-1, 4 * width), down.view(-1, width)
            if fused is None:
                torch.addmm(weights.down[1], flat, weights.down[0].t(), out=narrow)
                torch.add(residual[every[index]], down, out=out[every[index]])
                return
            # The chain has left the residual and the bias there.
            torch.addmm(narrow, flat, weights.down[0].t(), out=narrow)
            if split:
                out[every[index]] = down

        if fused is not None:
            fused.enter(last)
        pipeline.run(x.device, len(every), before, chain, after, beside=overlaps)
        if fused is not None:
            fused.leave(last)
    return y, last, states, qkv, residual, wide, attended, lse


def _empty(x: Tensor, s: Tensor, weights: ChainWeights, chunk: int) -> tuple[Tensor, ...]:
    batch, length, width = x.shape
    shape = (length // chunk, batch, chunk)
    narrow = [x.new_empty(*shape, columns) for columns in (weights.qkv.shape[0], width, 4 * width, width)]
    lse = x.new_empty(shape[0], batch, weights.n_heads, chunk, dtype=s.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(s), s.new_empty(shape[0], *s.shape), *narrow, lse


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
    return backward(dy, dlast, x, parameters, kept, settings, graphs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, parameters, *ctx.settings = inputs
    ctx.parameters = len(parameters)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *parameters, *output[2:])


def _gradients(backward_pass: Any, ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> list[Tensor]:
    x, *saved = ctx.saved_tensors
    parameters, kept = saved[: ctx.parameters], saved[ctx.parameters :]
    dy = torch.zeros_like(x) if dy is None else dy
    # The first of what is kept are the states, `[count, B, N]`.
    dlast = torch.zeros_like(kept[0][0]) if dlast is None else dlast
    return backward_pass(dy, dlast, x, parameters, kept, *ctx.settings)


# -- with and without a compiler ---------------------------------------------------------------------------------------


class _WholeChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, settings: tuple[Any, ...], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = _forward(x, s, parameters, *settings)
        _keep(ctx, (x, s, parameters, *settings), output)
        return output[:2]

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, ds, *dparameters = _gradients(_backward, ctx, dy, dlast)
        return dx, ds, None, *dparameters


_forward_operator = torch.library.custom_op("longctx::blade_chunks", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("longctx::blade_chunks_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _(x, s, parameters, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, graphs):
    settings = Settings(n_heads=n_heads, num_kv_heads=num_kv_heads, chunk=chunk, attn_eps=attn_eps, ffn_eps=ffn_eps)
    return _empty(x, s, named(parameters, settings)[1], chunk)


@_backward_operator.register_fake
def _(dy, dlast, x, parameters, kept, n_heads, num_kv_heads, chunk, attn_eps, ffn_eps, graphs):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [
        dx,
        torch.empty_like(dlast),
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters),
    ]


def _give_back(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    dx, ds, *dparameters = _gradients(_backward_operator, ctx, dy, dlast)
    return dx, ds, dparameters, *([None] * len(ctx.settings))


_forward_operator.register_autograd(_give_back, setup_context=_keep)
