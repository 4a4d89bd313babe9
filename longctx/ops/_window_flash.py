"""Window attention by the FlashAttention-2 kernels inside torch: CUDA, half precision.

The kernels know windows but no global keys. Those are a second pass, and the two are merged by their log-sum-exp:
with lse = logaddexp(lse_1, lse_2), out = sum_i exp(lse_i - lse) out_i. The backward of either pass, given the merged
out and lse, is exact: its weights become exp(scores - lse), and the correction rowsum(grad * out) is the merged one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.ops.operators import first_order

HALF = (torch.float16, torch.bfloat16)
EVERY = -1
"""Window size that means no bound."""


def fits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels take heads of this width on this device."""
    return (
        device.type == "cuda"
        and dtype in HALF
        and width % 8 == 0
        and width <= 256
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out `[B, T, H, K]`, lse `[B, H, T]`, and the two tensors that carry the dropout's random state)."""
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, False, False),
        window_size_left=left,
        window_size_right=right,
    )[:4]


def window(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, dropout_p: float) -> Tensor:
    """q `[B, T, H, K]` over the keys from `left` behind to `right` ahead: `[B, T, H, K]`, differentiable."""
    return _forward(q, k, v, left, right, dropout_p)[0]


class WindowAndGlobals(torch.autograd.Function):
    """The same, with global keys `[B, g, G, K]` that every query sees."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        global_k: Tensor,
        global_v: Tensor,
        left: int,
        right: int,
        dropout_p: float,
    ) -> Tensor:
        out, lse, *near_random = _forward(q, k, v, left, right, dropout_p)
        far, far_lse, *far_random = _forward(q, global_k, global_v, EVERY, EVERY, dropout_p)
        share = torch.sigmoid(far_lse - lse).transpose(1, 2).unsqueeze(-1)
        torch.lerp(out, far, share.to(out.dtype), out=out)
        if any(ctx.needs_input_grad):
            lse = torch.logaddexp(lse, far_lse)
            ctx.save_for_backward(q, k, v, global_k, global_v, out, lse, *near_random, *far_random)
            ctx.settings = (left, right, dropout_p)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, global_k, global_v, out, lse, *random = ctx.saved_tensors
        left, right, dropout_p = ctx.settings
        grad = grad.contiguous()
        dq, dk, dv = _backward(grad, q, k, v, out, lse, random[:2], left, right, dropout_p)
        far_dq, dgk, dgv = _backward(grad, q, global_k, global_v, out, lse, random[2:], EVERY, EVERY, dropout_p)
        return dq.add_(far_dq), dk, dv, dgk, dgv, None, None, None


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    random: list[Tensor],
    left: int,
    right: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], dropout_p, False, *random),
        window_size_left=left,
        window_size_right=right,
    )
