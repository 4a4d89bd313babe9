"""The backward pass of window attention in Triton, deterministic: what is summed is summed in a fixed order.

Queries: as the forward pass, over the keys that a tile of queries sees. Keys: over the queries that see a tile of keys,
the same band transposed, once for each query head of the group. Global keys are seen by all queries, so these are cut
in parts that are summed in fp32 and then with each other.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, g global keys.
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
from longctx.ops.window_attention_kernel import bounds, far_tile, tiles

LOG2 = tl.constexpr(LOG2_E)
# Queries of one part of the sum for global keys, and how many parts there may be.
PART_QUERIES = 1024
MOST_PARTS = 128


def run_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: Tensor | None,
    *,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """Gradients of q, k, v and, if there are globals, of theirs. grad, out `[B, T, H, K]`, sums `[B, H, line]`.

    grads: where to write them, heads behind each other; None: new memory.
    """
    batch, tokens, heads, width = q.shape
    count, groups = k.shape[1:3]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    if grads is None:
        inputs = (q, k, v) if global_k is None else (q, k, v, global_k, global_v)
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    delta = torch.empty_like(sums)
    far_k, far_v = (k, v) if global_k is None else (global_k, global_v)
    far = 0 if global_k is None else global_k.shape[1]
    drawn = out if seed is None else seed
    # Apart from each other, since a compiled kernel knows of 16 dividing each number that it is given.
    places = (tokens, sums.shape[2], count - tokens, far, left, right)
    common = (*places, heads // groups, width**-0.5 * LOG2_E, dropout_p, width**-0.5)
    drop = {"DROPOUT": dropout_p > 0}
    near = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    of_grad = grad.stride()[:3]

    rows, columns, warps, stages = tiles(width).queries
    values = (
        q, k, v, far_k, far_v, grad, out, sums, delta, grads[0], drawn,
        *near, *far_k.stride()[:3], *far_v.stride()[:3], *of_grad, *out.stride()[:2], *grads[0].stride()[:2], *common,
    )  # fmt: skip
    constants = {"ROWS": rows, "COLUMNS": columns, "FAR": far_tile(far), "K": width, **drop}
    grid = (-(-tokens // rows), heads, batch)
    launch(_grad_queries, grid, values, constants, num_warps=warps, num_stages=stages)

    rows, columns, warps, stages = tiles(width).keys
    values = (
        q, k, v, grad, sums, delta, grads[1], grads[2], drawn,
        *near, *of_grad, *grads[1].stride()[:2], *grads[2].stride()[:2], *common,
    )  # fmt: skip
    constants = {"ROWS": rows, "COLUMNS": columns, "K": width, **drop}
    grid = (-(-count // columns), groups, batch)
    launch(_grad_keys, grid, values, constants, num_warps=warps, num_stages=stages)

    if far:
        tile = far_tile(far)
        parts = min(-(-tokens // PART_QUERIES), MOST_PARTS)
        partial = q.new_empty(2, parts, batch, far, groups, width, dtype=torch.float32)
        values = (
            q, far_k, far_v, grad, sums, delta, partial, drawn,
            *q.stride()[:3], *far_k.stride()[:3], *far_v.stride()[:3], *of_grad, *common, groups,
        )  # fmt: skip
        constants = {"ROWS": 64, "FAR": tile, "K": width, **drop}
        grid = (parts, groups * -(-far // tile), batch)
        launch(_grad_globals, grid, values, constants, num_warps=4, num_stages=3 if width <= 64 else 2)
        for target, part in zip(grads[3:], partial.sum(1), strict=True):
            target.copy_(part)
    return grads


@triton.jit
def _grad_queries(
    queries, keys, values, far_keys, far_values, grad, out, sums, delta, grad_q, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    fk_batch, fk_token, fk_head, fv_batch, fv_token, fv_head, g_batch, g_token, g_head,
    out_batch, out_token, dq_batch, dq_token,
    tokens, line, halo, far, left, right, group, scale, dropout, plain_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAR: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; leaves delta = rowsum(grad * out) for the other kernels."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    q = load_rows(queries + item * q_batch + head * q_head, first, q_token, rows < tokens, ROWS, K, True)
    above = load_rows(grad + item * g_batch + head * g_head, first, g_token, rows < tokens, ROWS, K, True)
    given = load_rows(out + item * out_batch + head * K, first, out_token, rows < tokens, ROWS, K, True)
    of_line = (item * heads + head) * line
    total = tl.load(sums + of_line + rows, mask=rows < line, other=0.0) * LOG2
    product = tl.sum(above.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + of_line + rows, product, mask=rows < line)
    keys += item * k_batch + (head // group) * k_head
    values += item * v_batch + (head // group) * v_head
    lane = (item * heads + head).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed)
    own, count = halo + first, halo + tokens

    acc = tl.zeros((ROWS, K), tl.float32)
    low, plain, edge, high = bounds(own, left, right, 0, count, ROWS, COLUMNS)
    for start in range(low, plain, COLUMNS):
        acc = _to_queries(
            q, above, total, product, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far,
            dropout, scale, acc, ROWS, COLUMNS, K, True, DROPOUT,
        )  # fmt: skip
    for start in range(plain, edge, COLUMNS):
        acc = _to_queries(
            q, above, total, product, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far,
            dropout, scale, acc, ROWS, COLUMNS, K, False, DROPOUT,
        )  # fmt: skip
    for start in range(edge, high, COLUMNS):
        acc = _to_queries(
            q, above, total, product, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far,
            dropout, scale, acc, ROWS, COLUMNS, K, True, DROPOUT,
        )  # fmt: skip
    if FAR:
        far_keys += item * fk_batch + (head // group) * fk_head
        far_values += item * fv_batch + (head // group) * fv_head
        for start in range(0, far, FAR):
            acc = _to_queries(
                q, above, total, product, far_keys, far_values, fk_token, fv_token, start, far, own, 1 << 30, 1 << 30,
                seed, lane, 0, dropout, scale, acc, ROWS, FAR, K, True, DROPOUT,
            )  # fmt: skip
    store_rows(grad_q + item * dq_batch + head * K, first, dq_token, rows < tokens, acc * plain_scale, ROWS, K)


@triton.jit
def _to_queries(
    q, above, total, product, keys, values, k_token, v_token, start, stop, own, left, right, seed, lane, numbered,
    dropout, scale, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, COLUMNS)
    k = load_rows(keys, start, k_token, columns < stop, COLUMNS, K, MASKED)
    v = load_rows(values, start, v_token, columns < stop, COLUMNS, K, MASKED)
    places, cols = own + tl.arange(0, ROWS)[:, None], columns[None, :]
    seen, let = True, True
    if MASKED:
        seen = (cols < stop) & (places - cols <= left) & (places - cols >= -right)
    if DROPOUT:
        let = kept(seed, lane, places, cols + numbered, dropout)
    lift = 1.0 / (1.0 - dropout)
    return add_to_queries(q, k, v, above, total, product, seen, let, scale, lift, acc, MASKED, DROPOUT)


@triton.jit
def _grad_keys(
    queries, keys, values, grad, sums, delta, grad_k, grad_v, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    dk_batch, dk_token, dv_batch, dv_token,
    tokens, line, halo, far, left, right, group, scale, dropout, plain_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and their values: the queries that see it lie from `right` behind to `left` ahead."""
    first = tl.program_id(0) * COLUMNS
    count = halo + tokens
    there = first + tl.arange(0, COLUMNS) < count
    narrow, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    k = load_rows(keys + item * k_batch + narrow * k_head, first, k_token, there, COLUMNS, K, True)
    v = load_rows(values + item * v_batch + narrow * v_head, first, v_token, there, COLUMNS, K, True)
    if DROPOUT:
        seed = tl.load(seed)
    acc_k = tl.zeros((COLUMNS, K), tl.float32)
    acc_v = tl.zeros((COLUMNS, K), tl.float32)
    # One loop that masks where it has to: three of them would each wait for memory at their beginning.
    low, plain, edge, high = bounds(first, right, left, halo, count, COLUMNS, ROWS)
    for member in range(group):
        head = narrow * group + member
        # Positions of queries are counted as those of keys.
        of_head = queries + item * q_batch + head * q_head - tl.cast(halo, tl.int64) * q_token
        of_grad = grad + item * g_batch + head * g_head - tl.cast(halo, tl.int64) * g_token
        of_line = (item * groups * group + head) * line - halo
        lane = (item * groups * group + head).to(tl.int32)
        for start in range(low, high, ROWS):
            acc_k, acc_v = _to_keys(
                k, v, of_head, of_grad, q_token, g_token, sums + of_line, delta + of_line, start, count, halo + line,
                first, left, right, (start < plain) | (start >= edge), seed, lane, far, dropout, scale, acc_k, acc_v,
                ROWS, COLUMNS, K, DROPOUT,
            )  # fmt: skip
    store_rows(grad_k + item * dk_batch + narrow * K, first, dk_token, there, acc_k * plain_scale, COLUMNS, K)
    store_rows(grad_v + item * dv_batch + narrow * K, first, dv_token, there, acc_v, COLUMNS, K)


