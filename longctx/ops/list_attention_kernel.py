"""Attention of each query block to its list of key blocks in one Triton kernel: forward, causal, half precision.

A program takes one query block of one head and walks over its list: the diagonal block first, so that no row is ever
without a key, then globals, random blocks and the rest of the window. Nothing is gathered and no list is written out:
globals and window follow from the block's number, random blocks are read from the plan. Softmax is taken online
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691).

Letters: B batch, t queries, S keys, H query heads, G key-value heads, K head width, b block_size, r random blocks.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longctx.ops.block_sparse_attention import BlockSparse

LOG2_E = 1.4426950408889634


def fits(q: Tensor, sparse: BlockSparse) -> bool:
    """Whether the kernel can do these queries."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and sparse.pattern.causal
        and sparse.pattern.block_size in (16, 32, 64, 128)
        and q.shape[3] in (16, 32, 64, 128)
        and q.stride(3) == 1
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def list_attention(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse) -> Tensor:
    """q `[B, t, H, K]`, k and v `[B, G, S, K]` contiguous -> `[B, t, H, K]`, as `block_sparse_attention` does."""
    batch, tokens, heads, width = q.shape
    pattern, size = sparse.pattern, sparse.pattern.block_size
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    first = sparse.start // size
    grid = (triton.cdiv(sparse.length, size) - first, heads, batch)
    plan = sparse.plan
    # On a CPU under Triton's interpreter, which tests use.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _list_attention[grid](
            q, k, v, plan, out,
            q.stride(0), q.stride(1), q.stride(2), plan.stride(0), plan.stride(1), k.shape[2],
            first, sparse.start, sparse.length, tokens, heads, heads // k.shape[1], width**-0.5 * LOG2_E,
            GLOBALS=pattern.num_global_blocks, WINDOW=pattern.num_window_blocks, PICKS=pattern.num_random_blocks,
            SIZE=size, K=width, num_warps=4 if size * width <= 64 * 64 else 8, num_stages=3,
        )  # fmt: skip
    return out


@triton.jit
def _list_attention(
    queries, keys, values, plan, out,
    q_batch, q_token, q_head, plan_head, plan_block, capacity,
    first, start, length, tokens, heads, group, scale,
    GLOBALS: tl.constexpr, WINDOW: tl.constexpr, PICKS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # The last blocks have full lists, the first ones short ones: long work starts first.
    block = first + tl.num_programs(0) - 1 - tl.program_id(0)
    head, item = tl.program_id(1), tl.program_id(2)
    rows = block * SIZE + tl.arange(0, SIZE)
    there = (rows >= start) & (rows < length)
    lanes = tl.arange(0, K)
    at = item.to(tl.int64) * q_batch + (rows - start).to(tl.int64) * q_token + head * q_head
    q = tl.load(queries + at[:, None] + lanes[None, :], mask=there[:, None], other=0.0)
    # No column of k or v is cut off: what lies behind the last token inside its block is zero, and hidden below.
    base = (item.to(tl.int64) * (heads // group) + head // group) * capacity * K
    inside = tl.arange(0, SIZE)[:, None] * K + lanes[None, :]

    place = base + block.to(tl.int64) * SIZE * K
    k = tl.load(keys + place + inside)
    v = tl.load(values + place + inside)
    columns = tl.arange(0, SIZE)
    scores = tl.where(columns[:, None] >= columns[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    top = tl.max(scores, 1)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v)

    oldest = block - WINDOW + 1
    for entry in range(GLOBALS + PICKS + WINDOW - 1):
        pick = entry - GLOBALS
        drawn = (pick >= 0) & (pick < PICKS)
        chosen = tl.load(plan + head * plan_head + block * plan_block + pick, mask=drawn, other=-1).to(tl.int32)
        # A global block inside the window is the window's.
        shared = tl.where(entry < oldest, entry, -1)
        listed = tl.where(entry < GLOBALS, shared, tl.where(drawn, chosen, oldest + pick - PICKS))
        place = base + tl.maximum(listed, 0).to(tl.int64) * SIZE * K
        k = tl.load(keys + place + inside)
        v = tl.load(values + place + inside)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(listed >= 0, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    acc = acc / total[:, None]
    target = ((item.to(tl.int64) * tokens + (rows - start)) * heads + head) * K
    tl.store(out + target[:, None] + lanes[None, :], acc.to(out.dtype.element_ty), mask=there[:, None])
