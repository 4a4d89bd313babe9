"""Attention over a window of keys, and a few global ones, in Triton: one kernel forward, two or three backward.

A program of the forward pass takes a tile of queries of one head and walks over the keys that they see, then over the
globals; only tiles at an end of the window are masked. Queries, keys and values are read where the projection left
them. The backward pass is in `window_attention_gradients`; both are one operator of torch,
`torch.ops.longctx.window_attention`, so that autograd, compilation and checkpointing know them.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, g global keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.attention_tile import LN_2, LOG2_E, add, kept, load_rows, store_rows
from longctx.ops.launch import capability, launch
from longctx.ops.operators import differentiable

# Keys that are counted from the end of a tile's rows may not move its pointers by more than 32 bits hold.
MOST_STRIDE = (1 << 31) // 256


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries and keys of a tile, warps and pipeline stages of each kernel."""

    forward: tuple[int, int, int, int] = (64, 64, 4, 2)
    queries: tuple[int, int, int, int] = (64, 32, 4, 3)
    keys: tuple[int, int, int, int] = (32, 64, 4, 3)


NARROW = Tiles()
WIDE = Tiles(forward=(64, 64, 8, 3), queries=(64, 64, 8, 2), keys=(64, 64, 8, 2))
"""For heads wider than 64."""


def tiles(width: int) -> Tiles:
    return NARROW if width <= 64 else WIDE


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels can do these queries, with gradients and dropout or without."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] in (16, 32, 64, 128)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and max(q.stride(1), k.stride(1), v.stride(1)) < MOST_STRIDE
        and capability(q.device) >= (8, 0)
    )


def window_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    left: int,
    right: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """q `[B, T, H, K]` over the keys from `left` behind to `right` ahead, and all globals: `[B, T, H, K]`.

    k, v `[B, S, G, K]`: query i sits at key S - T + i. global_k, global_v `[B, g, G, K]` or None. dropout_p: dropout of
    the attention weights, drawn from torch's generator of the device. Differentiable.
    """
    seed = torch.randint(1 << 62, (1,), device=q.device) if dropout_p else None
    tensors = (q, k, v) if global_k is None else (q, k, v, global_k, global_v)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _window_attention(q, k, v, global_k, global_v, left, right, dropout_p, seed)[0]
    # Without autograd the bookkeeping would only cost time, and the sums are not needed.
    return run_forward(q, k, v, global_k, global_v, left, right, dropout_p, seed, keep_sums=False)[0]


