"""Attention of each query block to a short list of key blocks: linear in time and memory, no T x T mask.

Letters: B batch, t queries, S keys (padded to whole blocks), H query heads, G key-value heads, K head width,
b block_size, n query blocks, L blocks in a list, r random blocks, W blocks in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from longctx.ops.block_plan import BlockPattern, visible_blocks

try:
    from longctx.ops import list_attention_kernel as kernel
    from longctx.ops import packed_attention_kernel as packed
except ImportError:  # a torch without Triton: lists are then gathered for torch's own kernels
    kernel = None

# Bound on the gathered keys and values of one slab. On a CPU they should stay in the cache.
CPU_SLAB_BYTES = 16 << 20
GPU_SLAB_BYTES = 256 << 20
# Heads times query blocks of one SDPA call: a CUDA grid has no more in this direction.
MAX_LANES = 65535
# Query blocks of one head that the direct CPU path takes at once: their scores (2 MiB at the defaults) stay
# in the cache.
CPU_RUN_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Which keys the queries of one call see.

    plan: random blocks `[H, >= n, r]`, as `draw_random_blocks` gives them. complete: query blocks from whose
    lists nothing is missing (`BlockPattern.complete`, less those with a -1 in the plan). start: position of the
    first query. length: number of keys; when causal, start + t. readers: the random blocks transposed, as
    `transposed_plan` gives them, for the gradients of the kernel; None: made when they are needed.
    """

    pattern: BlockPattern
    plan: Tensor
    complete: range
    start: int
    length: int
    readers: tuple[Tensor, Tensor] | None = None

    @property
    def n_blocks(self) -> int:
        return self.pattern.count(self.length)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Consecutive query blocks that are computed alike, from position `first` on, `rows` queries in each.

    kind: "direct" and "complete": whole blocks with complete lists, with and without the CPU's direct path.
    "partial": lists with holes, or a part of one block. "all": one block that sees every key.
    """

    first: int
    blocks: int
    rows: int
    kind: str


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, *, dropout: float = 0.0) -> Tensor:
    """q `[B, t, H, K]`, k and v `[B, G, S, K]` contiguous -> `[B, t, H, K]`, scores scaled by 1 / sqrt(K).

    S is a multiple of block_size; keys from `length` on are never seen but must be finite. dropout: probability
    that an attention weight is zeroed. Gradients are exact and recomputed, tile by tile in the kernel and slab by
    slab without it, so no list of gathered keys is kept. The pattern is that of Zaheer et al. 2020, arXiv 2007.14062.
    """
    if fused(q, k, v, sparse):
        return kernel.list_attention(q, k, v, sparse, dropout)
    return _BlockSparseAttention.apply(q, k, v, sparse, dropout)


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


class _BlockSparseAttention(torch.autograd.Function):
    """Autograd would keep every gathered list, L times the keys and values; this keeps q, k and v alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, dropout: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.sparse, ctx.dropout = sparse, dropout
        ctx.generator = _generator_state(q) if dropout else None
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for run in _runs(q, sparse, dropout):
            if run.kind == "direct":
                _attend_direct(q, k, v, sparse, run, out)
            else:
                index = _gather_index(k, sparse, run)
                attended = _attend(
                    _queries(q, sparse, run),
                    _gather(k, index, sparse),
                    _gather(v, index, sparse),
                    sparse,
                    run,
                    dropout,
                )
                _queries(out, sparse, run).copy_(attended)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        sparse, dropout = ctx.sparse, ctx.dropout
        total_type = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(k, dtype=total_type), torch.zeros_like(v, dtype=total_type)
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=bool(dropout)):
            if dropout:
                _restore_generator(q, ctx.generator)
            for run in _runs(q, sparse, dropout, direct=False):
                index = _gather_index(k, sparse, run)
                inputs = (_queries(q, sparse, run), _gather(k, index, sparse), _gather(v, index, sparse))
                with torch.enable_grad():
                    inputs = tuple(x.detach().requires_grad_() for x in inputs)
                    attended = _attend(*inputs, sparse, run, dropout)
                pieces = torch.autograd.grad(attended, inputs, _queries(grad, sparse, run))
                _queries(grad_q, sparse, run).copy_(pieces[0])
                for total, piece in zip((grad_k, grad_v), pieces[1:], strict=True):
                    rows = _block_rows(total, sparse)
                    rows.index_add_(1, index, piece.to(total_type).reshape(rows.shape[0], len(index), -1))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


# -- cutting the queries into runs -------------------------------------------------------------------------


