"""Lists of key blocks for torch's own kernels: gathered, slab by slab, on every device and in every dtype.

Letters: B batch, t queries, S keys (padded to whole blocks), H query heads, G key-value heads, K head width,
b block_size, n query blocks, L blocks in a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from longctx.ops.block_plan import BlockSparse, visible_blocks
from longctx.ops.precision import wide_dtype

# Bound on the gathered keys and values of one slab. On a CPU they should stay in the cache.
CPU_SLAB_BYTES = 16 << 20
GPU_SLAB_BYTES = 256 << 20
# Heads times query blocks of one SDPA call: a CUDA grid has no more in this direction.
MAX_LANES = 65535
# Query blocks of one head that the direct CPU path takes at once: their scores (2 MiB at the defaults) stay
# in the cache.
CPU_RUN_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive query blocks that are computed alike, from position `first` on, `rows` queries in each.

    kind: "direct" and "complete": whole blocks with complete lists, with and without the CPU's direct path.
    "partial": lists with holes, or a part of one block. "all": one block that sees every key.
    """

    first: int
    blocks: int
    rows: int
    kind: str


# -- cutting the queries into runs -------------------------------------------------------------------------


def runs(q: Tensor, sparse: BlockSparse, dropout: float, *, backward: bool = False) -> Iterator[Run]:
    """Runs that cover the queries in order, in each as many blocks as `attend`, or its backward, should take."""
    pattern, size = sparse.pattern, sparse.pattern.block_size
    direct = pattern.causal and q.device.type == "cpu" and not dropout and not backward
    direct = direct and q.dtype in (torch.float32, torch.float64)
    listed = pattern.num_global_blocks + pattern.num_random_blocks + pattern.num_window_blocks
    lanes, wide = q.shape[0] * q.shape[2], max(4, q.element_size())
    # Of a key in a list: itself and its value, gathered, and their gradients; of a query beside it: weights, what
    # dropout leaves of them, their gradients.
    key_bytes = 2 * q.shape[3] * (q.element_size() + (wide if backward else 0))
    pair_bytes = wide * ((2 if backward else 0) + (3 if dropout else 0))
    slab_bytes = CPU_SLAB_BYTES if q.device.type == "cpu" else GPU_SLAB_BYTES
    block_bytes = lanes * listed * size * (key_bytes + size * pair_bytes)
    slab = max(1, min(slab_bytes // block_bytes, MAX_LANES // lanes))
    all_rows = max(1, slab_bytes // max(1, lanes * sparse.length * pair_bytes))
    edges = (sparse.complete.start, sparse.complete.stop, pattern.inner(sparse.n_blocks)[1])
    position, stop = sparse.start, sparse.start + q.shape[1]
    while position < stop:
        block, row = divmod(position, size)
        whole = 0 if row else (stop - position) // size
        rows = min(size - row, stop - position)
        if pattern.sees_all(block, sparse.n_blocks):
            run = Run(first=position, blocks=1, rows=min(rows, all_rows), kind="all")
        elif whole:
            kind = ("direct" if direct else "complete") if block in sparse.complete else "partial"
            most = CPU_RUN_BLOCKS if kind == "direct" else slab
            blocks = min(whole, *(edge - block for edge in edges if edge > block), most)
            run = Run(first=position, blocks=blocks, rows=size, kind=kind)
        else:
            run = Run(first=position, blocks=1, rows=rows, kind="partial")
        yield run
        position += run.blocks * run.rows


def queries(x: Tensor, sparse: BlockSparse, run: Run) -> Tensor:
    """The tokens of a run: x `[B, t, H, K]` -> a view `[B, H, blocks, rows, K]`."""
    part = x.narrow(1, run.first - sparse.start, run.blocks * run.rows)
    return part.unflatten(1, (run.blocks, run.rows)).permute(0, 3, 1, 2, 4)


# -- gathering ---------------------------------------------------------------------------------------------


def _key_blocks(sparse: BlockSparse, run: Run) -> Tensor:
    """Key blocks of a run's query blocks, `[H, blocks, L]`, -1 for none."""
    if run.kind == "all":
        every = torch.arange(sparse.n_blocks, device=sparse.plan.device)
        return every.expand(sparse.plan.shape[0], 1, -1)
    first = run.first // sparse.pattern.block_size
    return visible_blocks(sparse.pattern, sparse.plan, first, first + run.blocks, sparse.n_blocks)


def block_rows(x: Tensor, sparse: BlockSparse) -> Tensor:
    """`[B, G, S, K]`, contiguous -> `[B, G * S / b, b * K]`: a block is a row."""
    return x.view(x.shape[0], -1, sparse.pattern.block_size * x.shape[3])


def gather_index(k: Tensor, sparse: BlockSparse, run: Run) -> Tensor:
    """Rows of `block_rows` that a run reads, `[H * blocks * L]`. A hole reads block 0, which the mask hides."""
    lists = _key_blocks(sparse, run)
    heads, blocks_per_head = lists.shape[0], k.shape[2] // sparse.pattern.block_size
    kv_head = torch.arange(heads, device=lists.device) // (heads // k.shape[1])
    return (lists.clamp(min=0) + blocks_per_head * kv_head[:, None, None]).flatten()


def gather(x: Tensor, index: Tensor, sparse: BlockSparse) -> Tensor:
    """Listed rows of x `[B, G, S, K]`, as `[B, len(index) * b, K]`."""
    rows = block_rows(x, sparse)
    wide = x.device.type == "cuda" and rows.shape[-1] * x.element_size() % 8 == 0
    # Elements are moved one by one: eight bytes at a time take a quarter of the loads that bfloat16 would.
    picked = rows.view(torch.int64).index_select(1, index).view(x.dtype) if wide else rows.index_select(1, index)
    return picked.view(x.shape[0], -1, x.shape[3])


# -- attending ---------------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, run: Run, dropout: float, generator: torch.Generator | None
) -> Tensor:
    """q `[B, H, blocks, rows, K]` to the gathered k and v `[B, H * blocks * L * b, K]` -> the shape of q."""
    flat, k, v = _by_lanes(q, k, v, sparse, run)
    if dropout:
        weights = _weights(flat, k, _mask(sparse, run, k.shape[2]))
        out = _product(weights * _kept(weights, dropout, generator), v).to(v.dtype)
    else:
        known = run.kind != "partial" and sparse.pattern.causal and q.device.type == "cuda"
        # The fused kernels know that one by its kind.
        mask = causal_lower_right(run.rows, k.shape[2]) if known else _mask(sparse, run, k.shape[2])
        out = F.scaled_dot_product_attention(flat, k, v, attn_mask=mask)
    return out.view(q.shape)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: BlockSparse,
    run: Run,
    dropout: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what `attend` takes, given that of its result, in the same shapes, in fp32 at least.

    Written out: within an operator autograd is off, and torch's fused kernels for this are not public.
    """
    shapes, scale = (q.shape, k.shape, v.shape), q.shape[-1] ** -0.5
    q, k, v = _by_lanes(q, k, v, sparse, run)
    weights = _weights(q, k, _mask(sparse, run, k.shape[2]))
    grad = grad.reshape(q.shape)
    slope = _product(grad, v.transpose(-1, -2))
    dropped = weights
    if dropout:
        kept = _kept(weights, dropout, generator)
        dropped, slope = weights * kept, slope.mul_(kept)
    for_v = _product(dropped.transpose(-1, -2), grad)
    slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype).mul_(scale)
    for_q, for_k = _product(slope, k), _product(slope.transpose(-1, -2), q)
    for_k, for_v = (_as_gathered(x, shape) for x, shape in zip((for_k, for_v), shapes[1:], strict=True))
    return for_q.view(shapes[0]), for_k, for_v


def _by_lanes(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, lanes, rows, K]`, k and v `[B, lanes, keys, K]`: a lane is a block of one head's queries."""
    lanes = q.shape[1] * run.blocks
    k, v = (x.unflatten(1, (lanes, -1)) for x in (k, v))
    if run.kind != "partial" and not sparse.pattern.causal:
        # A ragged last block ends these lists: leaving its tail away takes no mask.
        seen = k.shape[2] - (sparse.n_blocks * sparse.pattern.block_size - sparse.length)
        k, v = k[:, :, :seen], v[:, :, :seen]
    return q.reshape(-1, lanes, *q.shape[3:]), k, v


def _as_gathered(x: Tensor, shape: torch.Size) -> Tensor:
    """`[B, lanes, keys, K]` as `_by_lanes` was given it, with zeros where it left a tail away."""
    keys = shape[1] // x.shape[1]
    return F.pad(x, (0, 0, 0, keys - x.shape[2])).view(shape)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scores of `_by_lanes`, `[B, lanes, rows, keys]`, in fp32 at least."""
    scores = _product(q, k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    # In place, as on a CPU fresh pages cost more than the softmax.
    return torch.softmax(scores, -1) if scores.is_cuda else torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a `[B, lanes, M, N]` @ b `[B, lanes, N, K]` in fp32 at least: weights with rows, or rows with rows."""
    if b.is_cuda and b.dtype in (torch.float16, torch.bfloat16):
        # What is summed in fp32 may be multiplied in half precision, as the fused kernels do it.
        pair = a.to(b.dtype).flatten(0, 1), b.flatten(0, 1)
        return torch.bmm(*pair, out_dtype=torch.float32).unflatten(0, b.shape[:2])
    dtype = wide_dtype(b.dtype)
    return a.to(dtype) @ b.to(dtype)


def _kept(weights: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """What dropout lets through, scaled; drawn in the same order by forward and backward."""
    return torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def _mask(sparse: BlockSparse, run: Run, keys: int) -> Tensor | None:
    """Which of its keys each query sees, to be broadcast to `[B, lanes, rows, keys]`; None for all."""
    if run.kind == "partial":
        return _mask_of_lists(sparse, run).flatten(0, 1)[None]  # the fused kernels take two or four dimensions
    if not sparse.pattern.causal:
        return None
    return torch.ones(run.rows, keys, dtype=torch.bool, device=sparse.plan.device).tril(keys - run.rows)


def _mask_of_lists(sparse: BlockSparse, run: Run) -> Tensor:
    """Which of its listed keys each query sees: bool `[H, blocks, rows, L * b]`."""
    size, lists = sparse.pattern.block_size, _key_blocks(sparse, run)
    key = (lists[..., None] * size + torch.arange(size, device=lists.device)).flatten(2)[:, :, None]
    if not sparse.pattern.causal:
        return ((key >= 0) & (key < sparse.length)).expand(-1, -1, run.rows, -1)
    query = torch.arange(run.first, run.first + run.blocks * run.rows, device=lists.device)
    return (key >= 0) & (key <= query.view(run.blocks, run.rows, 1))
