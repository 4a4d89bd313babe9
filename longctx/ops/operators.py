"""An operation with its gradient: an operator of torch under torch.compile, an autograd.Function outside of it.

An operator (`torch.library`) is one step to a compiler, which does not look inside, and knows shapes without running.
Called eagerly it passes through the dispatcher, schema checks and wrappers in Python, some 50 to 100 us a call, which
is more than a short sequence takes on a GPU. Both run the same two bodies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from longctx.ops.precision import autocasts


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    shapes: Callable[..., Any],
    backward_shapes: Callable[..., Any],
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Any, ...]],
    twice: bool = False,
) -> Callable[..., Any]:
    """The function to call; `torch.ops.longctx.NAME` and `NAME_backward` are the operators.

    forward and backward: the bodies, with annotations that torch can make a schema of; their results are new tensors
    that share no memory. shapes and backward_shapes: tensors like their results, from tensors that have no memory.
    keep(ctx, inputs, output): what waits for backward. gradients(run, ctx, *grads): one gradient or None for each
    input, by `run`, which is backward or its operator. twice: whether `gradients` can itself be differentiated.
    """
    operator = torch.library.custom_op(f"longctx::{name}", forward, mutates_args=())
    operator.register_fake(shapes)
    of_backward = torch.library.custom_op(f"longctx::{name}_backward", backward, mutates_args=())
    of_backward.register_fake(backward_shapes)
    operator.register_autograd(
        lambda ctx, *grads: gradients(of_backward, ctx, *grads),
        setup_context=lambda ctx, inputs, output: keep(ctx, inputs, output),
    )

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with _as_given(grads):
            return gradients(backward, ctx, *grads)

    class Function(torch.autograd.Function):
        # With a `setup_context` of its own torch would inspect a signature at every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with _as_given(inputs):
                output = forward(*inputs)
            keep(ctx, inputs, output)
            return output

    Function.backward = staticmethod(differentiate if twice else first_order(differentiate))
    Function.__name__ = Function.__qualname__ = name

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if torch.compiler.is_compiling() else Function.apply(*inputs)

    return call


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd.Function whose gradients have none: RuntimeError when those are asked for.

    torch's `once_differentiable` does so only where the incoming gradient needs one. That of a sum does not, and
    gradients of second order would be wrong without a word. They would be too where they are asked for by tensor
    (`torch.autograd.grad`): autograd then goes only where one of these is behind, so the error stands before all that
    was saved.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        own = [t if t is None else t.detach().requires_grad_() for t in found]
        behind = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, torch.Tensor) and t.requires_grad]
        message = b"blocks of longctx have gradients of first order only"
        return torch._C._functions.DelayedError(message, len(own) + len(behind))(*own, *behind)[: len(own)]

    return checked


def _as_given(values: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Context in which autocast leaves the formats of an operation's own steps as they are."""
    kind = next((value.device.type for value in values if isinstance(value, torch.Tensor)), None)
    if kind is not None and autocasts(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