def run_forward(
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
    keep_sums: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, K]`, log-sum-exp of the scores `[B, H, line]` in fp32, empty unless keep_sums).

    line: `line_of(T)`, with zeros behind the T-th. out: where to write, heads behind each other; None: new memory.
    """
    batch, tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    line = line_of(tokens)
    sums = q.new_empty((batch, heads, line) if keep_sums else (0,), dtype=torch.float32)
    far_k, far_v = (k, v) if global_k is None else (global_k, global_v)
    far = 0 if global_k is None else global_k.shape[1]
    rows, columns, warps, stages = tiles(width).forward
    values = (
        q, k, v, far_k, far_v, out, sums, out if seed is None else seed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *far_k.stride()[:3], *far_v.stride()[:3], *out.stride()[:2],
        tokens, line, k.shape[1], far, left, right, heads // k.shape[2], width**-0.5 * LOG2_E, dropout_p,
    )  # fmt: skip
    constants = {"ROWS": rows, "COLUMNS": columns, "FAR": far_tile(far), "K": width}
    constants |= {"SUMS": keep_sums, "DROPOUT": dropout_p > 0}
    launch(_window, (-(-tokens // rows), heads, batch), values, constants, num_warps=warps, num_stages=stages)
    return out, sums


def line_of(tokens: int) -> int:
    """Numbers that a line of sums has for so many queries: each begins where kernels can read several at once."""
    return -(-tokens // 16) * 16


def far_tile(far: int) -> int:
    """Columns of a tile of global keys: few for few, as all of them are computed."""
    return 0 if not far else 16 if far <= 16 else 64


@triton.jit
def bounds(own, back, ahead, begin, stop, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Where a tile of SIZE places from `own` on looks, in tiles of STEP: each place from `back` behind to `ahead`.

    Returns (low, plain, edge, high) with [low, plain) and [edge, high) partly hidden or outside [begin, stop), and
    [plain, edge), whole tiles, seen by every place.
    """
    low = tl.maximum(own - back, begin)
    high = tl.minimum(own + SIZE + ahead, stop)
    plain = low + tl.cdiv(tl.maximum(own + SIZE - 1 - back - low, 0), STEP) * STEP
    edge = plain + tl.maximum(tl.minimum(own + ahead + 1, stop) - plain, 0) // STEP * STEP
    return low, tl.minimum(plain, high), tl.minimum(edge, high), high


@triton.jit
def _window(
    queries, keys, values, far_keys, far_values, out, sums, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    fk_batch, fk_token, fk_head, fv_batch, fv_token, fv_head, out_batch, out_token,
    tokens, line, count, far, left, right, group, scale, dropout,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAR: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    q = load_rows(queries + item * q_batch + head * q_head, first, q_token, rows < tokens, ROWS, K, True)
    keys += item * k_batch + (head // group) * k_head
    values += item * v_batch + (head // group) * v_head
    lane = (item * heads + head).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed)
    # Where the queries sit among the keys.
    own = count - tokens + first

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, K), tl.float32)
    low, plain, edge, high = bounds(own, left, right, 0, count, ROWS, COLUMNS)
    for start in range(low, plain, COLUMNS):
        top, total, acc = _add(
            q, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far, dropout, scale,
            top, total, acc, ROWS, COLUMNS, K, True, DROPOUT,
        )  # fmt: skip
    for start in range(plain, edge, COLUMNS):
        top, total, acc = _add(
            q, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far, dropout, scale,
            top, total, acc, ROWS, COLUMNS, K, False, DROPOUT,
        )  # fmt: skip
    for start in range(edge, high, COLUMNS):
        top, total, acc = _add(
            q, keys, values, k_token, v_token, start, count, own, left, right, seed, lane, far, dropout, scale,
            top, total, acc, ROWS, COLUMNS, K, True, DROPOUT,
        )  # fmt: skip
    if FAR:
        far_keys += item * fk_batch + (head // group) * fk_head
        far_values += item * fv_batch + (head // group) * fv_head
        for start in range(0, far, FAR):
            # Every query sees every global: a distance that no window excludes.
            top, total, acc = _add(
                q, far_keys, far_values, fk_token, fv_token, start, far, own, 1 << 30, 1 << 30, seed, lane, 0, dropout,
                scale, top, total, acc, ROWS, FAR, K, True, DROPOUT,
            )  # fmt: skip
    lift = 1.0 / (1.0 - dropout) if DROPOUT else 1.0
    target = out + item * out_batch + head * K
    store_rows(target, first, out_token, rows < tokens, acc * (lift / total)[:, None], ROWS, K)
    if SUMS:
        sum_of_row = tl.where(rows < tokens, (top + tl.log2(total)) * LN_2, 0.0)
        tl.store(sums + (item * heads + head) * line + rows, sum_of_row, mask=rows < line)


@triton.jit
def _add(
    q, keys, values, k_token, v_token, start, stop, own, left, right, seed, lane, numbered, dropout, scale,
    top, total, acc,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile of keys from `start` on, none from `stop` on, added to what the rows have seen so far."""
    columns = start + tl.arange(0, COLUMNS)
    k = load_rows(keys, start, k_token, columns < stop, COLUMNS, K, MASKED)
    v = load_rows(values, start, v_token, columns < stop, COLUMNS, K, MASKED)
    places, cols = own + tl.arange(0, ROWS)[:, None], columns[None, :]
    seen, let = True, True
    if MASKED:
        seen = (cols < stop) & (places - cols <= left) & (places - cols >= -right)
    if DROPOUT:
        let = kept(seed, lane, places, cols + numbered, dropout)
    return add(q, k, v, seen, let, scale, top, total, acc, MASKED, DROPOUT)


# -- one operation of torch ------------------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, global_k, global_v, left, right, dropout_p, seed)


def _backward(
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
) -> list[Tensor]:
    from longctx.ops.window_attention_gradients import run_backward

    return run_backward(grad, out, sums, q, k, v, global_k, global_v, left, right, dropout_p, seed)


def _shapes(q, k, v, global_k, global_v, left, right, dropout_p, seed):
    sums = q.new_empty((q.shape[0], q.shape[2], line_of(q.shape[1])), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


def _backward_shapes(grad, out, sums, q, k, v, global_k, global_v, left, right, dropout_p, seed):
    tensors = (q, k, v) if global_k is None else (q, k, v, global_k, global_v)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, global_k, global_v, ctx.left, ctx.right, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*output, q, k, v, global_k, global_v, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., list[Tensor]], ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    *tensors, seed = ctx.saved_tensors
    grads = run(grad, *tensors, ctx.left, ctx.right, ctx.dropout_p, seed)
    return (*grads, *(None,) * (9 - len(grads)))


_window_attention = differentiable(
    "window_attention",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
