"""g * attended + (1 - g) * recurrent with g = sigmoid(gate), in one pass over memory where Triton can: `[B, T, D]`."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from longctx.ops import gated_mix_kernel as kernel
except ImportError:  # a torch without Triton
    kernel = None


def gated_mix(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    """All `[B, T, D]` of one dtype, differentiable in each, twice too. The kernel keeps nothing but its inputs."""
    if kernel is not None and kernel.fits(attended, recurrent, gate):
        return _mix(attended, recurrent, gate)
    return torch.lerp(recurrent, attended, torch.sigmoid(gate))


@torch.library.custom_op("longctx::gated_mix", mutates_args=())
def _mix(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    return kernel.mix(attended, recurrent, gate)


@_mix.register_fake
def _(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(attended, memory_format=torch.contiguous_format)


@torch.library.custom_op("longctx::gated_mix_backward", mutates_args=())
def _mix_backward(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.mix_backward(grad if grad.stride(-1) == 1 else grad.contiguous(), attended, recurrent, gate)


@_mix_backward.register_fake
def _(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(attended, memory_format=torch.contiguous_format) for _ in range(3))


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attended, recurrent, gate = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _mix_backward(grad, attended, recurrent, gate)
    # Gradients of gradients are asked for: torch's own operations know theirs.
    share = torch.sigmoid(gate)
    return grad * share, grad * (1 - share), grad * (attended - recurrent) * share * (1 - share)


_mix.register_autograd(_backward, setup_context=_keep)
