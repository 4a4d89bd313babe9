"""Full attention through fused kernels, never through a T x T matrix.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.errors import UsageError
from longctx.ops import _window_blocks as blocks
from longctx.ops import _window_flash as flash

# Fastest first. With math left out, an input that none of them takes is an error, never a silent T x T matrix.
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, dropout_p: float = 0.0) -> Tensor:
    """q `[B, T, H, K]`, k and v `[B, S, G, K]` -> out `[B, T, H, K]`.

    Causal: S >= T, and query i sits at key S - T + i. Raises UsageError for shapes that do not fit together.
    """
    if q.shape[2] % k.shape[2] or k.shape != v.shape or (causal and k.shape[1] < q.shape[1]):
        raise UsageError(f"queries {list(q.shape)} do not fit keys {list(k.shape)} and values {list(v.shape)}")
    queries, keys = q.shape[1], k.shape[1]
    masked = False
    if causal and queries > 1:
        # Not the comparison itself: torch takes none of lengths that a compiler leaves open.
        masked = True
    if masked and queries < keys:
        return _behind_cache(q, k, v, dropout_p)
    if q.device.type == "cpu":
        if dropout_p:
            # The fused CPU kernel has no dropout, and torch would form every score at once instead.
            return _blocked(q, k, v, keys, 0 if masked else keys, dropout_p)
        return _heads_first(q, k, v, masked, dropout_p)
    with sdpa_kernel(_backends(queries), set_priority=True):
        return _heads_first(q, k, v, masked, dropout_p)


def dense_attention_path(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> str:
    """Which kernel `dense_attention` runs on a whole sequence of such tensors, in words."""
    if device.type != "cuda":
        return "sdpa flash (cpu)"
    q = torch.empty(1, heads, 1024, width, device=device, dtype=dtype)
    k = q if _repeats(q, kv_heads) else q[:, :kv_heads]
    with sdpa_kernel(FUSED, set_priority=True):
        chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=k.shape[1] != heads)
    return f"sdpa {SDPBackend(chosen).name.removesuffix('_ATTENTION').lower()}"


def _backends(queries: int) -> list[SDPBackend]:
    """cuDNN makes a plan for every new shape, which a cache that grows by one token would pay at every step."""
    return FUSED if queries > 1 else FUSED[1:]


def _repeats(q: Tensor, kv_heads: int) -> bool:
    """Whether keys must be repeated for each query head: only the half-precision CUDA kernels share them."""
    return q.is_cuda and kv_heads != q.shape[1] and not flash.fits(q.device, q.dtype, q.shape[-1])


def _heads_first(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout_p: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if _repeats(q, k.shape[1]):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _behind_cache(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Several new tokens after cached ones: is_causal would align them with the first keys, not the last."""
    if flash.fits(q.device, q.dtype, q.shape[-1]):
        return flash.window(q, k, v, flash.EVERY, 0, dropout_p)
    return _blocked(q, k, v, k.shape[1], 0, dropout_p)


def _blocked(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, dropout_p: float) -> Tensor:
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    run = blocks.blocked if grads or torch.compiler.is_compiling() else blocks.blocked_forward
    return run(q, k, v, None, None, left, right, dropout_p, blocks.new_seed(dropout_p))
