"""Causal attention inside chunks, forward with what backward needs, and backward: flash-attention or torch's products.

Letters: B batch, n tokens of a chunk, m tokens in front of it that all queries see, H n_heads, G num_kv_heads, K head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _window_flash as flash
from longctx.ops.precision import wide_dtype

ATTENTION_ROWS = 128
"""Queries whose scores are held at a time."""


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


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q `[B, n, H, K]`, k and v `[B, m + n, G, K]` -> (`[B, n, H, K]`, log-sum-exp `[B, H, n]`): query i sees m + i."""
    if flash.fits(q.device, q.dtype, q.shape[3]):
        # Its causal mask is aligned with the last key, which is what is meant.
        lengths = (None, None, q.shape[1], k.shape[1])
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)[:2]
    groups, offset = k.shape[2], k.shape[1] - q.shape[1]
    rows, k, v = _by_heads(q, groups), _by_heads(k, groups), _by_heads(v, groups)
    out, lse = torch.empty_like(q), q.new_empty(*rows.shape[:4], dtype=wide_dtype(q.dtype))
    out_rows = _by_heads(out, groups)
    for start in range(0, q.shape[1], ATTENTION_ROWS):
        span = slice(start, start + ATTENTION_ROWS)
        scores, seen = _weights_of_rows(rows[:, :, :, span], k, start, offset)
        lse[..., span] = torch.logsumexp(scores.to(lse.dtype), -1)
        out_rows[:, :, :, span] = torch.softmax(scores, -1) @ v[:, :, :, :seen]
    return out, lse.flatten(1, 2)


def attention_backward(
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
