"""Linear projections whose results, or gradients, go where they are wanted instead of being copied there.

Letters: B batch, t tokens, D width, E width of the projection, g first tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.ops.operators import first_order
from longctx.ops.precision import autocasts


def project_into(u: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = u @ weight^T, without autograd: u `[B, t, D]`, weight `[E, D]`, out `[B, t, E]`.

    out may be a stretch of a longer buffer, behind what is carried on, which then need not move.
    """
    width = out.shape[2]
    if out.is_contiguous():
        torch.mm(u.reshape(-1, u.shape[2]), weight.t(), out=out.view(-1, width))
        return
    for mine, rows in zip(u, out, strict=True):
        torch.mm(mine, weight.t(), out=rows)


def lay_together(*weights: nn.Parameter | None) -> None:
    """Move weights `[E_i, D]` on a GPU to one memory, one behind the other, where `joined` need not copy them.

    They stay parameters of their own, as those of torch's recurrent layers do. Others than plain parameters stay where
    they are.
    """
    if any(type(w) is not nn.Parameter or not w.is_cuda or w.is_inference() for w in weights):
        return
    if len({(w.dtype, w.device) for w in weights}) > 1 or _together(weights):
        return
    with torch.no_grad():
        parts = torch.cat(weights).split([w.shape[0] for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part


def joined(*weights: Tensor) -> Tensor:
    """Weights `[E_i, D]` as one `[sum of E_i, D]`, without autograd: a view if `lay_together` put them there."""
    if _together(weights):
        return weights[0].as_strided((sum(w.shape[0] for w in weights), weights[0].shape[1]), weights[0].stride())
    return torch.cat(weights)


def _together(weights: Sequence[Tensor]) -> bool:
    first, size = weights[0], weights[0].element_size()
    begin = end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != first.dtype or not weight.is_contiguous():
            return False
        end += weight.numel() * size
    # Neighbours in memory may still be strangers.
    return begin > 0 and first.storage_offset() * size + end - begin <= first.untyped_storage().nbytes()


def project_beside(u: Tensor, weight: Tensor, of_first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(u @ weight^T `[B, t, E]`, first @ of_first^T `[B, g, E']`) with first the first g = `count` tokens of u.

    The gradient of the first tokens is added to that of u where it lies: autograd would fill a tensor of its size with
    zeros around it. Gradients of first order.
    """
    plain = torch.compiler.is_compiling() or autocasts(u.device.type)
    if plain or not torch.is_grad_enabled():
        return F.linear(u, weight), F.linear(u[:, :count], of_first)
    return _Beside.apply(u, weight, of_first, count)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, of_first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, weight, of_first)
        ctx.count = count
        ctx.set_materialize_grads(False)
        return F.linear(u, weight), F.linear(u[:, :count], of_first)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, grad_first: Tensor | None) -> tuple[Tensor | None, ...]:
        u, weight, of_first = ctx.saved_tensors
        du, dw, dw_first = None, None, None
        if grad is not None:
            rows = grad.reshape(-1, grad.shape[2])
            du = torch.mm(rows, weight).view(u.shape)
            dw = torch.mm(rows.t(), u.reshape(-1, u.shape[2]))
        if grad_first is not None:
            first = u[:, : ctx.count]
            rows = grad_first.reshape(-1, grad_first.shape[2])
            du = torch.zeros_like(u, memory_format=torch.contiguous_format) if du is None else du
            du[:, : ctx.count] += torch.mm(rows, of_first).view(first.shape)
            dw_first = torch.mm(rows.t(), first.reshape(-1, u.shape[2]))
        return du, dw, dw_first, None