@triton.jit
def _to_keys(
    k, v, queries, grad, q_token, g_token, sums, delta, start, stop, line_end, first, left, right, hidden, seed,
    lane, numbered, dropout, scale, acc_k, acc_v,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile of queries from `start` on, none from `stop` on, added to the gradients of the keys from `first` on.

    line_end: where the line of sums ends. hidden: whether some of the queries are not there, or do not see some of the
    keys.
    """
    rows = start + tl.arange(0, ROWS)
    there = rows < stop
    q = load_rows(queries, start, q_token, there, ROWS, K, True)
    above = load_rows(grad, start, g_token, there, ROWS, K, True)
    # Read as far as the line goes, and so several at once.
    total = tl.load(sums + rows, mask=rows < line_end, other=0.0) * LOG2
    product = tl.load(delta + rows, mask=rows < line_end, other=0.0)
    places, cols = rows[None, :], first + tl.arange(0, COLUMNS)[:, None]
    p = weights_of_keys(q, k, total, scale)
    if hidden:
        p = tl.where(there[None, :] & (places - cols <= left) & (places - cols >= -right), p, 0.0)
    let = True
    if DROPOUT:
        let = kept(seed, lane, places, cols + numbered, dropout)
    lift = 1.0 / (1.0 - dropout)
    return add_to_keys(p, q, v, above, product, let, lift, acc_k, acc_v, DROPOUT)


@triton.jit
def _grad_globals(
    queries, keys, values, grad, sums, delta, partial, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    tokens, line, halo, far, left, right, group, scale, dropout, plain_scale, groups,
    ROWS: tl.constexpr, FAR: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What one part of the queries adds to the gradients of a tile of global keys: partial `[2, parts, B, g, G, K]`."""
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    narrow, first = (tl.program_id(1) % groups).to(tl.int64), tl.program_id(1) // groups * FAR
    there = first + tl.arange(0, FAR) < far
    item, batch = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    k = load_rows(keys + item * k_batch + narrow * k_head, first, k_token, there, FAR, K, True)
    v = load_rows(values + item * v_batch + narrow * v_head, first, v_token, there, FAR, K, True)
    if DROPOUT:
        seed = tl.load(seed)
    # Queries are counted by their place among the keys, as dropout does.
    count = halo + tokens
    share = tl.cdiv(tl.cdiv(tokens, ROWS), parts) * ROWS
    begin = (part * share).to(tl.int32) + halo
    acc_k = tl.zeros((FAR, K), tl.float32)
    acc_v = tl.zeros((FAR, K), tl.float32)
    for member in range(group):
        head = narrow * group + member
        of_head = queries + item * q_batch + head * q_head - tl.cast(halo, tl.int64) * q_token
        of_grad = grad + item * g_batch + head * g_head - tl.cast(halo, tl.int64) * g_token
        of_line = (item * groups * group + head) * line - halo
        lane = (item * groups * group + head).to(tl.int32)
        for start in range(begin, tl.minimum(begin + share, count), ROWS):
            acc_k, acc_v = _to_keys(
                k, v, of_head, of_grad, q_token, g_token, sums + of_line, delta + of_line, start, count, halo + line,
                first, 1 << 30, 1 << 30, True, seed, lane, 0, dropout, scale, acc_k, acc_v, ROWS, FAR, K, DROPOUT,
            )  # fmt: skip
    target = partial + ((part * batch + item) * far * groups + narrow) * K
    store_rows(target, first, groups * K, there, acc_k * plain_scale, FAR, K)
    target += tl.cast(parts, tl.int64) * batch * far * groups * K
    store_rows(target, first, groups * K, there, acc_v, FAR, K)
