"""Lists of key blocks on a CPU, causal and complete: head by head, in buffers that stay in the cache.

Letters: B batch, t queries, S keys (padded to whole blocks), H query heads, G key-value heads, K head width,
b block_size, n query blocks, W blocks in a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.ops.block_plan import BlockPattern, BlockSparse
from longctx.ops.gathered_lists import Run, queries


def attend_direct(q: Tensor, k: Tensor, v: Tensor, sparse: BlockSparse, run: Run, out: Tensor) -> None:
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
    torch.mul(queries(q, sparse, run), width**-0.5, out=scaled.view(q.shape[0], -1, *scaled.shape[1:]))
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
    queries(out, sparse, run).copy_(attended.unflatten(0, (q.shape[0], q.shape[2])))


@dataclass(frozen=True, kw_only=True)
class _HeadViews:
    """Keys or values of a run as the query heads read them, one view each, batch after batch.

    shared: globals `[n * b, K]`. rows: a block a row, `[S / b, b * K]`. windows: overlapping, `[blocks, W * b, K]`.
    """

    shared: list[Tensor]
    rows: list[Tensor]
    windows: list[Tensor]

    @classmethod
    def cut(cls, x: Tensor, pattern: BlockPattern, run: Run, *, group: int) -> _HeadViews:
        x, size, width = x.flatten(0, 1), pattern.block_size, x.shape[3]
        oldest = run.first - (pattern.num_window_blocks - 1) * size
        shape = (x.shape[0], run.blocks, pattern.num_window_blocks * size, width)
        windows = x.as_strided(shape, (x.stride(0), size * width, width, 1), x.storage_offset() + oldest * width)
        views = (x[:, : pattern.num_global_blocks * size], x.view(x.shape[0], -1, size * width), windows)
        shared, rows, windows = ([head for head in view.unbind() for _ in range(group)] for view in views)
        return cls(shared=shared, rows=rows, windows=windows)