def _runs(q: Tensor, sparse: BlockSparse, dropout: float, direct: bool = True) -> Iterator[_Run]:
    """Runs that cover the queries in order."""
    pattern, size = sparse.pattern, sparse.pattern.block_size
    direct = direct and pattern.causal and q.device.type == "cpu" and not dropout
    direct = direct and q.dtype in (torch.float32, torch.float64)
    listed = pattern.num_global_blocks + pattern.num_random_blocks + pattern.num_window_blocks
    block_bytes = 2 * q.shape[0] * q.shape[2] * listed * size * q.shape[3] * q.element_size()
    slab_bytes = CPU_SLAB_BYTES if q.device.type == "cpu" else GPU_SLAB_BYTES
    slab = max(1, min(slab_bytes // block_bytes, MAX_LANES // q.shape[2]))
    edges = (sparse.complete.start, sparse.complete.stop, pattern.inner(sparse.n_blocks)[1])
    position, stop = sparse.start, sparse.start + q.shape[1]
    while position < stop:
        block, row = divmod(position, size)
        whole = 0 if row else (stop - position) // size
        if pattern.sees_all(block, sparse.n_blocks):
            kind, whole = "all", min(whole, 1)
        elif whole and block in sparse.complete:
            kind = "direct" if direct else "complete"
        else:
            kind = "partial"
        if whole:
            blocks = min(
                whole,
                *(edge - block for edge in edges if edge > block),
                CPU_RUN_BLOCKS if kind == "direct" else slab,
            )
            run = _Run(first=position, blocks=blocks, rows=size, kind=kind)
        else:
            run = _Run(first=position, blocks=1, rows=min(size - row, stop - position), kind=kind)
        yield run
        position += run.blocks * run.rows


def _queries(x: Tensor, sparse: BlockSparse, run: _Run) -> Tensor:
    """The tokens of a run: x `[B, t, H, K]` -> a view `[B, H, blocks, rows, K]`."""
    part = x.narrow(1, run.first - sparse.start, run.blocks * run.rows)
    return part.unflatten(1, (run.blocks, run.rows)).permute(0, 3, 1, 2, 4)


# -- gathered lists: every device and dtype, and all gradients ---------------------------------------------


def _lists(sparse: BlockSparse, run: _Run) -> Tensor:
    """Key blocks of a run's query blocks, `[H, blocks, L]`, -1 for none."""
    if run.kind == "all":
        every = torch.arange(sparse.n_blocks, device=sparse.plan.device)
        return every.expand(sparse.plan.shape[0], 1, -1)
    first = run.first // sparse.pattern.block_size
    return visible_blocks(sparse.pattern, sparse.plan, first, first + run.blocks, sparse.n_blocks)


def _block_rows(x: Tensor, sparse: BlockSparse) -> Tensor:
    """`[B, G, S, K]`, contiguous -> `[B, G * S / b, b * K]`: a block is a row."""
    return x.view(x.shape[0], -1, sparse.pattern.block_size * x.shape[3])


def _gather_index(k: Tensor, sparse: BlockSparse, run: _Run) -> Tensor:
    """Rows of `_block_rows` that a run reads, `[H * blocks * L]`. A hole reads block 0, which the mask hides."""
    lists = _lists(sparse, run)
    heads, blocks_per_head = lists.shape[0], k.shape[2] // sparse.pattern.block_size
    kv_head = torch.arange(heads, device=lists.device) // (heads // k.shape[1])
    return (lists.clamp(min=0) + blocks_per_head * kv_head[:, None, None]).flatten()


def _gather(x: Tensor, index: Tensor, sparse: BlockSparse) -> Tensor:
    """Listed rows of x `[B, G, S, K]`, as `[B, len(index) * b, K]`."""
    rows = _block_rows(x, sparse)
    wide = x.device.type == "cuda" and rows.shape[-1] * x.element_size() % 8 == 0
    # Elements are moved one by one: eight bytes at a time take a quarter of the loads that bfloat16 would.
    picked = rows.view(torch.int64).index_select(1, index).view(x.dtype) if wide else rows.index_select(1, index)
    return picked.view(x.shape[0], -1, x.shape[3])


def _attend(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, run: _Run, dropout: float) -> Tensor:
    """q `[B, H, blocks, rows, K]` to the gathered k and v `[B, H * blocks * L * b, K]` -> the shape of q."""
    lanes = q.shape[1] * run.blocks
    k, v = (x.unflatten(1, (lanes, -1)) for x in (k, v))
    mask: Tensor | None = None
    if run.kind == "partial":
        mask = _mask(sparse, run).flatten(0, 1)[None]  # the fused kernels take two or four dimensions
    elif not sparse.pattern.causal:
        # A ragged last block ends these lists: leaving its tail away takes no mask.
        seen = k.shape[2] - (sparse.n_blocks * sparse.pattern.block_size - sparse.length)
        k, v = k[:, :, :seen], v[:, :, :seen]
    elif q.device.type == "cuda":
        mask = causal_lower_right(run.rows, k.shape[2])
    else:
        mask = torch.ones(run.rows, k.shape[2], dtype=torch.bool).tril(k.shape[2] - run.rows)
    out = F.scaled_dot_product_attention(q.reshape(-1, lanes, *q.shape[3:]), k, v, attn_mask=mask, dropout_p=dropout)
    return out.view(q.shape)


def _mask(sparse: BlockSparse, run: _Run) -> Tensor:
    """Which of its listed keys each query sees: bool `[H, blocks, rows, L * b]`."""
    size, lists = sparse.pattern.block_size, _lists(sparse, run)
    key = (lists[..., None] * size + torch.arange(size, device=lists.device)).flatten(2)[:, :, None]
    if not sparse.pattern.causal:
        return ((key >= 0) & (key < sparse.length)).expand(-1, -1, run.rows, -1)
    query = torch.arange(run.first, run.first + run.blocks * run.rows, device=lists.device)
    return (key >= 0) & (key <= query.view(run.blocks, run.rows, 1))


# -- the direct path of the CPU ----------------------------------------------------------------------------


def _attend_direct(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, run: _Run, out: Tensor) -> None:
    """Causal whole blocks with complete lists, head by head: three products write into one buffer of scores.

    Only the random blocks are gathered: globals are shared by all, windows are overlapping views of the keys.
    Every buffer is reused, because on a CPU fresh pages cost more than the softmax.
    """
    pattern, size, width = sparse.pattern, sparse.pattern.block_size, q.shape[3]
    first, blocks, tokens = run.first // size, run.blocks, run.blocks * size
    counts = (pattern.num_global_blocks, pattern.num_random_blocks, pattern.num_window_blocks)
    shared, picks, near = (count * size for count in counts)

    # bmm writes in one go into whole tensors only, so a product goes through a buffer into its part of the scores.
    scores = q.new_empty(blocks, size, shared + picks + near)
    _, of_picks, of_near = scores.split([shared, picks, near], dim=-1)
    flat_of_shared = scores.view(tokens, -1)[:, :shared]
    product = q.new_empty(tokens * max(picks, near))
    to_picks = product[: tokens * picks].view(blocks, size, picks)
    to_near = product[: tokens * near].view(blocks, size, near)
    gathered = q.new_empty(blocks * pattern.num_random_blocks, size * width)
    chosen = gathered.view(blocks, picks, width)
    chosen_t = chosen.transpose(1, 2)
    diagonal = torch.full((size, near), float("-inf"), dtype=q.dtype).triu(near - size + 1)

    # The views of all heads are cut here: cutting them one by one in the loop would cost as much as a product.
    scaled, attended = (q.new_empty(q.shape[0] * q.shape[2], blocks, size, width) for _ in range(2))
    torch.mul(_queries(q, sparse, run), width**-0.5, out=scaled.view(q.shape[0], -1, *scaled.shape[1:]))
    indices = sparse.plan[:, first : first + blocks].flatten(1).unbind() * q.shape[0]
    keys, values = (_HeadViews.cut(x, pattern, run, group=q.shape[2] // k.shape[1]) for x in (k, v))
    for head, (query, result, index) in enumerate(zip(scaled.unbind(), attended.unbind(), indices, strict=True)):
        if shared:
            torch.mm(query.view(tokens, width), keys.shared[head].t(), out=flat_of_shared)
        if picks:
            torch.index_select(keys.rows[head], 0, index, out=gathered)
            torch.bmm(query, chosen_t, out=to_picks)
            of_picks.copy_(to_picks)
        torch.bmm(query, keys.windows[head].transpose(1, 2), out=to_near)
        torch.add(to_near, diagonal, out=of_near)
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(of_near, values.windows[head], out=result)
        if picks:
            torch.index_select(values.rows[head], 0, index, out=gathered)
            result.baddbmm_(of_picks, chosen)
        if shared:
            result.view(tokens, width).addmm_(flat_of_shared, values.shared[head])
    _queries(out, sparse, run).copy_(attended.unflatten(0, (q.shape[0], q.shape[2])))


@dataclass(frozen=True, kw_only=True)
class _HeadViews:
    """Keys or values of a run as the query heads read them, one view each, batch after batch.

    shared: globals `[n * b, K]`. rows: a block a row, `[S / b, b * K]`. windows: overlapping, `[blocks, W * b, K]`.
    """

    shared: list[Tensor]
    rows: list[Tensor]
    windows: list[Tensor]

    @classmethod
    def cut(cls, x: Tensor, pattern: BlockPattern, run: _Run, *, group: int) -> _HeadViews:
        x, size, width = x.flatten(0, 1), pattern.block_size, x.shape[3]
        oldest = run.first - (pattern.num_window_blocks - 1) * size
        shape = (x.shape[0], run.blocks, pattern.num_window_blocks * size, width)
        windows = x.as_strided(shape, (x.stride(0), size * width, width, 1), x.storage_offset() + oldest * width)
        views = (x[:, : pattern.num_global_blocks * size], x.view(x.shape[0], -1, size * width), windows)
        shared, rows, windows = ([head for head in view.unbind() for _ in range(group)] for view in views)
        return cls(shared=shared, rows=rows, windows=windows)


# -- dropout must draw the same weights again in the backward pass -----------------------------------------


def _generator_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()


def _restore_generator(x: Tensor, state: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.set_rng_state(state, x.device)
    else:
        torch.set_rng_state(state)
