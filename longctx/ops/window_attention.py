"""Attention over a window of recent keys, in time and memory linear in the sequence length.

Two implementations of one definition. On CUDA in half precision the windowed FlashAttention-2 that ships with torch;
everywhere else blocks of queries against the keys they can see, a few matrix products each, with a backward pass of
its own that recomputes the weights instead of keeping them.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, W window, d dilation, g globals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.errors import UsageError

# Queries taken together. More waste more on masked corners (W + block keys are computed for W seen), fewer make the
# products too small. On a CPU the scores of a block must also stay in the second-level cache.
CPU_BLOCK = 64
GPU_BLOCK = 512


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    dilation: int = 1,
    causal: bool = True,
    dropout_p: float = 0.0,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    key_offset: int = 0,
) -> Tensor:
    """q `[B, T, H, K]`, k and v `[B, S, G, K]`, S >= T -> out `[B, T, H, K]`.

    Queries are aligned with the last keys: query i sits at key S - T + i. Causal: a query at key p sees the keys
    p, p - d, ..., p - (W-1)d that exist. Otherwise S = T, and it sees distances up to (W // 2)d on both sides.

    global_k, global_v `[B, g, G, K]` (causal only): the keys at absolute positions 0 to g - 1, seen by every query
    at or after them, once. key_offset: absolute position of key 0. dropout_p: of the attention weights.

    Raises UsageError for shapes that do not fit together.
    """
    _check(q, k, v, window=window, dilation=dilation, causal=causal, global_k=global_k, global_v=global_v)
    if global_k is None or global_k.shape[1] == 0:
        return _dilated(q, k, v, None, None, window, dilation, causal, dropout_p)

    # Queries among the globals see nothing but globals; for the others the globals are keys of their own, and the
    # window stops short of them.
    first = key_offset + k.shape[1] - q.shape[1]
    known = global_k.shape[1]
    head = min(max(known - first, 0), q.shape[1])
    past = min(max(known - key_offset, 0), k.shape[1])
    parts = []
    if head:
        keys = first + head
        parts.append(
            _dilated(
                q[:, :head], global_k[:, :keys], global_v[:, :keys], None, None, keys, 1, True, dropout_p
            )
        )
    if head < q.shape[1]:
        parts.append(
            _dilated(
                q[:, head:], k[:, past:], v[:, past:], global_k, global_v, window, dilation, causal, dropout_p
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def window_attention_path(q: Tensor) -> str:
    """Which implementation `window_attention` runs for queries like `q`, in words."""
    return "flash-attention-2 window" if _flash_fits(q) else "blocked matmul window"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    dilation: int,
    causal: bool,
    global_k: Tensor | None,
    global_v: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise UsageError(f"attention needs q [B, T, H, K] and k, v [B, S, G, K], not {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise UsageError(f"queries and keys do not fit together: {_shapes(q, k, v)}")
    if not 1 <= q.shape[1] <= k.shape[1]:
        raise UsageError(f"there must be at least one query, and a key for each: {_shapes(q, k, v)}")
    if window < 1 or dilation < 1:
        raise UsageError(f"window and dilation must be at least 1, not {window} and {dilation}")
    if not causal and q.shape[1] != k.shape[1]:
        raise UsageError("without causality every key needs its query: T must equal S")
    if (global_k is None) != (global_v is None):
        raise UsageError("global keys and global values come together")
    if global_k is not None and (not causal or global_k.shape != global_v.shape):
        raise UsageError("global keys need causal=True, and values of the same shape")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _dilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    window: int,
    dilation: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    """Keys of one residue modulo d see only each other: d attentions without dilation, on views."""
    if dilation == 1:
        return _band(q, k, v, global_k, global_v, window, causal, dropout_p)
    halo = k.shape[1] - q.shape[1]
    pieces = []
    # Class r holds the queries r, r + d, ...; the last key of each class is the key of its last query.
    for r in range(min(dilation, q.shape[1])):
        queries = q[:, r::dilation]
        residue = (halo + r) % dilation
        keys = slice(residue, None, dilation)
        pieces.append(_band(queries, k[:, keys], v[:, keys], global_k, global_v, window, causal, dropout_p))
    if all(piece.shape[1] == pieces[0].shape[1] for piece in pieces):
        return torch.stack(pieces, dim=2).flatten(1, 2)
    longest = pieces[0].shape[1]
    pieces = [F.pad(piece, (0, 0, 0, 0, 0, longest - piece.shape[1])) for piece in pieces]
    return torch.stack(pieces, dim=2).flatten(1, 2)[:, : q.shape[1]]


def _band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    window: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    """Undilated window; global keys, if any, are seen by every query."""
    left, right = (window - 1, 0) if causal else (window // 2, window // 2)
    if causal:
        unseen = k.shape[1] - q.shape[1] - left
        if unseen > 0:
            k, v = k[:, unseen:], v[:, unseen:]
    tensors = (q, k, v) if global_k is None else (q, k, v, global_k, global_v)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        if q.shape[1] == 1 and not dropout_p:
            return _single(q, k, v, global_k, global_v)
        return _blocked_forward(q, k, v, global_k, global_v, left, right, dropout_p, _new_seed(dropout_p))
    return _Blocked.apply(q, k, v, global_k, global_v, left, right, dropout_p, _new_seed(dropout_p))


def _flash_fits(q: Tensor) -> bool:
    return False


def _single(q: Tensor, k: Tensor, v: Tensor, global_k: Tensor | None, global_v: Tensor | None) -> Tensor:
    """One query, which sees every key given."""
    if global_k is not None:
        k, v = torch.cat([global_k, k], dim=1), torch.cat([global_v, v], dim=1)
    group = q.shape[2] // k.shape[2]
    # The query heads of a group become query rows: no copy of keys, and no mask is needed.
    rows = q.transpose(1, 2).reshape(q.shape[0], k.shape[2], group, q.shape[3])
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(q.shape[0], 1, q.shape[2], q.shape[3])


def _new_seed(dropout_p: float) -> int:
    """Seed from which forward and backward draw the same dropout. Nothing is drawn where there is no dropout."""
    return int(torch.randint(0, 2**62, ())) if dropout_p else 0


class _Walk:
    """Blocks of queries of one `[T, H, K]` against `[S, G, K]`: their score matrices, forward and backward alike."""

    def __init__(
        self, q: Tensor, k: Tensor, left: int, right: int, global_keys: int, dropout_p: float, seed: int
    ):
        self.queries, self.heads, self.width = q.shape
        self.keys, self.groups = k.shape[:2]
        self.repeat = self.heads // self.groups
        self.left, self.right, self.global_keys = left, right, global_keys
        self.block = min(GPU_BLOCK if q.is_cuda else CPU_BLOCK, self.queries)
        self.scale = 1.0 / math.sqrt(self.width)
        hidden = q.new_full((self.block, self.block), -math.inf)
        self.too_old, self.too_new = hidden.tril(-1), hidden.triu(1)
        most = min(self.block + left + right, self.keys) + global_keys
        self.buffer = q.new_empty(self.heads * self.block * most)
        self.dropout_p = dropout_p
        self.generator: torch.Generator | None = None
        if dropout_p:
            self.generator = torch.Generator(q.device)
            self.generator.manual_seed(seed)

    def blocks(self) -> Any:
        """(first query, end of queries, first key, end of keys) of every block."""
        halo = self.keys - self.queries
        for start in range(0, self.queries, self.block):
            end = min(start + self.block, self.queries)
            yield start, end, max(0, halo + start - self.left), min(self.keys, halo + end + self.right)

    def rows(self, t: Tensor, start: int, end: int) -> Tensor:
        """Queries of a block as `[G, rows, K]`: the heads of a group below each other. A view if H = G."""
        return t[start:end].transpose(0, 1).reshape(self.groups, -1, self.width)

    def weights(
        self, rows: Tensor, k: Tensor, global_k: Tensor | None, span: tuple[int, int, int, int]
    ) -> Tensor:
        """Softmax of a block, `[G, rows, keys + g]`, in the shared buffer."""
        start, end, low, high = span
        near, size = high - low, end - start
        columns = near + self.global_keys
        scores = self.buffer[: self.heads * size * columns].view(self.groups, -1, columns)
        window = scores[:, :, :near] if self.global_keys else scores
        torch.baddbmm(window, rows, k[low:high].permute(1, 2, 0), beta=0, alpha=self.scale, out=window)
        if global_k is not None:
            far = scores[:, :, near:]
            torch.baddbmm(far, rows, global_k.permute(1, 2, 0), beta=0, alpha=self.scale, out=far)
        self.mask(scores.view(self.heads, size, columns), start, size, low, near)
        return torch.ops.aten._softmax.out(scores, -1, False, out=scores)

    def mask(self, scores: Tensor, start: int, size: int, low: int, near: int) -> None:
        """Hide the two corners of a block: only there is a key outside the window of some query."""
        first = self.keys - self.queries + start - low
        shift = first - self.left  # column c is too old for row r if c < r + shift
        if size - 1 + shift > 0:
            scores[:, :, : size - 1 + shift] += self.too_old[:size, -shift : size - 1]
        shift = first + self.right  # and too new if c > r + shift
        if near - 1 > shift:
            scores[:, :, shift + 1 : near] += self.too_new[:size, 1 : near - shift]

    def keep(self, weights: Tensor) -> Tensor | None:
        """What survives dropout, scaled; drawn in the same order by forward and backward."""
        if self.generator is None:
            return None
        kept = torch.empty_like(weights).bernoulli_(1.0 - self.dropout_p, generator=self.generator)
        return kept.div_(1.0 - self.dropout_p)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores of half precision are kept in fp32, as flash kernels do."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _blocked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_k: Tensor | None,
    global_v: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: int,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype = _compute_dtype(q.dtype)
    far = 0 if global_k is None else global_k.shape[1]
    for item in range(q.shape[0]):
        qi, ki, vi = q[item].to(dtype), k[item].to(dtype), v[item].to(dtype)
        gk = None if global_k is None else global_k[item].to(dtype)
        gv = None if global_v is None else global_v[item].to(dtype)
        walk = _Walk(qi, ki, left, right, far, dropout_p, seed + item)
        direct = walk.repeat == 1 and dtype == q.dtype
        for span in walk.blocks():
            start, end, low, high = span
            weights = walk.weights(walk.rows(qi, start, end), ki, gk, span)
            kept = walk.keep(weights)
            if kept is not None:
                weights.mul_(kept)
            target = out[item, start:end].transpose(0, 1)
            mixed = target if direct else qi.new_empty(walk.groups, weights.shape[1], walk.width)
            torch.bmm(weights[:, :, : high - low], vi[low:high].transpose(0, 1), out=mixed)
            if gv is not None:
                mixed.baddbmm_(weights[:, :, high - low :], gv.transpose(0, 1))
            if not direct:
                target.copy_(mixed.view(walk.heads, end - start, walk.width))
    return out


class _Blocked(torch.autograd.Function):
    """`_blocked_forward` with a backward that recomputes each block's weights: nothing of size T x W is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        global_k: Tensor | None,
        global_v: Tensor | None,
        left: int,
        right: int,
        dropout_p: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, global_k, global_v)
        ctx.settings = (left, right, dropout_p, seed)
        return _blocked_forward(q, k, v, global_k, global_v, left, right, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, global_k, global_v = ctx.saved_tensors
        left, right, dropout_p, seed = ctx.settings
        dtype = _compute_dtype(q.dtype)
        far = 0 if global_k is None else global_k.shape[1]
        grads = [
            None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device)
            for t in (q, k, v, global_k, global_v)
        ]
        for item in range(q.shape[0]):
            qi, ki, vi = q[item].to(dtype), k[item].to(dtype), v[item].to(dtype)
            gk = None if global_k is None else global_k[item].to(dtype)
            gv = None if global_v is None else global_v[item].to(dtype)
            dq, dk, dv, dgk, dgv = (None if t is None else t[item] for t in grads)
            upstream = grad[item].to(dtype)
            walk = _Walk(qi, ki, left, right, far, dropout_p, seed + item)
            for span in walk.blocks():
                start, end, low, high = span
                near = high - low
                rows, above = walk.rows(qi, start, end), walk.rows(upstream, start, end)
                weights = walk.weights(rows, ki, gk, span)
                kept = walk.keep(weights)
                dropped = weights if kept is None else weights * kept
                slope = torch.empty_like(weights)
                dv[low:high].transpose(0, 1).baddbmm_(dropped[:, :, :near].transpose(1, 2), above)
                torch.bmm(above, vi[low:high].permute(1, 2, 0), out=slope[:, :, :near])
                if gv is not None:
                    dgv.transpose(0, 1).baddbmm_(dropped[:, :, near:].transpose(1, 2), above)
                    torch.bmm(above, gv.permute(1, 2, 0), out=slope[:, :, near:])
                if kept is not None:
                    slope.mul_(kept)
                slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, dtype).mul_(walk.scale)
                dk[low:high].transpose(0, 1).baddbmm_(slope[:, :, :near].transpose(1, 2), rows)
                down = torch.bmm(slope[:, :, :near], ki[low:high].transpose(0, 1))
                if gk is not None:
                    dgk.transpose(0, 1).baddbmm_(slope[:, :, near:].transpose(1, 2), rows)
                    down.baddbmm_(slope[:, :, near:], gk.transpose(0, 1))
                dq[start:end].transpose(0, 1).copy_(down.view(walk.heads, end - start, walk.width))
        return tuple(None if d is None else d.to(q.dtype) for d in grads) + (None,) * 4
