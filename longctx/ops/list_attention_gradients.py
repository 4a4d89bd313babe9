"""The backward pass of list attention in Triton, deterministic: what is summed is summed in a fixed order.

Queries: as the forward pass, over the list of a query block. Keys: over the query blocks that list a key block: itself
and the window behind it, then those that have drawn it, from the transposed plan. Global blocks are listed by all
later query blocks, so these are cut in parts that are summed in fp32 and then with each other.

Letters: B batch, t queries, S keys, H query heads, G key-value heads, K head width, b block_size, m global blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.attention_tile import (
    LOG2_E,
    add_to_keys,
    add_to_queries,
    kept,
    load_rows,
    store_rows,
    weights_of_keys,
)
from longctx.ops.launch import launch
from longctx.ops.list_attention_kernel import nth_of_list, warps

LOG2 = tl.constexpr(LOG2_E)
# Query blocks of one part of the sum for global blocks, and how many parts there may be.
PART_BLOCKS = 32
MOST_PARTS = 64


def run_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    readers: Tensor,
    ends: Tensor,
    num_globals: int,
    window: int,
    size: int,
    start: int,
    length: int,
    dropout_p: float,
    seed: Tensor | None,
    *,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q `[B, t, H, K]` and of k, v `[B, S, G, K]`, zero from `length` on. readers, ends: the plan turned.

    grads: where to write them, heads behind each other; None: new memory.
    """
    batch, tokens, heads, width = q.shape
    capacity, groups = k.shape[1:3]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    if grads is None:
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    grad_q, grad_k, grad_v = grads
    delta = torch.empty_like(sums)
    drawn = out if seed is None else seed
    first, n_blocks = start // size, -(-length // size)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    common = (first, start, length, tokens, heads // groups, width**-0.5 * LOG2_E, dropout_p, width**-0.5)
    flags = {"SIZE": size, "K": width, "DROPOUT": dropout_p > 0}
    pattern = {"GLOBALS": num_globals, "WINDOW": window}
    how = {**warps(size, width), "num_stages": 3 if size * width <= 64 * 64 else 2}

    values = (
        q, k, v, plan, grad, out, sums, delta, grad_q, drawn,
        *strides, *plan.stride()[:2], *grad_q.stride()[:2], *common,
    )  # fmt: skip
    constants = {**pattern, "PICKS": plan.shape[2], **flags}
    launch(_grad_queries, (n_blocks - first, heads, batch), values, constants, **{**how, "num_stages": 2})

    shared = delta  # stands for the sums of global blocks where there are none
    late = n_blocks - max(window, first)
    if num_globals and late > 0:
        parts = min(-(-late // PART_BLOCKS), MOST_PARTS)
        partial = q.new_empty(2, parts, batch, num_globals * size, groups, width, dtype=torch.float32)
        values = (q, k, v, grad, sums, delta, partial, drawn, *strides, *common, n_blocks, groups)
        launch(_grad_globals, (parts, groups * num_globals, batch), values, {**pattern, **flags}, **how)
        shared = partial.sum(1)

    values = (
        q, k, v, readers, ends, grad, sums, delta, shared, grad_k, grad_v, drawn,
        *strides, readers.stride(0), ends.stride(0), *grad_k.stride()[:2], *grad_v.stride()[:2],
        *common, n_blocks, capacity,
    )  # fmt: skip
    constants = {**pattern, "SHARED": shared is not delta, **flags}
    launch(_grad_keys, (-(-capacity // size), groups, batch), values, constants, **how)
    return grads


@triton.jit
def _grad_queries(
    queries, keys, values, plan, grad, out, sums, delta, grad_q, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    plan_head, plan_block, dq_batch, dq_token, first, start, length, tokens, group, scale, dropout, plain_scale,
    GLOBALS: tl.constexpr, WINDOW: tl.constexpr, PICKS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of a query block; leaves delta = rowsum(grad * out) for the other kernels."""
    block = first + tl.num_programs(0) - 1 - tl.program_id(0)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    inside = tl.arange(0, SIZE)
    rows = block * SIZE + inside
    there = (rows >= start) & (rows < length)
    at = block * SIZE - start
    q = load_rows(queries + item * q_batch + head * q_head, at, q_token, there, SIZE, K, True)
    above = load_rows(grad + item * g_batch + head * g_head, at, g_token, there, SIZE, K, True)
    given = load_rows(out + (item * tokens * heads + head) * K, at, heads * K, there, SIZE, K, True)
    line = (item * heads + head) * tokens - start
    total = tl.load(sums + line + rows, mask=there, other=0.0) * LOG2
    product = tl.sum(above.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + line + rows, product, mask=there)
    keys += item * k_batch + (head // group) * k_head
    values += item * v_batch + (head // group) * v_head
    plan += head * plan_head + tl.cast(block, tl.int64) * plan_block
    lane = (item * heads + head).to(tl.int32)
    lift = 1.0 / (1.0 - dropout)
    let = True
    if DROPOUT:
        seed = tl.load(seed)
        let = kept(seed, lane, rows[:, None], rows[None, :], dropout)

    k = load_rows(keys, block * SIZE, k_token, rows < length, SIZE, K, True)
    v = load_rows(values, block * SIZE, v_token, rows < length, SIZE, K, True)
    lower = inside[:, None] >= inside[None, :]
    acc = tl.zeros((SIZE, K), tl.float32)
    acc = add_to_queries(q, k, v, above, total, product, lower, let, scale, lift, acc, True, DROPOUT)
    # A hole in a list reads block 0, and hides it: the first block, which may be cut off, has nothing else.
    for entry in range(tl.where(block > 0, GLOBALS + PICKS + WINDOW - 1, 0)):
        listed = nth_of_list(plan, block, entry, GLOBALS, PICKS, WINDOW)
        at_keys = tl.maximum(listed, 0) * SIZE
        k = load_rows(keys, at_keys, k_token, there, SIZE, K, False)
        v = load_rows(values, at_keys, v_token, there, SIZE, K, False)
        if DROPOUT:
            let = kept(seed, lane, rows[:, None], at_keys + inside[None, :], dropout)
        acc = add_to_queries(q, k, v, above, total, product, listed >= 0, let, scale, lift, acc, True, DROPOUT)
    store_rows(grad_q + item * dq_batch + head * K, at, dq_token, there, acc * plain_scale, SIZE, K)


@triton.jit
def _grad_keys(
    queries, keys, values, readers, ends, grad, sums, delta, shared, grad_k, grad_v, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    readers_head, ends_head, dk_batch, dk_token, dv_batch, dv_token,
    first, start, length, tokens, group, scale, dropout, plain_scale, n_blocks, capacity,
    GLOBALS: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of a key block and its values. Early blocks have been drawn most often, and start first."""
    block = tl.program_id(0)
    narrow, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups, batch = tl.num_programs(1), tl.num_programs(2)
    inside = tl.arange(0, SIZE)
    columns = block * SIZE + inside
    there = columns < length
    k = load_rows(keys + item * k_batch + narrow * k_head, block * SIZE, k_token, there, SIZE, K, True)
    v = load_rows(values + item * v_batch + narrow * v_head, block * SIZE, v_token, there, SIZE, K, True)
    if DROPOUT:
        seed = tl.load(seed)
    acc_k = tl.zeros((SIZE, K), tl.float32)
    acc_v = tl.zeros((SIZE, K), tl.float32)
    if SHARED:
        summed = shared + (item * GLOBALS * SIZE * groups + narrow) * K
        of_global = (columns < GLOBALS * SIZE) & there
        acc_k += load_rows(summed, block * SIZE, groups * K, of_global, SIZE, K, True)
        summed += tl.cast(batch, tl.int64) * GLOBALS * SIZE * groups * K
        acc_v += load_rows(summed, block * SIZE, groups * K, of_global, SIZE, K, True)
    # First the window's readers, the block itself and those right behind it, then those that have drawn it; one loop
    # waits less for memory than two.
    near = tl.maximum(block, first)
    last = tl.maximum(tl.minimum(block + WINDOW, n_blocks), near)
    for member in range(group):
        head = narrow * group + member
        lane = (item * groups * group + head).to(tl.int32)
        of_head = queries + item * q_batch + head * q_head - tl.cast(start, tl.int64) * q_token
        of_grad = grad + item * g_batch + head * g_head - tl.cast(start, tl.int64) * g_token
        line = (item * groups * group + head) * tokens - start
        known = tl.minimum(block, n_blocks - 1)
        begin = tl.load(ends + head * ends_head + known)
        drawn = tl.where(block < n_blocks, tl.load(ends + head * ends_head + known + 1) - begin, 0)
        for entry in range(near - last, drawn):
            chosen = tl.load(readers + head * readers_head + begin + entry, mask=entry >= 0, other=0)
            reader = tl.where(entry < 0, last + entry, chosen)
            acc_k, acc_v = _to_keys(
                k, v, of_head, of_grad, q_token, g_token, sums + line, delta + line, reader, block, start, length,
                reader == block, seed, lane, dropout, scale, acc_k, acc_v, SIZE, K, DROPOUT,
            )  # fmt: skip
    grad_k += item * dk_batch + narrow * K
    grad_v += item * dv_batch + narrow * K
    store_rows(grad_k, block * SIZE, dk_token, columns < capacity, acc_k * plain_scale, SIZE, K)
    store_rows(grad_v, block * SIZE, dv_token, columns < capacity, acc_v, SIZE, K)


@triton.jit
def _to_keys(
    k, v, queries, grad, q_token, g_token, sums, delta, reader, block, start, length, hidden, seed, lane, dropout,
    scale, acc_k, acc_v, SIZE: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What query block `reader` adds to the gradients of key block `block`; queries that are not there add nothing.

    hidden: whether it is the block itself, of which each query sees a part.
    """
    inside = tl.arange(0, SIZE)
    rows = reader * SIZE + inside
    there = (rows >= start) & (rows < length)
    q = load_rows(queries, reader * SIZE, q_token, there, SIZE, K, True)
    above = load_rows(grad, reader * SIZE, g_token, there, SIZE, K, True)
    total = tl.load(sums + rows, mask=there, other=0.0) * LOG2
    product = tl.load(delta + rows, mask=there, other=0.0)
    columns = block * SIZE + inside
    p = weights_of_keys(q, k, total, scale)
    if hidden:
        p = tl.where(rows[None, :] >= columns[:, None], p, 0.0)
    let = True
    if DROPOUT:
        let = kept(seed, lane, rows[None, :], columns[:, None], dropout)
    lift = 1.0 / (1.0 - dropout)
    return add_to_keys(p, q, v, above, product, let, lift, acc_k, acc_v, DROPOUT)


@triton.jit
def _grad_globals(
    queries, keys, values, grad, sums, delta, partial, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    first, start, length, tokens, group, scale, dropout, plain_scale, n_blocks, groups,
    GLOBALS: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What one part of the query blocks behind its window adds to a global block: partial `[2, parts, B, mb, G, K]`."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    narrow, block = (tl.program_id(1) % groups).to(tl.int64), tl.program_id(1) // groups
    item, batch = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    there = block * SIZE + tl.arange(0, SIZE) < length
    k = load_rows(keys + item * k_batch + narrow * k_head, block * SIZE, k_token, there, SIZE, K, True)
    v = load_rows(values + item * v_batch + narrow * v_head, block * SIZE, v_token, there, SIZE, K, True)
    if DROPOUT:
        seed = tl.load(seed)
    earliest = tl.maximum(block + WINDOW, first)
    share = tl.cdiv(tl.maximum(n_blocks - earliest, 0), parts)
    begin = earliest + part * share
    acc_k = tl.zeros((SIZE, K), tl.float32)
    acc_v = tl.zeros((SIZE, K), tl.float32)
    for member in range(group):
        head = narrow * group + member
        lane = (item * groups * group + head).to(tl.int32)
        of_head = queries + item * q_batch + head * q_head - tl.cast(start, tl.int64) * q_token
        of_grad = grad + item * g_batch + head * g_head - tl.cast(start, tl.int64) * g_token
        line = (item * groups * group + head) * tokens - start
        for reader in range(begin, tl.minimum(begin + share, n_blocks)):
            acc_k, acc_v = _to_keys(
                k, v, of_head, of_grad, q_token, g_token, sums + line, delta + line, reader, block, start, length,
                False, seed, lane, dropout, scale, acc_k, acc_v, SIZE, K, DROPOUT,
            )  # fmt: skip
    rows = tl.arange(0, SIZE) >= 0
    target = partial + ((tl.cast(part, tl.int64) * batch + item) * GLOBALS * SIZE * groups + narrow) * K
    store_rows(target, block * SIZE, groups * K, rows, acc_k, SIZE, K)
    target += tl.cast(parts, tl.int64) * batch * GLOBALS * SIZE * groups * K
    store_rows(target, block * SIZE, groups * K, rows, acc_v, SIZE, K)
