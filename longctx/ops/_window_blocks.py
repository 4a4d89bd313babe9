"""Window attention by blocks of queries: plain matrix products, any device and dtype, memory linear in T.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, g global keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.ops.operators import differentiable
from longctx.ops.precision import wide_dtype

# Queries taken together. More waste more on masked corners (W + block keys are computed for W seen), fewer
# make the products too small. On a CPU the scores of a block must also stay in the second-level cache.
CPU_BLOCK = 128
GPU_BLOCK = 512


@functools.lru_cache(maxsize=32)
def _corners(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """-inf below and above the diagonal, `[size, size]`: what hides keys at the corners of a block."""
    with torch.inference_mode(False), torch.no_grad():
        hidden = torch.full((size, size), -math.inf, dtype=dtype, device=device)
        return hidden.tril(-1), hidden.triu(1)


def new_seed(dropout_p: float) -> Tensor | None:
    """Seed from which forward and backward draw the same dropout; none is drawn where there is no dropout."""
    return torch.randint(0, 2**62, ()) if dropout_p else None


class _Walk:
    """Blocks of queries of one sequence, `[T, H, K]` against `[S, G, K]`, for forward and backward alike.

    A block's weights are one contiguous `[G, rows, columns]`: the g global keys, then the keys from the oldest
    that its first query sees to the newest that its last sees.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        global_k: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        seed: int,
    ) -> None:
        self.queries, self.heads, self.width = q.shape
        self.keys, self.groups = k.shape[:2]
        self.left, self.right, self.global_k = left, right, global_k
        self.far = 0 if global_k is None else global_k.shape[0]
        self.q, self.k = q, k
        self.block = min(GPU_BLOCK if q.is_cuda else CPU_BLOCK, self.queries)
        self.scale = 1.0 / math.sqrt(self.width)
        self.too_old, self.too_new = _corners(self.block, q.dtype, q.device)
        # Of all queries at once: for every block apart these small products would take as long as the large ones.
        self.far_scores = None if global_k is None else self._far_scores(global_k)
        most = self.far + min(self.block + left + right, self.keys)
        self.buffer = q.new_empty(self.heads * self.block * most)
        self.dropout_p = dropout_p
        self.generator: torch.Generator | None = None
        if dropout_p:
            self.generator = torch.Generator(q.device)
            self.generator.manual_seed(seed)

    def _far_scores(self, global_k: Tensor) -> Tensor:
        """Scores of the globals, `[H, T, g]`."""
        q = self.q.transpose(0, 1).unflatten(0, (self.groups, -1))
        return (q @ global_k.permute(1, 2, 0).unsqueeze(1)).flatten(0, 1).mul_(self.scale)

    def stands_in(self, low: int) -> bool:
        """Whether other keys stand in the columns of the globals, for the block whose window begins at `low`."""
        return self.global_k is not None and low >= self.far

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(first query, end of queries, first key, end of keys) of every block."""
        halo = self.keys - self.queries
        for start in range(0, self.queries, self.block):
            end = min(start + self.block, self.queries)
            yield start, end, max(0, halo + start - self.left), min(self.keys, halo + end + self.right)

    def rows(self, t: Tensor, start: int, end: int) -> Tensor:
        """Queries of a block as `[G, rows, K]`: the heads of a group below each other. A view if H = G."""
        return t[start:end].transpose(0, 1).reshape(self.groups, -1, self.width)

    def columns(self, t: Tensor, far: Tensor | None, low: int, high: int) -> Tensor:
        """Keys or values for the columns of a block, `[G, columns, K]`, as a view wherever that can be.

        Then the rows in front of the window stand in for the globals, whose columns the caller mends: to copy
        the window together with them for every block would cost as much as a matrix product.
        """
        if far is not None and low < self.far:
            return torch.cat([far, t[low:high]]).transpose(0, 1)
        return t[low - self.far : high].transpose(0, 1)

    def weights(self, rows: Tensor, start: int, end: int, low: int, high: int) -> Tensor:
        """Softmax of a block, `[G, rows, columns]`, in the shared buffer."""
        size, columns = end - start, self.far + high - low
        scores = self.buffer[: self.heads * size * columns].view(self.groups, -1, columns)
        keys = self.columns(self.k, self.global_k, low, high).transpose(1, 2)
        torch.baddbmm(scores, rows, keys, beta=0, alpha=self.scale, out=scores)
        by_head = scores.view(self.heads, size, columns)
        if self.stands_in(low):
            by_head[:, :, : self.far] = self.far_scores[:, start:end]
        self.mask(by_head[:, :, self.far :], start, low)
        if scores.is_cuda:
            return torch.softmax(scores, dim=-1)
        return torch.ops.aten._softmax.out(scores, -1, False, out=scores)

    def mask(self, scores: Tensor, start: int, low: int) -> None:
        """Hide the two corners of a block: only there is a key outside the window of some query."""
        size, near = scores.shape[1:]
        first = self.keys - self.queries + start - low
        shift = first - self.left  # column c is too old for row r if c < r + shift
        if size - 1 + shift > 0:
            scores[:, :, : size - 1 + shift] += self.too_old[:size, -shift : size - 1]
        shift = first + self.right  # and too new if c > r + shift
        if near - 1 > shift:
            scores[:, :, shift + 1 :] += self.too_new[:size, 1 : near - shift]

    def kept(self, weights: Tensor) -> Tensor | None:
        """What dropout lets through, scaled; drawn in the same order by forward and backward."""
        if self.generator is None:
            return None
        kept = torch.empty_like(weights).bernoulli_(1.0 - self.dropout_p, generator=self.generator)
        return kept.div_(1.0 - self.dropout_p)


def _item(tensors: tuple[Tensor | None, ...], item: int, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t[item].to(dtype) for t in tensors]


def blocked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """q `[B, T, H, K]` over the keys from `left` behind to `right` ahead, and all globals: `[B, T, H, K]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype, number = wide_dtype(q.dtype), 0 if seed is None else int(seed)
    for item in range(q.shape[0]):
        qi, ki, vi, gk, gv = _item((q, k, v, global_k, global_v), item, dtype)
        walk = _Walk(qi, ki, gk, left, right, dropout_p, number + item)
        # The globals' part is added for all queries at the end, before anything is rounded.
        whole = out[item] if dtype == out.dtype else torch.empty(out.shape[1:], dtype=dtype, device=out.device)
        far = None if gv is None else qi.new_zeros(walk.heads, walk.queries, walk.far)
        for start, end, low, high in walk:
            weights = walk.weights(walk.rows(qi, start, end), start, end, low, high)
            kept = walk.kept(weights)
            if kept is not None:
                weights.mul_(kept)
            if walk.stands_in(low):
                stood_in = weights.view(walk.heads, end - start, -1)[:, :, : walk.far]
                far[:, start:end] = stood_in
                stood_in.zero_()
            mixed = torch.bmm(weights, walk.columns(vi, gv, low, high))
            whole[start:end] = mixed.view(walk.heads, end - start, walk.width).transpose(0, 1)
        if far is not None:
            values = gv.transpose(0, 1).unsqueeze(1)
            whole += (far.unflatten(0, (walk.groups, -1)) @ values).flatten(0, 1).transpose(0, 1)
        if whole.dtype != out.dtype:
            out[item] = whole
    return out


def _backward(
    grad: Tensor,
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
    """Computes each block's weights again: none of them are kept."""
    given = (q, k, v, global_k, global_v)
    dtype, number = wide_dtype(grad.dtype), 0 if seed is None else int(seed)
    grads = [None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) for t in given]
    for item in range(grad.shape[0]):
        q, k, v, gk, gv = _item(given, item, dtype)
        dq, dk, dv, dgk, dgv = (None if t is None else t[item] for t in grads)
        upstream = grad[item].to(dtype)
        walk = _Walk(q, k, gk, left, right, dropout_p, number + item)
        for start, end, low, high in walk:
            rows, above = walk.rows(q, start, end), walk.rows(upstream, start, end)
            weights = walk.weights(rows, start, end, low, high)
            kept = walk.kept(weights)
            dropped = weights if kept is None else weights * kept
            slope = torch.bmm(above, walk.columns(v, gv, low, high).transpose(1, 2))
            if gv is not None:
                slope[:, :, : walk.far] = torch.bmm(above, gv.permute(1, 2, 0))
                dgv += torch.bmm(dropped[:, :, : walk.far].transpose(1, 2), above).transpose(0, 1)
            dv[low:high] += torch.bmm(dropped[:, :, walk.far :].transpose(1, 2), above).transpose(0, 1)
            if kept is not None:
                slope.mul_(kept)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, dtype).mul_(walk.scale)
            far, near = slope[:, :, : walk.far], slope[:, :, walk.far :]
            down = torch.bmm(near, k[low:high].transpose(0, 1))
            if gk is not None:
                down.baddbmm_(far, gk.transpose(0, 1))
                dgk += torch.bmm(far.transpose(1, 2), rows).transpose(0, 1)
            dk[low:high] += torch.bmm(near.transpose(1, 2), rows).transpose(0, 1)
            dq[start:end] = down.view(walk.heads, end - start, walk.width).transpose(0, 1)
    return [d.to(grad.dtype) for d in grads if d is not None]


def _shapes(q, k, v, global_k, global_v, left, right, dropout_p, seed):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _backward_shapes(grad, q, k, v, global_k, global_v, *others):
    given = [t for t in (q, k, v, global_k, global_v) if t is not None]
    return [torch.empty_like(t, dtype=grad.dtype, memory_format=torch.contiguous_format) for t in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.left, ctx.right, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _gradients(run: Callable[..., list[Tensor]], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads = run(grad, *tensors, ctx.left, ctx.right, ctx.dropout_p, seed)
    return (*grads, *(None,) * (9 - len(grads)))


blocked = differentiable(
    "blocked_window_attention",
    blocked_forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
"""`blocked_forward`, differentiable."""
