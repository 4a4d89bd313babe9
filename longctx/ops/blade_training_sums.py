"""What BLADE's backward pass needs of each chunk beside its rows, and the gradients that come of it.

The state and its injection meet a chunk as a whole. What they have to do with gradients of parameters is therefore in
sums over the tokens of each chunk: taken slab by slab, or of what is kept at once, and used for all chunks at the end.

Letters: B batch, n tokens of a chunk, D d_model, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights
from longctx.ops.precision import wide_dtype
from longctx.ops.weight_gradient import GradientSums


class ChunkSums:
    """Of each chunk `[count, B, ...]`: states and dstates `[N]`, before it and the gradient behind it, and added `[E]`,
    the gradient of what its injection added to queries, keys and values, all in fp32 or better.

    Sums over its tokens: hidden `[4D]` behind GELU, dresidual `[D]` of the gradient of the residual, but for the part
    that is the same for all tokens of the chunk, and dq `[D]` of that of the queries.
    """

    def __init__(self, like: Tensor, states: Tensor, rows: int, most: int) -> None:
        """like: rows `[count, B, n, D]`. rows: E. most: tokens of the largest slab."""
        width, self.tokens, self.states = like.shape[-1], like.shape[2], states
        half = like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)
        self.ones = like.new_ones(1, max(most, self.tokens)) if half else None
        # As products they are several times faster than as reductions. What is rounded is a sum, not its addends; but
        # fp16 might not have the range.
        self.products = half and like.dtype == torch.bfloat16
        self.each_token = self.ones[None, :, : self.tokens] if half else None
        self.dtype = like.dtype if self.products else wide_dtype(like.dtype)
        self.dstates, self.added = torch.empty_like(states), states.new_zeros(*states.shape[:2], rows)
        self.hidden = states.new_empty(*states.shape[:2], 4 * width, dtype=self.dtype)
        self.dresidual, self.dq = (states.new_empty(*states.shape[:2], width, dtype=self.dtype) for _ in range(2))

    def over_tokens(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows of whole chunks, `[..., W]`, one after the other -> sums over each chunk's tokens `[count, B, W]`."""
        by_chunk = rows.view(-1, self.tokens, rows.shape[-1])
        if out is None:
            out = rows.new_empty(*self.states.shape[:2], rows.shape[-1], dtype=self.dtype)
        flat = out.view(-1, 1, rows.shape[-1])
        if self.products:
            torch.bmm(self.each_token.expand(len(flat), -1, -1), by_chunk, out=flat)
        else:
            torch.sum(by_chunk, 1, keepdim=True, dtype=out.dtype, out=flat)
        return out

    def over_rows(self, sums: GradientSums, name: str, rows: Tensor) -> None:
        """Add the sum of rows `[t, W]` to the gradient of a bias."""
        if self.ones is None:
            sums.add(name, rows.sum(0, dtype=wide_dtype(rows.dtype)))
        else:
            sums.outer(name, self.ones[:, : len(rows)].t(), rows)


def through_the_norm(weights: ChainWeights, sums: GradientSums) -> None:
    """Of the gradient of W_up, which holds dwide^T n, make dwide^T (gain * n + bias)."""
    gain, bias, _ = weights.norm
    total = sums.sums["up_w"].total
    total.mul_(gain).addr_(sums.total("up_b"), bias.to(total.dtype))


def chunk_gradients(
    weights: ChainWeights,
    chunks: ChunkSums,
    sums: GradientSums,
    residual: Tensor,
    attended: Tensor,
    dx: Tensor,
    dglobal: Tensor | None,
    *,
    injected: bool,
) -> None:
    """What comes once a chunk, through the injection and through the mean, all chunks at once; residual, attended and
    dx `[count, B, n, D]`, and dx gets its part, the same for all tokens of a chunk.

    injected: whether `chunks.added` is still to be filled, from `chunks.dq` and what came to all values alike.
    """
    dtype, width, per_token = weights.qkv.dtype, weights.qkv.shape[1], 1.0 / chunks.tokens
    s, ds = chunks.states.flatten(0, 1).to(dtype), chunks.dstates.flatten(0, 1).to(dtype)
    added, dresidual = chunks.added.flatten(0, 1), chunks.dresidual.flatten(0, 1).to(dtype)
    # The gradient of the mean, which each token has the same share of.
    dmean = ds @ weights.state[0]
    dx += (dmean * per_token).view(*dx.shape[:2], 1, width)
    dresidual = dresidual + dmean
    if injected:
        added[:, :width] = chunks.dq.flatten(0, 1)
        group = weights.n_heads // weights.num_kv_heads
        every = dresidual @ weights.out[0]
        if group > 1:
            every = every.unflatten(1, (weights.num_kv_heads, group, -1)).sum(2).flatten(1)
        added[:, width + every.shape[1] :] = every
    added = added.to(dtype)
    injection = F.linear(s, *weights.inject)
    dv = F.linear(injection, weights.qkv[(width + len(weights.qkv)) // 2 :])
    if weights.n_heads > weights.num_kv_heads:
        group = weights.n_heads // weights.num_kv_heads
        dv = dv.unflatten(-1, (weights.num_kv_heads, -1)).repeat_interleave(group, dim=1).flatten(1)
    sums.outer("out_w", dresidual, dv)
    sums.outer("out_w", dmean, _mean(chunks, chunks.over_tokens(attended), dtype))
    dinjected = added @ weights.qkv
    sums.outer("qkv", added, injection)
    sums.outer("inject_w", dinjected, s)
    sums.add("inject_b", dinjected.sum(0, dtype=wide_dtype(dtype)))
    mean_hidden = _mean(chunks, chunks.hidden, dtype)
    mean = F.linear(mean_hidden, *weights.down) + _mean(chunks, chunks.over_tokens(residual), dtype)
    sums.outer("state_w", ds, mean)
    of_bias = chunks.dstates.flatten(0, 1).sum(0)
    sums.add("state_b", of_bias)
    sums.outer("down_w", dmean, mean_hidden)
    shared = of_bias @ weights.state[0].to(of_bias.dtype)
    sums.add("down_b", shared)
    sums.add("out_b", shared)
    if dglobal is not None:
        dglobal = dglobal.to(dtype)
        sums.outer("global_tokens", dglobal.t(), weights.qkv[width:])
        sums.add("qkv", F.pad(dglobal.t() @ weights.global_tokens, (0, 0, width, 0)))


def _mean(chunks: ChunkSums, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over tokens `[count, B, W]` -> means `[count * B, W]`."""
    return (sums.flatten(0, 1) / chunks.tokens).to(dtype)
