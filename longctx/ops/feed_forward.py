"""The second half of every block: a residual, a norm, and a feed-forward with exact (erf) GELU behind it.

    r = x + mixed;  y = r + down(gelu(up(norm(r))))

Matrix products are the BLAS's. What lies between them is bound by memory, and is done in as few passes as there can
be: r, its norm, and r with the bias of `down` in one; the second residual is the product's own addend. In training r
and the rows before GELU are kept; norm and GELU are computed again in backward, slab by slab, so that neither the rows
behind GELU nor their gradients ever exist as a whole.

Letters: B batch, T tokens, D d_model, t tokens of a slab; the hidden rows are 4D wide, or whatever `up` makes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops.layer_norm import NormGradients, add_normalize, kernels, kernels_fit, normalize
from longctx.ops.operators import differentiable
from longctx.ops.precision import autocasts, wide_dtype
from longctx.ops.weight_gradient import WeightGradient, in_formats_of

# Tokens that go through the hidden layer at a time in training: on a CPU what the cache holds, on a GPU a part of the
# call within these bounds, so that buffers stay small beside what is kept, and products are large and few.
CPU_TOKENS = 1024
GPU_LEAST, GPU_MOST = 8192, 65536


def residual_feed_forward(
    x: Tensor,
    mixed: Tensor,
    norm: tuple[Tensor, Tensor, float],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    dropout_p: float = 0.0,
    keep_hidden: bool = True,
    slabs: int = 2,
    whole: bool = False,
) -> Tensor:
    """x and mixed `[B, T, D]` -> y `[B, T, D]`, with gradients.

    norm: weight, bias, epsilon; up and down: weight and bias. dropout_p: of the feed-forward's output. keep_hidden:
    whether the rows before GELU wait for backward, or are one more thing that it computes again. slabs: parts in which
    a GPU takes the call. whole: all at once, for a caller that takes the sequence in slabs itself.
    """
    if autocasts(x.device.type):
        # Autocast chooses the format of each operation, and so must see them one by one.
        r = x + mixed
        hidden = F.gelu(F.linear(F.layer_norm(r, (r.shape[-1],), *norm), *up))
        return r + F.dropout(F.linear(hidden, *down), dropout_p)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p) if dropout_p else None
    slab = _slab_tokens(x, slabs, whole)
    scale = 1.0 / (1.0 - dropout_p)
    return _residual_feed_forward(x, mixed, kept, scale, keep_hidden, slab, *norm, *up, *down)[0]


def infer(
    x: Tensor,
    mixed: Tensor,
    norm: tuple[Tensor, Tensor, float],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    out: Tensor,
    hidden: Tensor,
) -> None:
    """out = y, without autograd and dropout. x, mixed, out `[B, t, D]`; hidden: a buffer of B * t rows."""
    normed = add_normalize(x, mixed, *norm, shifted=out, shift=down[1]).flatten(0, 1)
    if kernels is not None and kernels.product_fits(normed, up[0], hidden.shape[1]):
        kernels.linear_gelu(normed, *up, out=hidden)
    else:
        _expand(normed, *up, out=hidden)
        _gelu(hidden, up[1], out=hidden)
    _accumulate(out, hidden, down[0])


def _accumulate(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    """out += rows @ weight^T: out `[B, t, D]`, contiguous or a slab of something that is; rows `[B * t, W]`."""
    if out.is_contiguous():
        flat = out.view(-1, out.shape[-1])
        torch.addmm(flat, rows, weight.t(), out=flat)
        return
    for part, mine in zip(out, rows.view(out.shape[0], out.shape[1], -1), strict=True):
        torch.addmm(part, mine, weight.t(), out=part)


def _expand(normed: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor) -> None:
    """What `_gelu` takes: the product alone where a kernel adds the bias on its way, else with it."""
    if kernels_fit(out):
        torch.mm(normed, weight.t(), out=out)
    else:
        torch.addmm(bias, normed, weight.t(), out=out)


def _gelu(x: Tensor, bias: Tensor, *, out: Tensor) -> None:
    """out = GELU of what `_expand` means by x `[t, W]`, which may be in place."""
    if kernels_fit(x):
        kernels.gelu(x, bias, out=out)
    else:
        torch.ops.aten.gelu.out(x, out=out)


def _slab_tokens(x: Tensor, slabs: int, whole: bool) -> int:
    rows = x.shape[0] * x.shape[1]
    if x.device.type == "cpu":
        return CPU_TOKENS
    return rows if whole else max(GPU_LEAST, min(GPU_MOST, -(-rows // (2048 * slabs)) * 2048))


def _slabs(rows: int, step: int) -> Iterator[slice]:
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _forward(
    x: Tensor,
    mixed: Tensor,
    kept: Tensor | None,
    scale: float,
    keep_hidden: bool,
    step: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, r `[B, T, D]`, the rows before GELU `[B * T or 0, 4D]`).

    kept: what dropout lets through, times `scale`. step: tokens of a slab.
    """
    width = x.shape[-1]
    y, r = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    rows = y.numel() // width
    hidden = x.new_empty(rows if keep_hidden else 0, up_weight.shape[0])
    # Views of whole rows, so that a slab may begin anywhere in the batch.
    flat_x, flat_mixed = x.reshape(1, rows, width), mixed.reshape(1, rows, width)
    flat_y, flat_r = y.view(1, rows, width), r.view(1, rows, width)
    flat_kept = None if kept is None else kept.reshape(1, rows, width)
    wide: Tensor | None = None
    for slab in _slabs(rows, step):
        normed = add_normalize(
            flat_x[:, slab],
            flat_mixed[:, slab],
            norm_weight,
            norm_bias,
            eps,
            total=flat_r[:, slab],
            shifted=flat_y[:, slab] if kept is None else None,
            shift=down_bias,
        )
        count = slab.stop - slab.start
        wide = x.new_empty(count, up_weight.shape[0]) if wide is None else wide[:count]
        if kernels is not None and kernels.product_fits(normed[0], up_weight, wide.shape[1]):
            before = hidden[slab] if keep_hidden else None
            kernels.linear_gelu(normed[0], up_weight, up_bias, out=wide, before=before)
        else:
            before = hidden[slab] if keep_hidden else wide
            _expand(normed[0], up_weight, up_bias, out=before)
            _gelu(before, up_bias, out=wide)
        if flat_kept is None:
            _accumulate(flat_y[:, slab], wide, down_weight)
        else:
            down = torch.addmm(down_bias, wide, down_weight.t())
            torch.add(flat_r[0, slab], down.mul_(flat_kept[0, slab]), alpha=scale, out=flat_y[0, slab])
        # Before there is another of them.
        del normed
    return y, r, hidden


