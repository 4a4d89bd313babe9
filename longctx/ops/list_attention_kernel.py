"""Attention of each query block to its list of key blocks in Triton: causal, one kernel forward, two or three backward.

A program of the forward pass takes one query block of one head and walks over its list: the diagonal block first, so
that no row is ever without a key, then globals, random blocks and the rest of the window. Nothing is gathered and no
list is written out: globals and window follow from the block's number, random blocks are read from the plan. The
backward pass is in `list_attention_gradients`; both are one operator of torch, `torch.ops.longctx.list_attention`.

Letters: B batch, t queries, S keys, H query heads, G key-value heads, K head width, b block_size, r random blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.attention_tile import LN_2, LOG2_E, add, kept, load_rows, store_rows
from longctx.ops.block_plan import BlockSparse, transposed_plan
from longctx.ops.launch import capability, launch, shared_memory
from longctx.ops.operators import differentiable
from longctx.ops.window_attention_kernel import MOST_STRIDE


def fits(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse) -> bool:
    """Whether the kernels can do these queries, with gradients and dropout or without; k, v `[B, G, S, K]`."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and sparse.pattern.causal
        and sparse.pattern.block_size in (16, 32, 64, 128)
        # Four of them lie in shared memory in the backward pass, of which small cards have 99 KiB.
        and (sparse.pattern.block_size * q.shape[3] < 128 * 128 or shared_memory(q.device) >= 130 << 10)
        and q.shape[3] in (16, 32, 64, 128)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and max(q.stride(1), k.stride(2), v.stride(2)) < MOST_STRIDE
        and capability(q.device) >= (8, 0)
    )


