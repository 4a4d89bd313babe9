"""LayerNorm (Ba et al. 2016, arXiv 1607.06450), alone and behind a residual, forward and backward.

In half precision on CUDA a Triton kernel that moves the rows once; everywhere else torch's own.

Letters: B batch, T tokens, D d_model, P partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longctx.ops.operators import differentiable
from longctx.ops.precision import wide_dtype
from longctx.ops.weight_gradient import in_formats_of

try:
    from longctx.ops import shell_kernels as kernels
except ImportError:  # a torch without Triton
    kernels = None


def kernels_fit(x: Tensor) -> bool:
    """Whether rows like those of x `[..., D]` go through the Triton kernels."""
    return kernels is not None and kernels.fits(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x `[..., T, D]`, in memory of its own. Gradients are recomputed from x."""
    if not kernels_fit(x):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if not torch.is_grad_enabled():
        return normalize(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


def kept_as_input(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> saved_tensors_hooks:
    """Context in which what autograd keeps of `u = layer_norm(x, ...)` until backward is x alone.

    u is computed again when backward first asks for it, and let go when it has asked as often as there was a reason to
    keep it. Gradients of first order only. Backward raises RuntimeError if x, weight, bias or anything else that was
    kept was changed in place.
    """
    # The hooks belong to an object that does not know the context: a circle would hold x until garbage is collected.
    again = _ComputedAgain(u.untyped_storage().data_ptr(), (x, weight, bias), eps)
    return saved_tensors_hooks(again.pack, again.unpack)


def hooks_are_set() -> bool:
    """Whether someone else decides what autograd keeps, as checkpointing does: hooks of ours would take it away."""
    # torch has no public way to ask.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


class _ComputedAgain:
    def __init__(self, storage: int, inputs: tuple[Tensor, Tensor, Tensor], eps: float) -> None:
        self.storage, self.inputs, self.eps = storage, inputs, eps
        self.versions = self._versions()
        self.kept = self.asked = 0
        self.u: Tensor | None = None

    def _versions(self) -> list[int]:
        # What inference mode made has none, and cannot be changed outside of it.
        return [0 if t.is_inference() else t._version for t in self.inputs]

    def pack(self, t: Tensor) -> Any:
        if t.untyped_storage().data_ptr() != self.storage:
            # Not t itself: an operation that keeps its own result would be kept by it, also where nothing else is left.
            return t.detach(), t._version
        self.kept += 1
        return t.size(), t.stride(), t.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed[0], Tensor):
            # With hooks autograd does not look.
            t, version = packed
            if t._version != version:
                raise RuntimeError("a tensor that a block needs for its backward was changed in place before it")
            return t
        if self.u is None:
            if self._versions() != self.versions:
                raise RuntimeError("the input, weight or bias of a LayerNorm was changed in place before its backward")
            with torch.no_grad():
                self.u = normalize(*self.inputs, self.eps)
        u, self.asked = self.u.as_strided(*packed), self.asked + 1
        if self.asked >= self.kept:
            self.u, self.asked = None, 0
        return u


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """The same without autograd, into `out` if given, which is contiguous."""
    if not kernels_fit(x):
        y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.layer_norm(_dense(x), weight, bias, eps, out=out)
    return out


def add_normalize(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    total: Tensor | None = None,
    shifted: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """LayerNorm(r) with r = x + added, all `[B, T, D]`, without autograd.

    total, contiguous, is overwritten with r, and shifted with r + shift (`[D]`, or None for r), where they are given.
    """
    if kernels_fit(x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.add_layer_norm(
            _dense(x), _dense(added), weight, bias, shift, eps, out=out, total=total,
            shifted=shifted if shifted is None else shifted.view(-1, *shifted.shape[-2:]),
        )  # fmt: skip
        return out
    r = torch.add(x, added) if total is None else torch.add(x, added, out=total)
    if shifted is not None:
        shifted.copy_(r) if shift is None else torch.add(r, shift, out=shifted)
    return F.layer_norm(r, (x.shape[-1],), weight, bias, eps)


class NormGradients:
    """Backward of LayerNorm over many calls: rows go through `rows`, the sums over all of them are in `sums`."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.fused = kernels_fit(x)
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        count = kernels.programs(rows) if self.fused else 1
        self.partials = x.new_zeros(count, 3, width, dtype=wide_dtype(x.dtype))

    def rows(self, grad: Tensor, x: Tensor, *, out: Tensor, beside: Tensor | None = None) -> None:
        """out = gradient of x given that of LayerNorm(x), plus `beside`: all `[rows, D]` and contiguous.

        out may be grad itself.
        """
        if self.fused:
            kernels.layer_norm_backward(grad, x, self.weight, self.eps, self.partials, out=out, beside=beside)
            return
        shape = [x.shape[-1]]
        _, mean, inverse = torch.native_layer_norm(x, shape, None, None, self.eps)
        weight = self.weight.to(x.dtype)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, inverse, weight, weight, [True, True, True]
        )
        self.partials[0, 0] += dw
        self.partials[0, 1] += db
        if beside is None:
            out.copy_(dx)
        else:
            self.partials[0, 2] += beside.sum(0, dtype=self.partials.dtype)
            torch.add(dx, beside, out=out)

    def totals(self) -> Tensor:
        """Gradients of weight and bias, and the sum of `beside`, `[3, D]`, in fp32 at least."""
        return self.partials.sum(0)

    def sums(self) -> tuple[Tensor, ...]:
        """The same, each `[D]`, in memory they share."""
        return self.totals().unbind()


def _dense(x: Tensor) -> Tensor:
    """x `[..., T, D]` as `[B, T, D]` with its channels side by side, as the kernels read them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return normalize(x, weight, bias, eps)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    gradients = NormGradients(x, weight, eps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = dx.view(-1, x.shape[-1])
    gradients.rows(grad.reshape(flat.shape).contiguous(), x.reshape(flat.shape).contiguous(), out=flat)
    return dx, *in_formats_of((weight, weight), gradients.sums()[:2])


def _shapes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *run(grad, *ctx.saved_tensors, ctx.eps), None


_layer_norm = differentiable(
    "layer_norm",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
