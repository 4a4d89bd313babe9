"""Triton kernels of the shell that all blocks share: norms, the residual in front of a norm, GELU, and their backward.

Each moves its rows once and computes in fp32, whatever the rows are in. Sums over tokens (gradients of gains and
biases) go to one partial row a program, which are added up afterwards in a fixed order: the same input gives the same
bits. Offsets of rows are 64 bits wide: the hidden rows of 2^20 tokens at D = 512 are 2^31 elements.

Letters: B batch, T tokens, D d_model, W the width of a row, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.launch import capability, launch, power_of_2

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton without descriptors made on the host
    TensorDescriptor = None

# Elements that a program of the norms holds at a time, and the widest row that it can hold.
TILE = 4096
WIDEST = 8192
# Programs that share the rows of a backward pass: four on each multiprocessor of an H100.
PROGRAMS = 528
GELU_TILE = (16, 256)
# Rows, columns and depth of a tile of the product with GELU behind it, its warps and stages: tiles share a
# multiprocessor, three forward and two backward, so that one does GELU while the others multiply. Below so many rows
# launching it costs more.
PRODUCT_TILE = (128, 128, 64, 4, 2)
PRODUCT_BACKWARD_TILE = (128, 128, 64, 8, 3)
PRODUCT_LEAST = 16384


def fits(x: Tensor) -> bool:
    """Whether the kernels can do rows like those of x `[..., W]`."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] <= WIDEST
        and capability(x.device) >= (8, 0)
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor) -> None:
    """out = LayerNorm(x), both `[B, T, D]`; out is contiguous."""
    _normalize(x, None, weight, bias, None, eps, total=None, shifted=None, out=out)


def add_layer_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    total: Tensor | None = None,
    shifted: Tensor | None = None,
) -> None:
    """r = x + added; out = LayerNorm(r), total = r, shifted = r + shift, all `[B, T, D]`, shift `[D]`.

    out and total are contiguous. total and shifted are left out where they are None.
    """
    _normalize(x, added, weight, bias, shift, eps, total=total, shifted=shifted, out=out)


