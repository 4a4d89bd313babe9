"""The diagonal, time-invariant recurrence s_t = decay * s_{t-1} + x_t, exact and without a loop over tokens.

The sequence is cut in chunks. Inside a chunk the recurrence is a product with a lower-triangular Toeplitz
matrix of powers of the decay; between chunks it is the same recurrence over the ends of the chunks, with
decay to the power of the chunk's length, and so the same function again. (Blelloch 1990, "Prefix sums and
their applications"; Dao and Gu 2024, arXiv 2405.21060.)

Powers are taken of the decay itself, never of its logarithm: a decay may be zero or negative. On CUDA, up to fp32,
two Triton kernels do the same with less traffic.

Letters: B batch, T sequence length, N channels, C chunk length, M chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.errors import UsageError
from longctx.ops.operators import differentiable
from longctx.ops.precision import autocasts, wide_dtype

try:
    from longctx.ops import diagonal_scan_kernel as kernel
except ImportError:  # a torch without Triton
    kernel = None

# A longer chunk costs more operations a token (2 C N), a shorter one more carries (T / C): flat around this.
CHUNK = 64


def diagonal_scan(
    x: Tensor, decay: Tensor, initial: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """s_t = decay * s_{t-1} + x_t for every token: (s `[B, T, N]`, its last row `[B, N]`).

    x `[B, T, N]`; decay `[N]`, in (-1, 1), the same for every token; initial `[B, N]`, the state before the
    first token, zeros if None. Computed in fp32, or in fp64 if x is fp64, whatever the precision that matrix
    products are allowed elsewhere. dtype: in which s is returned, if not in that of the scan, in which its last row
    always is; the decay's gradient is taken from s as returned. Differentiable in x, decay and initial, twice too.
    Raises UsageError for shapes that do not belong together.
    """
    check_shapes(x, decay, initial)
    wide = wide_dtype(x.dtype)
    dtype, decay = dtype or wide, decay.to(wide)
    fused = kernel is not None and kernel.fits(x, decay)
    if x.shape[1] == 1 and not fused:
        row = x[:, 0].to(wide)
        final = row.clone() if initial is None else torch.addcmul(row, decay, initial.to(wide))
        return final.unsqueeze(1).to(dtype), final
    inputs = (x, decay) if initial is None else (x, decay, initial)
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if fused and not grads and not torch.compiler.is_compiling():
        return kernel.scan_kernel(x, decay, initial, dtype=dtype)
    initial = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if initial is None else initial.to(wide)
    return _scan(x, decay, initial, dtype)


def diagonal_scan_path(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation `diagonal_scan` runs for tensors like these, in words."""
    like = torch.empty(1, 1, 1, device=device, dtype=dtype)
    if kernel is not None and kernel.fits(like, like.to(wide_dtype(dtype))):
        return "Triton scan"
    return "chunked Toeplitz scan"


