"""Both chains of BLADE's training in torch's own kernels: where the fused ones do not fit, and on a CPU.

Letters: B batch, n tokens of a chunk, D d_model, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights, after_attention
from longctx.ops.chunk_attention_gradients import attention, attention_backward
from longctx.ops.weight_gradient import GradientSums


def kept_chain(
    weights: ChainWeights,
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
    """The chain of a slab: x `[count, B, n, D]`, and `last` `[B, N]`, overwritten with the state behind it.

    Fills what is kept of it, and hidden, rows after GELU, like wide `[count, B, n, 4D]`. Injects the queries in qkv.
    """
    global_kv, width = weights.global_kv(), x.shape[-1]
    s = last.clone()
    for index in range(len(x)):
        states[index] = s
        dq, dkv, dv = weights.injection(s)
        q, kv = qkv[index].split([width, qkv.shape[-1] - width], dim=-1)
        q.add_(dq[:, None])
        out, norm = attention(q.unflatten(-1, (weights.n_heads, -1)), *weights.seen(global_kv, kv, dkv))
        attended[index], lse[index] = out.flatten(2), norm
        flat = {"hidden": hidden[index].flatten(0, 1), "wide": wide[index].flatten(0, 1)}
        s = weights.next_state(after_attention(weights, x[index], out, dv, residual=residual[index], **flat))
    last.copy_(s)


def reverse_chain(
    weights: ChainWeights,
    dy: Tensor,
    qkv: Tensor,
    residual: Tensor,
    wide: Tensor,
    attended: Tensor,
    lse: Tensor,
    dstates: Tensor,
    dwide: Tensor,
    dr: Tensor,
    states: Tensor,
    ds: Tensor,
    added: Tensor,
    dglobal: Tensor | None,
    sums: GradientSums,
) -> tuple[Tensor, Tensor]:
    """The reverse chain of a slab: (residual normalized, without gain and bias, gradient of qkv).

    dy and what is kept `[count, B, n, ...]`. Overwrites dstates; dwide and dr, the gradients of wide and of the
    residual, dr but for the part that comes through the mean and is the same for all tokens of a chunk; ds, of the
    state after the slab before and of that before it after; added.
    """
    width, eps = dy.shape[-1], weights.norm[2]
    normalized, mean, rstd = torch.native_layer_norm(residual, (width,), None, None, eps)
    torch.mm(dy.view(-1, width), weights.down[0], out=dwide.view(-1, 4 * width))
    dr.copy_(dy)
    dqkv = torch.empty_like(qkv)
    for index in reversed(range(len(dy))):
        dstates[index] = ds
        kept = tuple(tensor[index] for tensor in (states, qkv, residual, wide, attended, lse))
        grads = (dwide[index], dr[index], dqkv[index], added[index])
        ds.copy_(_reverse(weights, ds, kept, (mean[index], rstd[index]), *grads, dglobal, sums))
    return normalized, dqkv


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
    sums: GradientSums,
) -> Tensor:
    """One chunk: ds `[B, N]` of the state after it -> that of the state before.

    dwide `[B, n, 4D]` holds W_down^T dy and dr `[B, n, D]` dy: overwritten as in `reverse_chain`. Fills dqkv
    `[B, n, E]` and added `[B, E]`.
    """
    s, qkv, residual, wide, attended, lse = kept
    tokens, width, dtype = qkv.shape[1], residual.shape[-1], qkv.dtype
    dmean = (ds / tokens).to(dtype) @ weights.state[0]
    dwide += (dmean @ weights.down[0])[:, None]
    torch.ops.aten.gelu_backward.grad_input(dwide, wide, grad_input=dwide)
    dnormed = (dwide.flatten(0, 1) @ weights.up[0]).view_as(residual)
    dr += _ffn_norm_backward(dnormed, residual, *statistics, weights.norm[:2], sums)
    dattended = ((dr + dmean[:, None]).flatten(0, 1) @ weights.out[0]).view_as(attended)

    _, dkv, _ = weights.injection(s)
    q, kv = qkv.split([width, qkv.shape[-1] - width], dim=-1)
    heads = (weights.n_heads, -1)
    keys, values = weights.seen(weights.global_kv(), kv, dkv)
    grads = attention_backward(
        dattended.unflatten(-1, heads), q.unflatten(-1, heads), keys, values,
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


def _ffn_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, affine: tuple[Tensor, Tensor], sums: GradientSums
) -> Tensor:
    every = [True, True, True]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, *affine, every)
    sums.add("norm_w", dw)
    sums.add("norm_b", db)
    return dx
