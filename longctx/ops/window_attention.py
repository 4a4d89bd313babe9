"""Attention over a window of recent keys, in time and memory linear in the sequence length.

Three implementations of one definition. On CUDA in half precision Triton kernels of our own or, for heads that they do
not take and without Triton, the windowed FlashAttention-2 that ships with torch; everywhere else blocks of queries
against the keys that they can see, a few matrix products each. All recompute the weights in their backward pass.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width, W window, d dilation,
g global keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.errors import UsageError
from longctx.ops import _window_blocks as blocks
from longctx.ops import _window_flash as flash

try:
    from longctx.ops import packed_attention_kernel as packed
    from longctx.ops import window_attention_kernel as kernel
except ImportError:  # a torch without Triton
    kernel = None


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

    Queries are aligned with the last keys: query i sits at key S - T + i. Causal: a query at key p sees the
    keys p, p - d, ..., p - (W-1)d that exist. Not causal: S = T, and distances up to (W // 2)d on both sides.

    global_k, global_v `[B, g, G, K]`: the keys at absolute positions 0 to g - 1, seen by every query at or
    after them, and counted once. key_offset: absolute position of key 0; without causality at least g.
    dropout_p: dropout of the attention weights.

    Raises UsageError for shapes that do not fit together.
    """
    _check(q, k, v, window=window, dilation=dilation, causal=causal)
    if global_k is None or global_v is None or global_k.shape[1] == 0:
        return _dilated(q, k, v, None, None, window, dilation, causal, dropout_p)

    # Queries among the globals see nothing but globals. For the others the globals are keys of their own, and
    # the window stops short of them.
    known = global_k.shape[1]
    first = key_offset + k.shape[1] - q.shape[1]
    head = min(max(known - first, 0), q.shape[1])
    past = min(max(known - key_offset, 0), k.shape[1])
    if not causal and (head or past):
        raise UsageError("without causality the queries and keys must lie behind the global ones")
    parts = []
    if head:
        seen = first + head
        keys, values = global_k[:, :seen], global_v[:, :seen]
        parts.append(_dilated(q[:, :head], keys, values, None, None, seen, 1, True, dropout_p))
    if head < q.shape[1]:
        q, k, v = q[:, head:], k[:, past:], v[:, past:]
        parts.append(_dilated(q, k, v, global_k, global_v, window, dilation, causal, dropout_p))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def packed_window_attention(
    qkv: Tensor,
    *,
    n_heads: int,
    window: int,
    dilation: int = 1,
    causal: bool = True,
    dropout_p: float = 0.0,
    global_rows: Tensor | None = None,
) -> Tensor:
    """`window_attention` of a whole sequence from its projection: qkv `[B, T, H + 2G, K]` -> `[B, T, H, K]`.

    global_rows: what comes out for the first g tokens, `[B, g, H, K]`, g at most T; the others see the keys of these
    as globals. In the kernels the gradient of qkv is written as one tensor.
    """
    groups = (qkv.shape[2] - n_heads) // 2
    head = 0 if global_rows is None else global_rows.shape[1]
    if head == qkv.shape[1]:
        return global_rows
    q, k, v = qkv.split([n_heads, groups, groups], dim=2)
    if kernel is not None and dilation == 1 and kernel.fits(q, k, v):
        left, right = _reach(window, causal)
        return packed.packed_window(qkv, global_rows, n_heads, left, right, dropout_p)
    how = {"window": window, "dilation": dilation, "causal": causal, "dropout_p": dropout_p}
    if head:
        how |= {"global_k": k[:, :head], "global_v": v[:, :head], "key_offset": head}
    out = window_attention(q[:, head:], k[:, head:], v[:, head:], **how)
    return torch.cat([global_rows, out], dim=1) if head else out


def window_attention_path(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which implementation `window_attention` runs for tensors like these, with gradients or without, in words."""
    like = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    if kernel is not None and kernel.fits(like, like, like):
        return "Triton window attention"
    return "windowed flash-attention-2" if flash.fits(device, dtype, head_dim) else "blocked window products"


def _check(q: Tensor, k: Tensor, v: Tensor, *, window: int, dilation: int, causal: bool) -> None:
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
    longest = pieces[0].shape[1]  # class 0 has as many queries as any, one more than some
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
    left, right = _reach(window, causal)
    if causal:
        unseen = k.shape[1] - q.shape[1] - left
        if unseen > 0:
            k, v = k[:, unseen:], v[:, unseen:]
    tensors = (q, k, v) if global_k is None else (q, k, v, global_k, global_v)
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if q.shape[1] == 1 and causal and not dropout_p and not grads:
        return _single(q, k, v, global_k, global_v)
    if kernel is not None and all(kernel.fits(q, k, v) for k, v in _pairs(tensors)):
        return kernel.window_kernel(q, k, v, global_k, global_v, left, right, dropout_p)
    if flash.fits(q.device, q.dtype, q.shape[-1]):
        if global_k is None:
            return flash.window(q, k, v, left, right, dropout_p)
        return flash.WindowAndGlobals.apply(q, k, v, global_k, global_v, left, right, dropout_p)
    run = blocks.blocked if grads or torch.compiler.is_compiling() else blocks.blocked_forward
    return run(q, k, v, global_k, global_v, left, right, dropout_p, blocks.new_seed(dropout_p))


def _reach(window: int, causal: bool) -> tuple[int, int]:
    """How many keys behind and ahead a query sees."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


def _pairs(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys with their values, of the window and of the globals."""
    return [tensors[1:3], tensors[3:5]] if len(tensors) > 3 else [tensors[1:3]]


def _single(q: Tensor, k: Tensor, v: Tensor, global_k: Tensor | None, global_v: Tensor | None) -> Tensor:
    """One query, which sees every key given."""
    if global_k is not None:
        k, v = torch.cat([global_k, k], dim=1), torch.cat([global_v, v], dim=1)
    group = q.shape[2] // k.shape[2]
    # The query heads of a group become query rows: no copy of keys, and no mask is needed.
    rows = q.transpose(1, 2).reshape(q.shape[0], k.shape[2], group, q.shape[3])
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(q.shape[0], 1, q.shape[2], q.shape[3])