def list_attention(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, dropout: float = 0.0) -> Tensor:
    """q `[B, t, H, K]`, k and v `[B, G, S >= length, K]` -> `[B, t, H, K]`, as `block_sparse_attention` does.

    dropout: of the attention weights, drawn from torch's generator of the device. Differentiable.
    """
    pattern, plan = sparse.pattern, sparse.plan
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    seed = torch.randint(1 << 62, (1,), device=q.device) if dropout else None
    numbers = (pattern.num_global_blocks, pattern.num_window_blocks, pattern.block_size, sparse.start, sparse.length)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
        readers, ends = sparse.readers or transposed_plan(plan, sparse.n_blocks)
        return _list_attention(q, k, v, plan, readers, ends, *numbers, dropout, seed)[0]
    # Without autograd the bookkeeping would only cost time, and the sums are not needed.
    return run_forward(q, k, v, plan, *numbers, dropout, seed, keep_sums=False)[0]


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_globals: int,
    window: int,
    size: int,
    start: int,
    length: int,
    dropout_p: float,
    seed: Tensor | None,
    *,
    keep_sums: bool = True,
) -> tuple[Tensor, Tensor]:
    """k, v `[B, S, G, K]` -> (out `[B, t, H, K]`, log-sum-exp `[B, H, t]` in fp32, empty unless keep_sums)."""
    batch, tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = q.new_empty((batch, heads, tokens) if keep_sums else (0,), dtype=torch.float32)
    first = start // size
    values = (
        q, k, v, plan, out, sums, out if seed is None else seed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plan.stride()[:2],
        first, start, length, tokens, heads // k.shape[2], width**-0.5 * LOG2_E, dropout_p,
    )  # fmt: skip
    constants = {"GLOBALS": num_globals, "WINDOW": window, "PICKS": plan.shape[2], "SIZE": size, "K": width}
    constants |= {"SUMS": keep_sums, "DROPOUT": dropout_p > 0}
    launch(_list, (-(-length // size) - first, heads, batch), values, constants, **warps(size, width), num_stages=2)
    return out, sums


def warps(size: int, width: int) -> dict[str, int]:
    """For blocks of `size` tokens."""
    return {"num_warps": 4 if size * width <= 64 * 64 else 8}


@triton.jit
def _list(
    queries, keys, values, plan, out, sums, seed,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, plan_head, plan_block,
    first, start, length, tokens, group, scale, dropout,
    GLOBALS: tl.constexpr, WINDOW: tl.constexpr, PICKS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    # The last blocks have full lists, the first ones short ones: long work starts first.
    block = first + tl.num_programs(0) - 1 - tl.program_id(0)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    inside = tl.arange(0, SIZE)
    rows = block * SIZE + inside
    there = (rows >= start) & (rows < length)
    # Queries are counted from `start` on in memory, here by their position.
    q = load_rows(queries + item * q_batch + head * q_head, block * SIZE - start, q_token, there, SIZE, K, True)
    keys += item * k_batch + (head // group) * k_head
    values += item * v_batch + (head // group) * v_head
    plan += head * plan_head + tl.cast(block, tl.int64) * plan_block
    lane = (item * heads + head).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed)

    k = load_rows(keys, block * SIZE, k_token, rows < length, SIZE, K, True)
    v = load_rows(values, block * SIZE, v_token, rows < length, SIZE, K, True)
    top = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    acc = tl.zeros((SIZE, K), tl.float32)
    let = True
    if DROPOUT:
        let = kept(seed, lane, rows[:, None], rows[None, :], dropout)
    lower = inside[:, None] >= inside[None, :]
    top, total, acc = add(q, k, v, lower, let, scale, top, total, acc, True, DROPOUT)
    # A hole in a list reads block 0, and hides it: the first block, which may be cut off, has nothing else.
    for entry in range(tl.where(block > 0, GLOBALS + PICKS + WINDOW - 1, 0)):
        listed = nth_of_list(plan, block, entry, GLOBALS, PICKS, WINDOW)
        at = tl.maximum(listed, 0) * SIZE
        k = load_rows(keys, at, k_token, there, SIZE, K, False)
        v = load_rows(values, at, v_token, there, SIZE, K, False)
        if DROPOUT:
            let = kept(seed, lane, rows[:, None], at + inside[None, :], dropout)
        top, total, acc = add(q, k, v, listed >= 0, let, scale, top, total, acc, True, DROPOUT)
    lift = 1.0 / (1.0 - dropout) if DROPOUT else 1.0
    target = out + (item * tokens * heads + head) * K
    store_rows(target, block * SIZE - start, heads * K, there, acc * (lift / total)[:, None], SIZE, K)
    if SUMS:
        line = (item * heads + head) * tokens - start
        tl.store(sums + line + rows, (top + tl.log2(total)) * LN_2, mask=there)


@triton.jit
def nth_of_list(plan, block, entry, GLOBALS: tl.constexpr, PICKS: tl.constexpr, WINDOW: tl.constexpr):
    """The key block that comes at `entry` in a query block's list, itself left out; negative for none."""
    oldest = block - WINDOW + 1
    pick = entry - GLOBALS
    drawn = (pick >= 0) & (pick < PICKS)
    chosen = tl.load(plan + pick, mask=drawn, other=-1).to(tl.int32)
    # A global block inside the window is the window's.
    shared = tl.where(entry < oldest, entry, -1)
    return tl.where(entry < GLOBALS, shared, tl.where(drawn, chosen, oldest + pick - PICKS))


# -- one operation of torch ------------------------------------------------------------------------------------


def _forward(
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
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, plan, num_globals, window, size, start, length, dropout_p, seed)


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    from longctx.ops.list_attention_gradients import run_backward

    numbers = (num_globals, window, size, start, length, dropout_p)
    return run_backward(grad, out, sums, q, k, v, plan, readers, ends, *numbers, seed)


def _shapes(q, k, v, plan, readers, ends, num_globals, window, size, start, length, dropout_p, seed):
    sums = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


def _backward_shapes(grad, out, sums, q, k, v, *others):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.globals, ctx.window, ctx.size, ctx.start, ctx.length, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*output, *tensors, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *tensors, seed = ctx.saved_tensors
    numbers = (ctx.globals, ctx.window, ctx.size, ctx.start, ctx.length, ctx.dropout_p)
    return (*run(grad, *tensors, *numbers, seed), *(None,) * 10)


_list_attention = differentiable(
    "list_attention",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
