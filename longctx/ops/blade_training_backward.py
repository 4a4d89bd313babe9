"""BLADE's backward pass over whole chunks: slab by slab from the last, the reverse chain and what is taken off it.

Rows of a slab that exist at once, in D a token: 4 for the hidden rows, first behind GELU and then their gradient, and
three more around the chain; later, with those gone, six of the attention's. The rows of dx serve as one of them.

Letters: B batch, n tokens of a chunk, D d_model, H n_heads, G num_kv_heads, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights
from longctx.ops.blade_training_chain import reverse_chain
from longctx.ops.blade_training_graph import TrainingChain, backward_kernels, fused_chain
from longctx.ops.blade_training_layout import BACKWARD_SLABS, NAMES, Settings, by_chunks, named, slabs
from longctx.ops.blade_training_sums import ChunkSums, chunk_gradients, through_the_norm
from longctx.ops.chunk_attention_gradients import attention_backward
from longctx.ops.layer_norm import NormGradients, normalize
from longctx.ops.weight_gradient import GradientSums


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    settings: Settings,
    graphs: int,
) -> list[Tensor]:
    """Gradients of x, of s and of the parameters."""
    norm, weights = named(parameters, settings)
    states, qkv, residual, wide, attended, lse = kept
    sums, width, chunk = GradientSums(NAMES, parameters), x.shape[2], settings.chunk
    attn_norm, ffn_norm = (NormGradients(x, weight, eps) for weight, _, eps in (norm, weights.norm))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, grads, out = by_chunks(x, chunk), by_chunks(dy, chunk), by_chunks(dx, chunk)
    every = slabs(len(rows), x.shape[0] * chunk, x.device, BACKWARD_SLABS)
    chunks = ChunkSums(residual, states, qkv.shape[-1], every[0].stop * x.shape[0] * chunk)
    ds = dlast.clone()
    tokens, dglobal = weights.global_tokens, None
    if tokens is not None:
        dglobal = states.new_zeros(len(tokens), qkv.shape[-1] - width)
    with fused_chain(graphs, weights, x.shape[0], chunk, backward=True) as fused:
        if fused is not None:
            fused.enter(ds)
        for slab in reversed(every):
            dy_slab = grads[slab].contiguous()
            hidden = torch.ops.aten.gelu(wide[slab])
            chunks.over_tokens(hidden, out=chunks.hidden[slab])
            sums.outer("down_w", dy_slab, hidden)
            # The gradient of wide goes where hidden was, and that of the residual where dx will be.
            dr = out[slab] if out[slab].is_contiguous() else torch.empty_like(dy_slab)
            kept_slab = (qkv[slab], residual[slab], wide[slab], attended[slab], lse[slab])
            written = (chunks.dstates[slab], hidden, dr)
            if fused is None:
                added = chunks.added[slab]
                more = (states[slab], ds, added, dglobal, sums)
                normalized, dqkv = reverse_chain(weights, dy_slab, *kept_slab, *written, *more)
                chunks.over_rows(sums, "down_b", dy_slab)
            else:
                normalized, dattended = _fused_reverse_chain(fused, weights, dy_slab, *kept_slab, *written, ffn_norm)
            sums.outer("up_w", hidden, normalized)
            chunks.over_rows(sums, "up_b", hidden)
            del hidden, normalized, written
            sums.outer("out_w", dr, attended[slab])
            chunks.over_tokens(dr, out=chunks.dresidual[slab])
            if fused is not None:
                dqkv = _attention_backward(weights, dattended, *(tensor[slab] for tensor in (qkv, attended, lse)))
                del dattended
                chunks.over_tokens(dqkv[..., :width], out=chunks.dq[slab])
            x_slab = rows[slab].contiguous()
            normed = normalize(x_slab, *norm)
            sums.outer("qkv", dqkv, normed)
            dnormed = torch.mm(dqkv.flatten(0, 2), weights.qkv, out=normed.view(-1, width))
            flat = dr.view(-1, width)
            attn_norm.rows(dnormed, x_slab.view(-1, width), out=flat, beside=flat)
            if dr.data_ptr() != out[slab].data_ptr():
                out[slab] = dr
            del dqkv, normed, dnormed
        if fused is not None:
            fused.leave(ds)
    for name, gradient in zip(("attn_w", "attn_b", "out_b"), attn_norm.totals(), strict=True):
        sums.add(name, gradient)
    for name, gradient in zip(("norm_w", "norm_b", "down_b"), ffn_norm.totals(), strict=True):
        sums.add(name, gradient)
    through_the_norm(weights, sums)
    chunk_gradients(weights, chunks, sums, residual, attended, out, dglobal, injected=fused is not None)
    return [dx, ds, *sums.finished()]


def _fused_reverse_chain(
    fused: TrainingChain,
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
    ffn_norm: NormGradients,
) -> tuple[Tensor, Tensor]:
    """`reverse_chain` in fused kernels up to the attention: (residual normalized, gradient of what attention gave).

    Leaves the sum of dy to `ffn_norm`.
    """
    width = dy.shape[-1]
    out_w, flat = weights.out[0], dy.view(-1, width)
    normalized, _, rstd = torch.native_layer_norm(residual, (width,), None, None, weights.norm[2])
    torch.mm(flat, weights.down[0], out=dwide.view(-1, 4 * width))
    from_dy, dattended = torch.empty_like(residual), torch.empty_like(residual)
    torch.mm(flat, out_w, out=from_dy.view(-1, width))
    # It is not needed behind the chain, when dr is written.
    along = torch.mm(normalized.view(-1, width), out_w, out=dr.view(-1, width)).view_as(residual)
    rows = backward_kernels.ReverseRows(
        qkv=qkv, wide=wide, attended=attended, lse=lse, rstd=rstd.to(lse.dtype), from_dy=from_dy, along=along,
        dwide=dwide, dattended=dattended, dstates=dstates,
    )  # fmt: skip
    fused.backward(rows)
    dnormed = torch.mm(dwide.view(-1, 4 * width), weights.up[0], out=from_dy.view(-1, width))
    ffn_norm.rows(dnormed, residual.view(-1, width), out=dr.view(-1, width), beside=flat)
    return normalized, dattended


def _attention_backward(weights: ChainWeights, dattended: Tensor, qkv: Tensor, attended: Tensor, lse: Tensor) -> Tensor:
    """Gradient of qkv `[count, B, n, E]`, whose queries are the injected ones, for all chunks of a slab at once."""
    width, heads = dattended.shape[-1], (weights.n_heads, -1)
    seen = qkv.flatten(0, 1)
    keys, values = seen[..., width:].unflatten(-1, (2, weights.num_kv_heads, -1)).unbind(2)
    grads = attention_backward(
        dattended.flatten(0, 1).unflatten(-1, heads), seen[..., :width].unflatten(-1, heads), keys, values,
        attended.flatten(0, 1).unflatten(-1, heads), lse.flatten(0, 1),
    )  # fmt: skip
    return torch.cat([grad.flatten(2) for grad in grads], dim=-1).view_as(qkv)
