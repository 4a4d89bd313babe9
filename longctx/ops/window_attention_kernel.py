"""Attention over a window of keys, and a few global ones, in one Triton kernel: forward, half precision.

A program takes a tile of queries of one head. It begins with the keys at its own positions, so that no row is ever
without a key, goes on to the older ones, to the newer ones where both sides are seen, and to the globals. Queries, keys
and values are read where the projection left them. Softmax is taken online (Milakov and Gimelshein 2018, arXiv
1805.02867; Dao 2023, arXiv 2307.08691).

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, g global keys.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
TILE = 64


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can do these queries."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] in (16, 32, 64, 128)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def window_kernel(
    q: Tensor, k: Tensor, v: Tensor, global_k: Tensor | None, global_v: Tensor | None, left: int, right: int
) -> Tensor:
    """q `[B, T, H, K]` over the keys from `left` behind to `right` ahead, and all globals: `[B, T, H, K]`.

    k, v `[B, S, G, K]`: query i sits at key S - T + i. global_k, global_v `[B, g, G, K]` or None.
    """
    batch, tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    far_k, far_v = (k, v) if global_k is None else (global_k, global_v)
    # On a CPU under Triton's interpreter, which tests use.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _window[(triton.cdiv(tokens, TILE), heads, batch)](
            q, k, v, far_k, far_v, out,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *far_k.stride()[:3], *far_v.stride()[:3],
            tokens, k.shape[1], 0 if global_k is None else global_k.shape[1], left, right,
            heads // k.shape[2], width**-0.5 * LOG2_E,
            TILE=TILE, K=width, BOTH=right > 0, FAR=global_k is not None,
            num_warps=4 if width <= 64 else 8, num_stages=3,
        )  # fmt: skip
    return out


@triton.jit
def _window(
    queries, keys, values, far_keys, far_values, out,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    fk_batch, fk_token, fk_head, fv_batch, fv_token, fv_head,
    tokens, count, far, left, right, group, scale,
    TILE: tl.constexpr, K: tl.constexpr, BOTH: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    head, item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, TILE)
    lanes = tl.arange(0, K)
    at = item * q_batch + rows.to(tl.int64) * q_token + head * q_head
    q = tl.load(queries + at[:, None] + lanes[None, :], mask=(rows < tokens)[:, None], other=0.0)
    keys += item * k_batch + (head // group) * k_head
    values += item * v_batch + (head // group) * v_head
    # Where the queries sit among the keys.
    own = count - tokens + first
    places = own + tl.arange(0, TILE)

    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, K), tl.float32)
    top, total, acc = _add(
        q, keys, values, k_token, v_token, own, count, places, left, right, scale, top, total, acc, TILE, K
    )
    for start in range(tl.maximum(own - left, 0), own, TILE):
        # The last of the older tiles ends where the own one begins.
        top, total, acc = _add(
            q, keys, values, k_token, v_token, start, own, places, left, right, scale, top, total, acc, TILE, K
        )
    if BOTH:
        for start in range(own + TILE, tl.minimum(own + TILE + right, count), TILE):
            top, total, acc = _add(
                q, keys, values, k_token, v_token, start, count, places, left, right, scale, top, total, acc, TILE, K
            )
    if FAR:
        far_keys += item * fk_batch + (head // group) * fk_head
        far_values += item * fv_batch + (head // group) * fv_head
        for start in range(0, far, TILE):
            # Every query sees every global: a distance that no window excludes.
            top, total, acc = _add(
                q, far_keys, far_values, fk_token, fv_token, start, far, places, 1 << 30, 1 << 30, scale,
                top, total, acc, TILE, K,
            )  # fmt: skip
    acc = acc / total[:, None]
    target = ((item * tokens + rows) * tl.num_programs(1) + head) * K
    tl.store(out + target[:, None] + lanes[None, :], acc.to(out.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def _add(
    q, keys, values, k_token, v_token, start, stop, places, left, right, scale, top, total, acc,
    TILE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of keys from `start` on, none from `stop` on, added to what the rows have seen so far."""
    cols = start + tl.arange(0, TILE)
    lanes = tl.arange(0, K)
    there = cols < stop
    k = tl.load(keys + cols.to(tl.int64)[:, None] * k_token + lanes[None, :], mask=there[:, None], other=0.0)
    v = tl.load(values + cols.to(tl.int64)[:, None] * v_token + lanes[None, :], mask=there[:, None], other=0.0)
    behind = places[:, None] - cols[None, :]
    seen = there[None, :] & (behind <= left) & (behind >= -right)
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # Rows behind the last query see nothing at all, and are never stored.
    shrink = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc
