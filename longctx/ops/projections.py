"""Linear projections whose results, or gradients, go where they are wanted instead of being copied there.

Letters: B batch, t tokens, D width, E width of the projection, g first tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops.operators import first_order


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


def project_beside(u: Tensor, weight: Tensor, of_first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(u @ weight^T `[B, t, E]`, first @ of_first^T `[B, g, E']`) with first the first g = `count` tokens of u.

    The gradient of the first tokens is added to that of u where it lies: autograd would fill a tensor of its size with
    zeros around it. Gradients of first order.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(u.device.type)
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