def _normalize(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    total: Tensor | None,
    shifted: Tensor | None,
    out: Tensor,
) -> None:
    batch, tokens, width = x.shape
    if all(t is None or t.is_contiguous() for t in (x, added, shifted)):
        # One long sequence: a short batch entry leaves no program half empty.
        batch, tokens = 1, batch * tokens
    strides = [t.stride()[:2] if t is not None else (0, 0) for t in (x, added, shifted)]
    padded = power_of_2(width)
    lines = max(1, TILE // padded)
    # Grids are longest along their first axis.
    for first in range(0, batch, 65535):
        grid = (-(-tokens // lines), min(batch - first, 65535), 1)
        values = (x, added, weight, bias, shift, total, shifted, out, tokens, first)
        constants = {"W": width, "PAD": padded, "LINES": lines}
        constants |= {"ADD": added is not None, "TOTAL": total is not None, "SHIFTED": shifted is not None}
        values = (*values, *strides[0], *strides[1], *strides[2], eps)
        launch(_norm_forward, grid, values, constants, num_warps=4 if padded <= 4096 else 8)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, partials: Tensor, *, out: Tensor, beside: Tensor | None = None
) -> None:
    """out = gradient of x, given that of LayerNorm(x), all `[rows, D]` and contiguous; plus `beside`, if given.

    Adds to partials `[P, 3, D]`, fp32: the gradients of weight and bias, and the sum of `beside` over its rows.
    """
    rows, width = x.shape
    padded = power_of_2(width)
    lines = max(1, TILE // 2 // padded)
    constants = {"W": width, "PAD": padded, "LINES": lines, "BESIDE": beside is not None}
    values = (grad, x, weight, beside, out, partials, rows, eps)
    launch(_norm_backward, (partials.shape[0], 1, 1), values, constants, num_warps=4 if padded <= 2048 else 8)


def gelu(x: Tensor, bias: Tensor, *, out: Tensor) -> None:
    """out = GELU(x + bias), exact (erf), x and out `[rows, W]`, contiguous, and they may be the same."""
    rows, width = x.shape
    lines, columns = GELU_TILE
    grid = (-(-rows // lines), -(-width // columns), 1)
    launch(_gelu_forward, grid, (x, bias, out, rows, width), {"LINES": lines, "COLUMNS": columns}, num_warps=4)


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, partials: Tensor, *, out: Tensor | None = None) -> None:
    """In place of grad `[rows, W]` that of x, and in `out`, if given, GELU(x + bias) once more: all contiguous.

    Adds to partials `[P, W]`, fp32, the sum of the gradient over its rows.
    """
    rows, width = x.shape
    lines, columns = GELU_TILE
    grid = (partials.shape[0], -(-width // columns), 1)
    values = (grad, x, bias, out, partials, rows, width)
    launch(_gelu_backward, grid, values, {"LINES": lines, "COLUMNS": columns, "AFTER": out is not None}, num_warps=4)


def product_fits(rows: Tensor, weight: Tensor, width: int) -> bool:
    """Whether the products below can do rows `[t, D]` times weight to `[t, width]`, faster than BLAS and GELU apart."""
    _, columns, depth, *_ = PRODUCT_TILE
    return (
        TensorDescriptor is not None
        and fits(rows)
        and rows.shape[0] >= PRODUCT_LEAST
        and width % columns == 0
        and rows.shape[1] % depth == 0
        and rows.is_contiguous()
        and rows.dtype == weight.dtype
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and capability(rows.device) == (9, 0)
    )


def linear_gelu(rows: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor, before: Tensor | None = None) -> None:
    """out = GELU(rows @ weight^T + bias), exact (erf): rows `[t, D]`, weight `[W, D]`, out `[t, W]`, contiguous.

    before, if given, is overwritten with rows @ weight^T.
    """
    lines, columns, depth, warps, stages = PRODUCT_TILE
    count, width = out.shape
    values = (
        bias,
        TensorDescriptor.from_tensor(rows, [lines, depth]),
        TensorDescriptor.from_tensor(weight, [columns, depth]),
        TensorDescriptor.from_tensor(out, [lines, columns]),
        TensorDescriptor.from_tensor(out if before is None else before, [lines, columns]),
    )
    constants = {"D": rows.shape[1], "TILES": width // columns, "LINES": lines, "COLUMNS": columns, "DEPTH": depth}
    constants["BEFORE"] = before is not None
    grid = (-(-count // lines) * (width // columns),)
    launch(_linear_gelu, grid, values, constants, num_warps=warps, num_stages=stages)


def linear_gelu_backward(grad: Tensor, weight: Tensor, before: Tensor, bias: Tensor, *, out: Tensor) -> Tensor:
    """out = (grad @ weight) * GELU'(before + bias): grad `[t, D]`, weight `[D, W]`, before and out `[t, W]`.

    All contiguous. Returns the sum of out over t, `[W]` in fp32.
    """
    lines, columns, depth, warps, stages = PRODUCT_BACKWARD_TILE
    count, width = out.shape
    partials = out.new_empty(-(-count // lines), width, dtype=torch.float32)
    values = (
        bias,
        TensorDescriptor.from_tensor(grad, [lines, depth]),
        TensorDescriptor.from_tensor(weight, [depth, columns]),
        TensorDescriptor.from_tensor(before, [lines, columns]),
        TensorDescriptor.from_tensor(out, [lines, columns]),
        partials,
    )
    constants = {"D": grad.shape[1], "TILES": width // columns, "LINES": lines, "COLUMNS": columns, "DEPTH": depth}
    grid = (partials.shape[0] * (width // columns),)
    launch(_linear_gelu_backward, grid, values, constants, num_warps=warps, num_stages=stages)
    return partials.sum(0)


def programs(rows: int) -> int:
    """P: how many partial rows the backward kernels write for so many rows. A function of them alone."""
    return max(1, min(PROGRAMS, rows // 16))


@triton.jit
def _norm_forward(
    x, added, weight, bias, shift, total, shifted, out,
    tokens, first, x_batch, x_token, a_batch, a_token, s_batch, s_token, eps,
    W: tl.constexpr, PAD: tl.constexpr, LINES: tl.constexpr, ADD: tl.constexpr, TOTAL: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    item = first + tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    lanes = tl.arange(0, PAD)
    known = lanes < W
    there = (token < tokens)[:, None] & known[None, :]
    r = tl.load(x + (item * x_batch + token * x_token)[:, None] + lanes[None, :], mask=there, other=0.0).to(tl.float32)
    gain = tl.load(weight + lanes, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + lanes, mask=known, other=0.0).to(tl.float32)
    place = ((item * tokens + token) * W)[:, None] + lanes[None, :]
    if ADD:
        more = tl.load(added + (item * a_batch + token * a_token)[:, None] + lanes[None, :], mask=there, other=0.0)
        # As it is stored, so that a backward pass that reads it finds the same statistics.
        r = (r + more.to(tl.float32)).to(out.dtype.element_ty).to(tl.float32)
        if TOTAL:
            tl.store(total + place, r.to(total.dtype.element_ty), mask=there)
        if SHIFTED:
            moved = r + tl.load(shift + lanes, mask=known, other=0.0).to(tl.float32)[None, :]
            spot = (item * s_batch + token * s_token)[:, None] + lanes[None, :]
            tl.store(shifted + spot, moved.to(shifted.dtype.element_ty), mask=there)
    mean = tl.sum(r, 1) / W
    away = tl.where(known[None, :], r - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(away * away, 1) / W + eps)
    y = away * inverse[:, None] * gain[None, :] + offset[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _norm_backward(
    grad, x, weight, beside, out, partials, rows, eps,
    W: tl.constexpr, PAD: tl.constexpr, LINES: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    share = tl.cdiv(tl.cdiv(rows, LINES), tl.num_programs(0)) * LINES
    first = program.to(tl.int64) * share
    lanes = tl.arange(0, PAD)
    known = lanes < W
    gain = tl.load(weight + lanes, mask=known, other=0.0).to(tl.float32)
    of_gain = tl.zeros((LINES, PAD), tl.float32)
    of_offset = tl.zeros((LINES, PAD), tl.float32)
    of_beside = tl.zeros((LINES, PAD), tl.float32)
    for start in range(0, share, LINES):
        row = first + start + tl.arange(0, LINES)
        there = (row < rows)[:, None] & known[None, :]
        place = (row * W)[:, None] + lanes[None, :]
        r = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        mean = tl.sum(r, 1) / W
        away = tl.where(known[None, :], r - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(away * away, 1) / W + eps)
        normed = away * inverse[:, None]
        of_gain += g * normed
        of_offset += g
        scaled = g * gain[None, :]
        along = tl.sum(scaled * normed, 1) / W
        dx = (scaled - tl.sum(scaled, 1)[:, None] / W - normed * along[:, None]) * inverse[:, None]
        if BESIDE:
            more = tl.load(beside + place, mask=there, other=0.0).to(tl.float32)
            of_beside += more
            dx += more
        tl.store(out + place, dx.to(out.dtype.element_ty), mask=there)
    mine = partials + program * (3 * W) + lanes
    tl.store(mine, tl.load(mine, mask=known, other=0.0) + tl.sum(of_gain, 0), mask=known)
    mine += W
    tl.store(mine, tl.load(mine, mask=known, other=0.0) + tl.sum(of_offset, 0), mask=known)
    if BESIDE:
        mine += W
        tl.store(mine, tl.load(mine, mask=known, other=0.0) + tl.sum(of_beside, 0), mask=known)


@triton.jit
def _below(x):
    """Phi(x), the integral of the normal distribution: 0.5 (1 + erf(x / sqrt(2))).

    log2 of its tail is smooth. This polynomial, least in the largest error over [0, 7], leaves GELU 4e-7 off, and
    2e-5 of its value where |x| < 4; half precision is 25 times coarser. One exponential, where erf takes two branches.
    """
    a = tl.abs(x)
    q = -1.3728933963e-06 * a + 5.3789302910e-05
    q = q * a - 8.8021310512e-04
    q = q * a + 8.3523523062e-03
    q = q * a - 5.3721915931e-02
    q = q * a - 4.5863136649e-01
    q = q * a - 1.1512089968
    tail = tl.exp2(q * a - 9.9999696016e-01)
    return tl.where(x >= 0, 1.0 - tail, tail)


@triton.jit
def _gelu_forward(x, bias, out, rows, width, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    lanes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = lanes < width
    there = (row < rows)[:, None] & known[None, :]
    place = (row * width)[:, None] + lanes[None, :]
    h = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    h += tl.load(bias + lanes, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, (h * _below(h)).to(out.dtype.element_ty), mask=there)


@triton.jit
def _linear_gelu(
    bias, rows, weight, out, before,
    D: tl.constexpr, TILES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    # Tiles of one row of tiles follow each other: they share its rows, and the weights stay in the L2.
    first = tl.program_id(0) // TILES * LINES
    column = tl.program_id(0) % TILES * COLUMNS
    acc = tl.zeros((LINES, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        acc = tl.dot(rows.load([first, start]), weight.load([column, start]).T, acc)
    if BEFORE:
        before.store([first, column], acc.to(before.dtype))
    h = acc + tl.load(bias + column + tl.arange(0, COLUMNS)).to(tl.float32)[None, :]
    out.store([first, column], (h * _below(h)).to(out.dtype))


@triton.jit
def _linear_gelu_backward(
    bias, grad, weight, before, out, partials,
    D: tl.constexpr, TILES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) // TILES
    first = line * LINES
    column = tl.program_id(0) % TILES * COLUMNS
    acc = tl.zeros((LINES, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        acc = tl.dot(grad.load([first, start]), weight.load([start, column]), acc)
    lanes = column + tl.arange(0, COLUMNS)
    h = before.load([first, column]).to(tl.float32) + tl.load(bias + lanes).to(tl.float32)[None, :]
    # Rows past the end are zeros of grad, and so add nothing to the sum.
    g = acc * _gelu_slope(h)
    tl.store(partials + line.to(tl.int64) * (TILES * COLUMNS) + lanes, tl.sum(g, 0))
    out.store([first, column], g.to(out.dtype))


@triton.jit
def _gelu_slope(h):
    return _below(h) + h * tl.exp2(h * h * -0.7213475204444817) * 0.3989422804014327


@triton.jit
def _gelu_backward(
    grad, x, bias, out, partials, rows, width,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    share = tl.cdiv(tl.cdiv(rows, LINES), tl.num_programs(0)) * LINES
    first = program.to(tl.int64) * share
    lanes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = lanes < width
    offset = tl.load(bias + lanes, mask=known, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for start in range(0, share, LINES):
        row = first + start + tl.arange(0, LINES)
        there = (row < rows)[:, None] & known[None, :]
        place = (row * width)[:, None] + lanes[None, :]
        h = tl.load(x + place, mask=there, other=0.0).to(tl.float32) + offset
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        g *= _gelu_slope(h)
        total += g
        if AFTER:
            tl.store(out + place, (h * _below(h)).to(out.dtype.element_ty), mask=there)
        tl.store(grad + place, g.to(grad.dtype.element_ty), mask=there)
    mine = partials + program * width + lanes
    tl.store(mine, tl.load(mine, mask=known, other=0.0) + tl.sum(total, 0), mask=known)
