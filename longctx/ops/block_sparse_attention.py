"""Attention of each query block to a short list of key blocks: linear in time and memory, no T x T mask.

Letters: B batch, t queries, S keys (padded to whole blocks), H query heads, G key-value heads, K head width,
b block_size, n query blocks, L blocks in a list, r random blocks, W blocks in a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.ops._window_blocks import new_seed
from longctx.ops.block_plan import BlockPattern, BlockSparse
from longctx.ops.direct_lists import attend_direct
from longctx.ops.gathered_lists import attend, attend_backward, block_rows, gather, gather_index, queries, runs
from longctx.ops.operators import differentiable
from longctx.ops.precision import wide_dtype

try:
    from longctx.ops import list_attention_kernel as kernel
    from longctx.ops import packed_attention_kernel as packed
except ImportError:  # a torch without Triton: lists are then gathered for torch's own kernels
    kernel = None


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, *, dropout: float = 0.0) -> Tensor:
    """q `[B, t, H, K]`, k and v `[B, G, S, K]` contiguous -> `[B, t, H, K]`, scores scaled by 1 / sqrt(K).

    S is a multiple of block_size; keys from `length` on are never seen but must be finite. dropout: probability
    that an attention weight is zeroed. Gradients are exact and recomputed, tile by tile in the kernel and slab by
    slab without it, so no list of gathered keys is kept. The pattern is that of Zaheer et al. 2020, arXiv 2007.14062.
    """
    if fused(q, k, v, sparse):
        return kernel.list_attention(q, k, v, sparse, dropout)
    return _listed(q, k, v, sparse.plan, _numbers(sparse), float(dropout), new_seed(dropout))


def packed_block_sparse_attention(qkv: Tensor, n_heads: int, sparse: BlockSparse, *, dropout: float = 0.0) -> Tensor:
    """The same for a whole sequence from its projection: qkv `[B, T, H + 2G, K]` -> `[B, T, H, K]`.

    Only where `fused` says so of its parts. The gradient of qkv is written as one tensor.
    """
    return packed.packed_lists(qkv, n_heads, sparse, dropout)


def fused(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse) -> bool:
    """Whether the fused kernels do the work, gradients and dropout included.

    They also take keys and values that are not contiguous, and no more of them than `length`.
    """
    return kernel is not None and kernel.fits(q, k, v, sparse)


def kernel_fits(pattern: BlockPattern, like: Tensor, head_dim: int) -> bool:
    """Whether the fused kernels do the work, gradients included, on the device and in the dtype of `like`."""
    q = like.new_empty(1, 1, 1, head_dim)
    plan = torch.empty(1, 1, pattern.num_random_blocks, dtype=torch.int64, device=like.device)
    return fused(q, q, q, BlockSparse(pattern=pattern, plan=plan, complete=range(0), start=0, length=1))


# -- the operator ------------------------------------------------------------------------------------------
#
# Autograd would keep every gathered list, L times the keys and values; this keeps q, k and v alone.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    numbers: Sequence[int],
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """As `block_sparse_attention`. numbers: as `_numbers` gives them. seed: of dropout."""
    sparse = _sparse(plan, numbers)
    k, v = k.contiguous(), v.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    generator = _generator(q, seed)
    for run in runs(q, sparse, dropout):
        if run.kind == "direct":
            attend_direct(q, k, v, sparse, run, out)
            continue
        index = gather_index(k, sparse, run)
        inputs = queries(q, sparse, run), gather(k, index, sparse), gather(v, index, sparse)
        queries(out, sparse, run).copy_(attend(*inputs, sparse, run, dropout, generator))
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    numbers: Sequence[int],
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by lists that are gathered once more."""
    sparse = _sparse(plan, numbers)
    k, v = k.contiguous(), v.contiguous()
    total_type = wide_dtype(q.dtype)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = torch.zeros_like(k, dtype=total_type), torch.zeros_like(v, dtype=total_type)
    generator = _generator(q, seed)
    for run in runs(q, sparse, dropout, backward=True):
        index = gather_index(k, sparse, run)
        inputs = queries(q, sparse, run), gather(k, index, sparse), gather(v, index, sparse)
        for_q, *others = attend_backward(queries(grad, sparse, run), *inputs, sparse, run, dropout, generator)
        queries(grad_q, sparse, run).copy_(for_q)
        for total, piece in zip((grad_k, grad_v), others, strict=True):
            rows = block_rows(total, sparse)
            rows.index_add_(1, index, piece.to(total_type).reshape(rows.shape[0], len(index), -1))
    # In memory of their own, as an operator's results must be.
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _numbers(sparse: BlockSparse) -> list[int]:
    """All of it but the plan: a schema has no type for more than numbers. `_sparse` reads them."""
    pattern, complete = sparse.pattern, sparse.complete
    found = [pattern.block_size, pattern.num_window_blocks, pattern.num_global_blocks, int(pattern.causal)]
    return [*found, complete.start, complete.stop, sparse.start, sparse.length]


def _sparse(plan: Tensor, numbers: Sequence[int]) -> BlockSparse:
    size, window, num_globals, causal, complete, complete_end, start, length = numbers
    pattern = BlockPattern(
        block_size=size,
        num_window_blocks=window,
        num_random_blocks=plan.shape[2],
        num_global_blocks=num_globals,
        causal=bool(causal),
    )
    complete_blocks = range(complete, complete_end)
    return BlockSparse(pattern=pattern, plan=plan, complete=complete_blocks, start=start, length=length)


def _generator(x: Tensor, seed: Tensor | None) -> torch.Generator | None:
    """From which forward and backward draw the same dropout, whatever else draws meanwhile."""
    return None if seed is None else torch.Generator(x.device).manual_seed(int(seed))


def _shapes(q: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, plan, ctx.numbers, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, plan, seed)


def _gradients(run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    return *run(grad, *tensors, ctx.numbers, ctx.dropout, seed), None, None, None, None


_listed = differentiable(
    "block_sparse_attention",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
