"""Window and list attention of a whole projection, queries, keys and values in one tensor, and its gradient in one.

Autograd would join the gradients of views of a projection by filling and adding tensors of its size, which at a
million tokens takes longer than the kernels themselves. The kernels are those of `window_attention_kernel` and
`list_attention_kernel`; here they write where the gradient of the projection is to be.

Letters: B batch, T tokens, H query heads, G key-value heads, K head width, g global tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.ops import list_attention_kernel as lists
from longctx.ops import window_attention_kernel as window
from longctx.ops.block_plan import BlockSparse, transposed_plan
from longctx.ops.list_attention_gradients import run_backward as lists_backward
from longctx.ops.operators import differentiable
from longctx.ops.window_attention_gradients import run_backward as window_backward


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv `[B, T, H + 2G, K]` -> views q `[B, T, H, K]`, k and v `[B, T, G, K]`."""
    groups = (qkv.shape[2] - heads) // 2
    return qkv.split([heads, groups, groups], dim=2)


def packed_window(
    qkv: Tensor, rows: Tensor | None, heads: int, left: int, right: int, dropout_p: float = 0.0
) -> Tensor:
    """qkv `[B, T, H + 2G, K]` -> `[B, T, H, K]`, each token over those from `left` behind to `right` ahead.

    rows: what comes out for the first g tokens, `[B, g, H, K]`, g below T. The others see the keys of those as
    globals, and their window stops short of them. Differentiable.
    """
    seed = torch.randint(1 << 62, (1,), device=qkv.device) if dropout_p else None
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (qkv.requires_grad or rows is not None)):
        return _packed_window(qkv, rows, heads, left, right, dropout_p, seed)[0]
    return _run_window(qkv, rows, heads, left, right, dropout_p, seed, keep_sums=False)[0]


def packed_lists(qkv: Tensor, heads: int, sparse: BlockSparse, dropout: float = 0.0) -> Tensor:
    """qkv `[B, T, H + 2G, K]` -> `[B, T, H, K]`: `list_attention` of a sequence from its start. Differentiable."""
    pattern = sparse.pattern
    seed = torch.randint(1 << 62, (1,), device=qkv.device) if dropout else None
    numbers = (heads, pattern.num_global_blocks, pattern.num_window_blocks, pattern.block_size)
    plans = (sparse.plan, *(sparse.readers or transposed_plan(sparse.plan, sparse.n_blocks)))
    return _packed_lists(qkv, *plans, *numbers, dropout, seed)[0]


# -- windows ---------------------------------------------------------------------------------------------------


def _behind(qkv: Tensor, heads: int, head: int) -> list[Tensor | None]:
    """(q, k, v, global_k, global_v): the first `head` tokens are globals, None if there are none."""
    q, k, v = split(qkv, heads)
    if not head:
        return [q, k, v, None, None]
    return [*(t[:, head:] for t in (q, k, v)), k[:, :head], v[:, :head]]


def _empty(qkv: Tensor, heads: int, line: int) -> tuple[Tensor, Tensor]:
    """The output, and sums `[B, H, line]`."""
    batch, tokens, _, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, line, dtype=torch.float32)


def _window_forward(
    qkv: Tensor, rows: Tensor | None, heads: int, left: int, right: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _run_window(qkv, rows, heads, left, right, dropout_p, seed, keep_sums=True)


def _run_window(
    qkv: Tensor,
    rows: Tensor | None,
    heads: int,
    left: int,
    right: int,
    dropout_p: float,
    seed: Tensor | None,
    *,
    keep_sums: bool,
) -> tuple[Tensor, Tensor]:
    head = 0 if rows is None else rows.shape[1]
    out = qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[3])
    if rows is not None:
        out[:, :head] = rows
    how = {"keep_sums": keep_sums, "out": out[:, head:] if head else out}
    return out, window.run_forward(*_behind(qkv, heads, head), left, right, dropout_p, seed, **how)[1]


def _window_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    qkv: Tensor,
    rows: Tensor | None,
    heads: int,
    left: int,
    right: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    head = 0 if rows is None else rows.shape[1]
    target = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if head:
        target[:, :head, :heads] = 0.0
        grad, out = grad[:, head:], out[:, head:]
    grads = [t for t in _behind(target, heads, head) if t is not None]
    inputs = _behind(qkv, heads, head)
    window_backward(grad, out, sums, *inputs, left, right, dropout_p, seed, grads=grads)
    return target


def _window_shapes(qkv, rows, heads, left, right, dropout_p, seed):
    return _empty(qkv, heads, window.line_of(qkv.shape[1] - (0 if rows is None else rows.shape[1])))


def _like_projection(grad, out, sums, qkv, *others):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep_window(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, rows, *ctx.numbers, seed = inputs
    ctx.save_for_backward(*output, qkv, rows, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _window_gradients(
    run: Callable[..., Tensor], ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *tensors, seed = ctx.saved_tensors
    of_qkv = run(grad, *tensors, *ctx.numbers, seed)
    rows = tensors[-1]
    of_rows = None if rows is None else grad[:, : rows.shape[1]].contiguous()
    return of_qkv, of_rows, *(None,) * 5


_packed_window = differentiable(
    "packed_window_attention",
    _window_forward,
    _window_backward,
    shapes=_window_shapes,
    backward_shapes=_like_projection,
    keep=_keep_window,
    gradients=_window_gradients,
)

# -- lists -----------------------------------------------------------------------------------------------------


def _list_forward(
    qkv: Tensor,
    plan: Tensor,
    readers: Tensor,
    ends: Tensor,
    heads: int,
    num_globals: int,
    window: int,
    size: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    numbers = (num_globals, window, size, 0, qkv.shape[1])
    return lists.run_forward(*split(qkv, heads), plan, *numbers, dropout_p, seed)


def _list_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    qkv: Tensor,
    plan: Tensor,
    readers: Tensor,
    ends: Tensor,
    heads: int,
    num_globals: int,
    window: int,
    size: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    target = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    tensors = (*split(qkv, heads), plan, readers, ends)
    numbers = (num_globals, window, size, 0, qkv.shape[1])
    lists_backward(grad, out, sums, *tensors, *numbers, dropout_p, seed, grads=split(target, heads))
    return target


def _list_shapes(qkv, plan, readers, ends, heads, *others):
    return _empty(qkv, heads, qkv.shape[1])


def _keep_lists(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, plan, readers, ends, *ctx.numbers, seed = inputs
    ctx.save_for_backward(*output, qkv, plan, readers, ends, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _list_gradients(
    run: Callable[..., Tensor], ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *tensors, seed = ctx.saved_tensors
    return run(grad, *tensors, *ctx.numbers, seed), *(None,) * 9


_packed_lists = differentiable(
    "packed_list_attention",
    _list_forward,
    _list_backward,
    shapes=_list_shapes,
    backward_shapes=_like_projection,
    keep=_keep_lists,
    gradients=_list_gradients,
)
