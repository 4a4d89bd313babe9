"""Window and list attention of a whole projection, queries, keys and values in one tensor, and its gradient in one.

Autograd would join the gradients of views of a projection by filling and adding tensors of its size, which at a
million tokens takes longer than the kernels themselves. The kernels are those of `window_attention_kernel` and
`list_attention_kernel`; here they write where the gradient of the projection is to be.

Letters: B batch, T tokens, H query heads, G key-value heads, K head width, g global tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longctx.ops import list_attention_kernel as lists
from longctx.ops import window_attention_kernel as window
from longctx.ops.block_plan import transposed_plan
from longctx.ops.list_attention_gradients import run_backward as lists_backward
from longctx.ops.window_attention_gradients import run_backward as window_backward

if TYPE_CHECKING:
    from longctx.ops.block_sparse_attention import BlockSparse


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
    return torch.ops.longctx.packed_window_attention.default(qkv, rows, heads, left, right, dropout_p, seed)[0]


def packed_lists(qkv: Tensor, heads: int, sparse: BlockSparse, dropout: float = 0.0) -> Tensor:
    """qkv `[B, T, H + 2G, K]` -> `[B, T, H, K]`: `list_attention` of a sequence from its start. Differentiable."""
    pattern = sparse.pattern
    seed = torch.randint(1 << 62, (1,), device=qkv.device) if dropout else None
    numbers = (heads, pattern.num_global_blocks, pattern.num_window_blocks, pattern.block_size)
    plans = (sparse.plan, *(sparse.readers or transposed_plan(sparse.plan, sparse.n_blocks)))
    return torch.ops.longctx.packed_list_attention.default(qkv, *plans, *numbers, dropout, seed)[0]


# -- windows ---------------------------------------------------------------------------------------------------

_WINDOW_INPUTS = "Tensor qkv, Tensor? rows, SymInt heads, SymInt left, SymInt right, float dropout_p, Tensor? seed"


def _behind(qkv: Tensor, heads: int, head: int) -> list[Tensor | None]:
    """(q, k, v, global_k, global_v): the first `head` tokens are globals, None if there are none."""
    q, k, v = split(qkv, heads)
    near = [t[:, head:] for t in (q, k, v)]
    return [*near, k[:, :head], v[:, :head]] if head else [*near, None, None]


def _empty(qkv: Tensor, heads: int, head: int = 0) -> tuple[Tensor, Tensor]:
    batch, tokens, _, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, width)
    return out, qkv.new_empty(batch, heads, tokens - head, dtype=torch.float32)


@torch.library.custom_op(
    "longctx::packed_window_attention", mutates_args=(), schema=f"({_WINDOW_INPUTS}) -> (Tensor, Tensor)"
)
def _window(qkv, rows, heads, left, right, dropout_p, seed):
    head = 0 if rows is None else rows.shape[1]
    out, _ = _empty(qkv, heads)
    if rows is not None:
        out[:, :head] = rows
    inputs = _behind(qkv, heads, head)
    return out, window.run_forward(*inputs, left, right, dropout_p, seed, out=out[:, head:])[1]


@_window.register_fake
def _(qkv, rows, heads, left, right, dropout_p, seed):
    return _empty(qkv, heads, 0 if rows is None else rows.shape[1])


@torch.library.custom_op(
    "longctx::packed_window_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor sums, {_WINDOW_INPUTS}) -> Tensor",
)
def _window_gradient(grad, out, sums, qkv, rows, heads, left, right, dropout_p, seed):
    head = 0 if rows is None else rows.shape[1]
    target = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    target[:, :head, :heads] = 0.0
    grads = [t for t in _behind(target, heads, head) if t is not None]
    inputs = _behind(qkv, heads, head)
    window_backward(grad[:, head:], out[:, head:], sums, *inputs, left, right, dropout_p, seed, grads=grads)
    return target


@_window_gradient.register_fake
def _(grad, out, sums, qkv, *others):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep_window(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, rows, *ctx.numbers, seed = inputs
    ctx.save_for_backward(*output, qkv, rows, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_window(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *tensors, seed = ctx.saved_tensors
    of_qkv = torch.ops.longctx.packed_window_attention_backward.default(grad, *tensors, *ctx.numbers, seed)
    rows = tensors[-1]
    of_rows = None if rows is None else grad[:, : rows.shape[1]].contiguous()
    return of_qkv, of_rows, *(None,) * 5


_window.register_autograd(_differentiate_window, setup_context=_keep_window)

# -- lists -----------------------------------------------------------------------------------------------------

_LIST_INPUTS = (
    "Tensor qkv, Tensor plan, Tensor readers, Tensor ends, "
    "SymInt heads, SymInt num_globals, SymInt window, SymInt size, float dropout_p, Tensor? seed"
)


@torch.library.custom_op(
    "longctx::packed_list_attention", mutates_args=(), schema=f"({_LIST_INPUTS}) -> (Tensor, Tensor)"
)
def _list(qkv, plan, readers, ends, heads, num_globals, window, size, dropout_p, seed):
    numbers = (num_globals, window, size, 0, qkv.shape[1])
    return lists.run_forward(*split(qkv, heads), plan, *numbers, dropout_p, seed)


@_list.register_fake
def _(qkv, plan, readers, ends, heads, *others):
    return _empty(qkv, heads)


@torch.library.custom_op(
    "longctx::packed_list_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor sums, {_LIST_INPUTS}) -> Tensor",
)
def _list_gradient(grad, out, sums, qkv, plan, readers, ends, heads, num_globals, window, size, dropout_p, seed):
    target = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    tensors = (*split(qkv, heads), plan, readers, ends)
    numbers = (num_globals, window, size, 0, qkv.shape[1])
    lists_backward(grad, out, sums, *tensors, *numbers, dropout_p, seed, grads=split(target, heads))
    return target


@_list_gradient.register_fake
def _(grad, out, sums, qkv, *others):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep_lists(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, plan, readers, ends, *ctx.numbers, seed = inputs
    ctx.save_for_backward(*output, qkv, plan, readers, ends, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_lists(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *tensors, seed = ctx.saved_tensors
    of_qkv = torch.ops.longctx.packed_list_attention_backward.default(grad, *tensors, *ctx.numbers, seed)
    return of_qkv, *(None,) * 9


_list.register_autograd(_differentiate_lists, setup_context=_keep_lists)