def _shapes(x, mixed, kept, scale, keep_hidden, step, norm_weight, norm_bias, eps, up_weight, *rest):
    y, r = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return y, r, x.new_empty(x.numel() // x.shape[-1] if keep_hidden else 0, up_weight.shape[0])


def _backward(
    grad: Tensor,
    kept: Tensor | None,
    scale: float,
    step: int,
    r: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, which are those of x and of mixed, and of the six parameters."""
    wide, width = up_weight.shape
    rows = r.numel() // width
    dr = torch.empty_like(r)
    flat_r, flat_dr, flat_grad = r.view(rows, width), dr.view(rows, width), grad.reshape(rows, width).contiguous()
    flat_kept = None if kept is None else kept.reshape(rows, width)
    norm = NormGradients(r, norm_weight, eps)
    gelu = _GeluGradients(r, up_bias)
    d_up, d_down = WeightGradient(), WeightGradient()
    d_dropped: Tensor | None = None
    buffer: Tensor | None = None
    for slab in _slabs(rows, step):
        count = slab.stop - slab.start
        if buffer is None:
            buffer = r.new_empty(count, wide)
            again = None if hidden.shape[0] else r.new_empty(count, wide)
        # The rows behind GELU and then their gradients: the second overwrite the first.
        after = dh = buffer[:count]
        # Likewise the norm, the gradient of it, and that of r.
        normed = normalize(flat_r[None, slab], norm_weight, norm_bias, eps, out=flat_dr[None, slab])[0]
        before = hidden[slab] if again is None else again[:count]
        if again is not None:
            _expand(normed, up_weight, up_bias, out=before)
        behind = flat_grad[slab]
        if flat_kept is not None:
            behind = (behind * flat_kept[slab]).mul_(scale)
            dropped = behind.sum(0, dtype=norm.partials.dtype)
            d_dropped = dropped if d_dropped is None else d_dropped.add_(dropped)
        _gelu(before, up_bias, out=after)
        d_down.add(behind, after)
        gelu.rows(behind, down_weight, before, out=dh)
        d_up.add(dh, normed)
        dn = torch.mm(dh, up_weight, out=normed)
        norm.rows(dn, flat_r[slab], out=dn, beside=flat_grad[slab])
    d_gain, d_offset, d_bias = norm.sums()
    if d_dropped is not None:
        d_bias = d_dropped
    found = (d_gain, d_offset, d_up.total, gelu.sum(), d_down.total, d_bias)
    parameters = (norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias)
    return dr, *in_formats_of(parameters, found)


def _backward_shapes(
    grad, kept, scale, step, r, hidden, norm_weight, norm_bias, eps, up_weight, up_bias, down_weight, down_bias
):
    parameters = (norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias)
    return torch.empty_like(r), *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)


class _GeluGradients:
    """Backward of GELU and of the product behind it, over many slabs."""

    def __init__(self, like: Tensor, bias: Tensor) -> None:
        self.like, self.bias = like, bias
        self.fused = kernels_fit(like) and bias.shape[0] <= kernels.WIDEST
        self.dtype = wide_dtype(like.dtype)
        self.parts: list[Tensor] = []
        self.partials: Tensor | None = None

    def rows(self, grad: Tensor, weight: Tensor, before: Tensor, *, out: Tensor) -> None:
        """out `[t, W]` = gradient of the rows before GELU: grad `[t, D]` is that of GELU's rows times weight^T."""
        if kernels is not None and kernels.product_fits(grad, weight, out.shape[1]):
            self.parts.append(kernels.linear_gelu_backward(grad, weight, before, self.bias, out=out))
            return
        torch.mm(grad, weight, out=out)
        if self.fused:
            if self.partials is None:
                count = kernels.programs(self.like.numel() // self.like.shape[-1])
                self.partials = out.new_zeros(count, out.shape[1], dtype=self.dtype)
            kernels.gelu_backward(out, before, self.bias, self.partials)
            return
        torch.ops.aten.gelu_backward.grad_input(out, before, grad_input=out)
        self.parts.append(out.sum(0, dtype=self.dtype))

    def sum(self) -> Tensor:
        """Gradient of the bias before GELU, `[W]`, in fp32 at least."""
        parts = self.parts if self.partials is None else [*self.parts, self.partials.sum(0)]
        return functools.reduce(Tensor.add_, parts)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, kept, ctx.scale, _, ctx.step, norm_weight, norm_bias, ctx.eps, *rest = inputs
    _, r, hidden = output
    ctx.mark_non_differentiable(r, hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept, r, hidden, norm_weight, norm_bias, *rest)


def _gradients(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor | None, *unused: Any
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    kept, r, hidden, norm_weight, norm_bias, *rest = ctx.saved_tensors
    dr, d_gain, d_offset, *others = run(
        grad, kept, ctx.scale, ctx.step, r, hidden, norm_weight, norm_bias, ctx.eps, *rest
    )
    return dr, dr, None, None, None, None, d_gain, d_offset, None, *others


_residual_feed_forward = differentiable(
    "residual_feed_forward",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