def diagonal_scan_reference(x: Tensor, decay: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `diagonal_scan` computes, one token after the other. Slow; for checks."""
    s = x.new_zeros(x.shape[0], x.shape[2]) if initial is None else initial
    rows = []
    for t in range(x.shape[1]):
        s = decay * s + x[:, t]
        rows.append(s)
    return torch.stack(rows, dim=1), s


def check_shapes(x: Tensor, decay: Tensor, initial: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise UsageError(f"a scan takes x of shape [B, T >= 1, N], not {list(x.shape)}")
    if decay.shape != x.shape[2:]:
        raise UsageError(f"a scan over {x.shape[2]} channels takes as many decays, not {list(decay.shape)}")
    if initial is not None and initial.shape != (x.shape[0], x.shape[2]):
        raise UsageError(f"the initial state must be {[x.shape[0], x.shape[2]]}, not {list(initial.shape)}")


def _forward(x: Tensor, decay: Tensor, initial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if kernel is not None and kernel.fits(x, decay):
        return kernel.scan_kernel(x, decay, initial, dtype=dtype)
    with full_precision(x.device.type):
        rows = _scan_rows(x.to(decay.dtype).permute(2, 0, 1), decay.double(), initial.t())
    s = rows.permute(1, 2, 0)
    # A copy: a state that is carried on must not keep the whole sequence alive.
    return s.to(dtype).contiguous(), s[:, -1].clone(memory_format=torch.contiguous_format)


def _backward(
    grad: Tensor, for_final: Tensor, decay: Tensor, initial: Tensor, s: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    r, for_decay, first = kernel.backward_kernel(grad, for_final, decay, initial, s, dtype=dtype)
    return r, for_decay, first.mul_(decay)


def _shapes(x: Tensor, decay: Tensor, initial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return s, x.new_empty(x.shape[0], x.shape[2], dtype=decay.dtype)


def _backward_shapes(
    grad: Tensor, for_final: Tensor, decay: Tensor, initial: Tensor, s: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    return r, torch.empty_like(decay), torch.empty_like(for_final, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, decay, initial, _ = inputs
    ctx.save_for_backward(decay, initial, output[0])
    ctx.dtype = x.dtype


def _gradients(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad: Tensor, for_final: Tensor
) -> tuple[Tensor | None, ...]:
    """r_t = grad_t + decay * r_{t+1}, the same scan from the end, is the gradient to x; the others follow."""
    decay, initial, s = ctx.saved_tensors
    if kernel is not None and kernel.fits(grad, decay) and not torch.is_grad_enabled():
        return *run(grad, for_final, decay, initial, s, ctx.dtype), None
    turned = grad.to(decay.dtype).flip(1)
    turned[:, 0] += for_final
    r = _scan(turned, decay, torch.zeros_like(initial), decay.dtype)[0].flip(1)
    for_decay = (r[:, 1:] * s[:, :-1]).sum((0, 1)) + (r[:, 0] * initial).sum(0)
    return r.to(ctx.dtype), for_decay, decay * r[:, 0], None


# An operator under torch.compile, which then does not try to trace the change of precision flags inside.
_scan = differentiable(
    "diagonal_scan",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
    twice=True,
)


def _scan_rows(x: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """The scan along the last dimension: x and s `[N, B, T]`, decay `[N]` in fp64, initial `[N, B]`."""
    channels, batch, length = x.shape
    size = min(CHUNK, length)
    chunks = -(-length // size)
    if chunks * size == length:
        x = x.contiguous()
    else:
        padded = x.new_zeros(channels, batch, chunks * size)
        padded[..., :length] = x
        x = padded
    exact = decay.new_ones(channels, size + 1)
    torch.cumprod(decay.unsqueeze(1).expand(channels, size), dim=1, out=exact[:, 1:])
    powers = exact.to(x.dtype)
    # Powers on their way to zero pass through denormal numbers, which slow every product that they are in.
    powers.masked_fill_(powers.abs() < torch.finfo(x.dtype).tiny, 0.0)
    s = torch.bmm(x.view(channels, batch * chunks, size), _toeplitz(powers[:, :size]))
    s = s.view(channels, batch, chunks, size)
    before = initial.unsqueeze(-1)
    if chunks > 1:
        carried = _scan_rows(s[:, :, :-1, -1], exact[:, size], initial)
        before = torch.cat([before, carried], dim=-1)
    s.addcmul_(before.unsqueeze(-1), powers[:, None, None, 1:])
    return s.view(channels, batch, chunks * size)[..., :length]


def _toeplitz(powers: Tensor) -> Tensor:
    """powers `[N, C]` -> `[N, C, C]` with powers[i - j] at row j, column i, and zeros where i < j."""
    channels, size = powers.shape
    ahead = torch.cat([powers.new_zeros(channels, size - 1), powers], dim=1)
    return ahead.unfold(1, size, 1).flip(1)


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in the precision of their inputs: no TF32, no bf16 passes, no autocast.

    The error of a reduced product would grow with every carry. Flags are process-wide, so they are touched
    only where they have to be, and put back as they were.
    """
    with contextlib.ExitStack() as stack:
        if autocasts(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_exact_flags(device_type))
        yield


@contextlib.contextmanager
def _exact_flags(device_type: str) -> Iterator[None]:
    kinds = (torch.backends.cuda, torch.backends.mkldnn)
    backends = [kind.matmul for kind in kinds if hasattr(kind, "matmul")]
    # Before torch 2.9 there is no setting for each backend, only the overall one.
    chosen = [getattr(backend, "fp32_precision", None) for backend in backends]
    if chosen[0 if device_type == "cuda" else -1] in ("ieee", "none"):
        yield
        return
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to name the overall setting once a backend was set by itself: that is then in force.
        overall = None
    settings = [pair for pair in zip(backends, chosen, strict=True) if pair[1] is not None]
    if overall is not None:
        torch.set_float32_matmul_precision("highest")
    for backend, _ in settings:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in settings:
            backend.fp32_precision = value
