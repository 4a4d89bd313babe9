"""One forward and one backward body, called directly or as operators of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.ops.operators import differentiable

calls: list[str] = []


def _forward(x: Tensor, power: int) -> tuple[Tensor, Tensor]:
    calls.append("forward")
    return x**power, x.abs()


def _backward(grad: Tensor, x: Tensor, power: int) -> Tensor:
    calls.append("backward")
    return grad * power * x ** (power - 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.power = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(run, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    return None if grad is None else run(grad, *ctx.saved_tensors, ctx.power), None


def make(name: str, *, twice: bool = False):
    return differentiable(
        name,
        _forward,
        _backward,
        shapes=lambda x, power: (torch.empty_like(x), torch.empty_like(x)),
        backward_shapes=lambda grad, x, power: torch.empty_like(x),
        keep=_keep,
        gradients=_gradients,
        twice=twice,
    )


once, twice = make("test_power_once"), make("test_power_twice", twice=True)


def test_eager_and_compiled_run_the_same_bodies():
    x = torch.randn(5, requires_grad=True)
    for call in (once, torch.compile(once, fullgraph=True, backend="aot_eager")):
        calls.clear()
        y, size = call(x, 3)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert calls[0] == "forward" and calls[-1] == "backward"
        assert not size.requires_grad
        torch.testing.assert_close(dx, 3 * x**2)


def test_the_operators_are_registered_as_torch_expects():
    x = torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.longctx.test_power_once.default, (x, 3))
    torch.library.opcheck(torch.ops.longctx.test_power_once_backward.default, (x.detach(), x.detach(), 3))


def test_gradients_of_gradients_only_where_they_are_right():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: twice(x, 3)[0], x)
    (dx,) = torch.autograd.grad(once(x, 3)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first order"):
        dx.sum().backward()
    # torch's own `once_differentiable` would not see it here.
    (dx,) = torch.autograd.grad(once(x, 3)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first order"):
        dx.square().sum().backward()
