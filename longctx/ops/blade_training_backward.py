"""BLADE's backward pass over whole chunks: slab by slab from the last, the reverse chain and what is taken off it.

Rows of a slab that exist at once, in D a token: 4 for the hidden rows, first behind GELU and then their gradient, and
two more around the chain; later, with those gone, six of the attention's. The rows of dx serve as another.

Letters: B batch, n tokens of a chunk, D d_model, H n_heads, G num_kv_heads, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.ops import blade_pipeline as pipeline
from longctx.ops.blade_training_chain import reverse_chain
from longctx.ops.blade_training_graph import TrainingChain, backward_kernels, fused_chain
from longctx.ops.blade_training_layout import NAMES, Settings, by_chunks, named, slabs
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
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    ds = dlast.clone()
    work = _Backward(dy, x, dx, ds, parameters, kept, settings)
    with fused_chain(graphs, work.weights, x.shape[0], settings.chunk, backward=True) as fused:
        work.fused = fused
        overlaps = pipeline.TRAINING_BESIDE and fused is not None and x.is_cuda
        if fused is not None:
            fused.enter(ds)
        pipeline.run(x.device, len(work.slabs), work.before, work.chain, work.after, beside=overlaps)
        if fused is not None:
            fused.leave(ds)
    if overlaps:
        work.sums.used_here()
    return [dx, ds, *work.finished()]


@dataclass
class _Rows:
    """Rows of a slab `[tokens, ...]` between the stages of its backward pass."""

    dy: Tensor
    dr: Tensor
    """Where the gradient of the residual will be; before that n W_out, with n the residual normalized."""
    hidden: Tensor | None
    """Behind GELU, then the gradient of what is before it."""
    normalized: Tensor | None = None
    rstd: Tensor | None = None
    dattended: Tensor | None = None
    """The gradient of what attention gave; before that dy W_out."""
    dqkv: Tensor | None = None


class _Backward:
    """The backward pass in three stages a slab, for `blade_pipeline.run`: slab 0 is the last of the sequence."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        dx: Tensor,
        ds: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        settings: Settings,
    ) -> None:
        self.norm, self.weights = named(parameters, settings)
        self.states, self.qkv, self.residual, self.wide, self.attended, self.lse = kept
        self.sums, self.width, chunk = GradientSums(NAMES, parameters), x.shape[2], settings.chunk
        self.attn_norm = NormGradients(x, self.norm[0], self.norm[2])
        self.ffn_norm = NormGradients(x, self.weights.norm[0], self.weights.norm[2])
        self.x, self.dy, self.out = by_chunks(x, chunk), by_chunks(dy, chunk), by_chunks(dx, chunk)
        every = slabs(len(self.x), x.shape[0] * chunk, x.device)
        self.slabs = every[::-1]
        self.chunks = ChunkSums(self.residual, self.states, self.qkv.shape[-1], every[0].stop * x.shape[0] * chunk)
        self.ds, self.dglobal = ds, None
        if self.weights.global_tokens is not None:
            columns = self.qkv.shape[-1] - self.width
            self.dglobal = self.states.new_zeros(len(self.weights.global_tokens), columns)
        self.fused: TrainingChain | None = None
        self.rows: dict[int, _Rows] = {}

    def before(self, index: int) -> None:
        """What the chain needs, and what follows from the rows behind GELU, which it overwrites."""
        slab, weights, width = self.slabs[index], self.weights, self.width
        dy, wide, out = self.dy[slab].contiguous().view(-1, width), self.wide[slab].view(-1, 4 * width), self.out[slab]
        hidden = torch.ops.aten.gelu(wide)
        self.chunks.over_tokens(hidden, out=self.chunks.hidden[slab])
        self.sums.outer("down_w", dy, hidden)
        dr = out.view(-1, width) if out.is_contiguous() else torch.empty_like(dy)
        rows = self.rows[index] = _Rows(dy, dr, hidden)
        if self.fused is None:
            return
        out_w, residual = weights.out[0], self.residual[slab].view(-1, width)
        rows.normalized, _, rstd = torch.native_layer_norm(residual, (width,), None, None, weights.norm[2])
        rows.rstd = rstd.to(self.lse.dtype)
        torch.mm(dy, weights.down[0], out=hidden)
        rows.dattended = torch.mm(dy, out_w)
        torch.mm(rows.normalized, out_w, out=dr)

    def chain(self, index: int) -> None:
        """The gradient of the rows before GELU, and of what attention gave; without fused kernels all of qkv's too."""
        slab, rows = self.slabs[index], self.rows[index]
        qkv, wide, attended, lse = (tensor[slab] for tensor in (self.qkv, self.wide, self.attended, self.lse))
        dstates = self.chunks.dstates[slab]
        if self.fused is None:
            residual = self.residual[slab]
            dy, dr, dwide = rows.dy.view_as(residual), rows.dr.view_as(residual), rows.hidden.view_as(wide)
            more = (self.states[slab], self.ds, self.chunks.added[slab], self.dglobal, self.sums)
            kept = (qkv, residual, wide, attended, lse)
            normalized, rows.dqkv = reverse_chain(self.weights, dy, *kept, dstates, dwide, dr, *more)
            rows.normalized = normalized.view_as(rows.dy)
            self.chunks.over_rows(self.sums, "down_b", rows.dy)
            return
        shape = attended.shape
        dattended, along, rstd = rows.dattended.view(shape), rows.dr.view(shape), rows.rstd.view(shape[:3])
        reverse = backward_kernels.ReverseRows(
            qkv=qkv, wide=wide, attended=attended, lse=lse, rstd=rstd, from_dy=dattended, along=along,
            dwide=rows.hidden.view(wide.shape), dattended=dattended, dstates=dstates,
        )  # fmt: skip
        self.fused.backward(reverse)

    def after(self, index: int) -> None:
        """All other gradients. What is done with is let go at once."""
        slab, rows, weights, width = self.slabs[index], self.rows.pop(index), self.weights, self.width
        sums, chunks, dr, attended = self.sums, self.chunks, rows.dr, self.attended[slab]
        sums.outer("up_w", rows.hidden, rows.normalized)
        chunks.over_rows(sums, "up_b", rows.hidden)
        if self.fused is not None:
            dnormed = torch.mm(rows.hidden, weights.up[0], out=rows.normalized)
            self.ffn_norm.rows(dnormed, self.residual[slab].view(-1, width), out=dr, beside=rows.dy)
            del dnormed
        rows.hidden = rows.normalized = None
        sums.outer("out_w", dr, attended)
        chunks.over_tokens(dr, out=chunks.dresidual[slab])
        if self.fused is not None:
            grads = self._attention(rows.dattended, self.qkv[slab], attended, self.lse[slab])
            rows.dattended = None
            rows.dqkv = torch.cat(grads, dim=-1).view(len(dr), -1)
            del grads
            chunks.over_tokens(rows.dqkv[:, :width], out=chunks.dq[slab])
        dqkv = rows.dqkv.view(len(dr), -1)
        x = self.x[slab].contiguous()
        normed = normalize(x, *self.norm).view(-1, width)
        sums.outer("qkv", dqkv, normed)
        dnormed = torch.mm(dqkv, weights.qkv, out=normed)
        self.attn_norm.rows(dnormed, x.view(-1, width), out=dr, beside=dr)
        if not self.out[slab].is_contiguous():
            self.out[slab] = dr.view(attended.shape)

    def _attention(self, dattended: Tensor, qkv: Tensor, attended: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of queries, keys and values, `[chunks, n, ...]`, of all chunks of a slab at once."""
        heads, groups = self.weights.n_heads, self.weights.num_kv_heads
        count, tokens, head = qkv.shape[0] * qkv.shape[1], qkv.shape[2], self.width // self.weights.n_heads
        rows = qkv.view(count, tokens, -1, head)
        q, k, v = rows.split([heads, groups, groups], dim=2)
        shape = (count, tokens, heads, head)
        grads = attention_backward(dattended.view(shape), q, k, v, attended.view(shape), lse.flatten(0, 1))
        return [grad.flatten(2) for grad in grads]

    def finished(self) -> list[Tensor]:
        """Gradients of the parameters, when all slabs are done; dx gets the last of what it gets."""
        sums = self.sums
        # The sum of dy is left to the second norm, as that of dr is to the first.
        for names, norm in (
            (("attn_w", "attn_b", "out_b"), self.attn_norm),
            (("norm_w", "norm_b", "down_b"), self.ffn_norm),
        ):
            for name, gradient in zip(names, norm.totals(), strict=True):
                sums.add(name, gradient)
        through_the_norm(self.weights, sums)
        kept = (self.residual, self.attended, self.out)
        chunk_gradients(self.weights, self.chunks, sums, *kept, self.dglobal, injected=self.fused is not None)
        return sums.finished()
