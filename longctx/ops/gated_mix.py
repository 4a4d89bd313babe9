"""g * attended + (1 - g) * recurrent with g = sigmoid(gate), in one pass over memory where Triton can: `[B, T, D]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.ops.operators import differentiable

try:
    from longctx.ops import gated_mix_kernel as kernel
except ImportError:  # a torch without Triton
    kernel = None


def gated_mix(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    """All `[B, T, D]` of one dtype, differentiable in each, twice too. The kernel keeps nothing but its inputs."""
    if kernel is not None and kernel.fits(attended, recurrent, gate):
        return _mix(attended, recurrent, gate)
    return torch.lerp(recurrent, attended, torch.sigmoid(gate))


def _forward(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    return kernel.mix(attended, recurrent, gate)


def _backward(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.mix_backward(grad if grad.stride(-1) == 1 else grad.contiguous(), attended, recurrent, gate)


def _shapes(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(attended, memory_format=torch.contiguous_format)


def _backward_shapes(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(attended, memory_format=torch.contiguous_format) for _ in range(3))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    attended, recurrent, gate = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return run(grad, attended, recurrent, gate)
    # Gradients of gradients are asked for: torch's own operations know theirs.
    share = torch.sigmoid(gate)
    return grad * share, grad * (1 - share), grad * (attended - recurrent) * share * (1 - share)


_mix = differentiable(
    "gated_mix",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
    twice=True,
)
