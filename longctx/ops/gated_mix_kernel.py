"""The end of DPASSM's mixer in Triton kernels: g = sigmoid(gate), out = g * attended + (1 - g) * recurrent.

`project_and_mix` makes recurrent from the states on the way, a narrow product that then never goes through memory, and
its backward makes it again; `mix` and `mix_backward` are elementwise.

Letters: B batch, T tokens, D width, N states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.launch import capability, launch, power_of_2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = {2: (64, 128), 4: (32, 32)}
"""Rows and columns of a tile with a product in it, by the bytes of an element: fp32 products take many registers."""

ELEMENTWISE = {"ROWS": 8, "COLUMNS": 512}
"""The same of the others."""

MOST_STATES = 256


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: one dtype, on one GPU, rows that are contiguous."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and all(t.dtype == first.dtype and t.stride(-1) == 1 for t in tensors)
        and capability(first.device) >= (8, 0)
    )


def project_and_mix(attended: Tensor, gate: Tensor, bias: Tensor, s: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """attended and gate `[B, T, D]`, bias of the gate `[D]`, s `[B, T, N]`, weight `[D, N]` -> out `[B, T, D]`, which
    may be attended. Recurrent is weight s; N at most MOST_STATES."""
    grid, constants = _tiles(attended, s)
    values = (
        attended, gate, bias, s, weight, out, *_strides(attended, gate, s, out), weight.stride(0),
        *attended.shape[1:], s.shape[2],
    )  # fmt: skip
    launch(_project_and_mix, grid, values, constants, num_warps=8)
    return out


def project_and_mix_backward(
    grad: Tensor, attended: Tensor, gate: Tensor, bias: Tensor, s: Tensor, weight: Tensor, *, for_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Given that of `project_and_mix`, the gradient to recurrent `[B, T, D]`, and the sums over B and T of those to
    attended and to gate, `[2, D]` in fp32. attended is overwritten with its gradient, for_gate `[B, T, D]` with that
    to gate."""
    for_recurrent = torch.empty_like(attended, memory_format=torch.contiguous_format)
    grid, constants = _tiles(attended, s)
    width = attended.shape[2]
    parts = grid[0] // -(-width // constants["COLUMNS"])
    sums = torch.empty(2, grid[2] * parts, width, device=attended.device, dtype=torch.float32)
    values = (
        grad, attended, gate, bias, s, weight, for_recurrent, for_gate, sums,
        *_strides(grad, attended, gate, s, for_recurrent, for_gate), weight.stride(0), *attended.shape[1:], s.shape[2],
    )  # fmt: skip
    launch(_project_and_mix_backward, grid, values, constants, num_warps=8)
    return for_recurrent, sums.sum(1)


def mix(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    """All `[B, T, D]` -> out, the same."""
    out = torch.empty_like(attended, memory_format=torch.contiguous_format)
    values = (attended, recurrent, gate, out, *_strides(attended, recurrent, gate, out), *attended.shape[1:])
    launch(_mix, _grid(attended), values, ELEMENTWISE, num_warps=4)
    return out


def mix_backward(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to attended, recurrent and gate, all `[B, T, D]`."""
    grads = tuple(torch.empty_like(attended, memory_format=torch.contiguous_format) for _ in range(3))
    inputs = (grad, attended, recurrent, gate)
    values = (*inputs, *grads, *_strides(*inputs, grads[0]), *attended.shape[1:])
    launch(_mix_backward, _grid(attended), values, ELEMENTWISE, num_warps=4)
    return grads


def _grid(like: Tensor) -> tuple[int, int, int]:
    batch, tokens, width = like.shape
    return -(-tokens // ELEMENTWISE["ROWS"]), -(-width // ELEMENTWISE["COLUMNS"]), batch


def _tiles(like: Tensor, s: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and constants of the kernels with a product in them."""
    batch, tokens, width = like.shape
    rows, columns = TILES[like.element_size()]
    # Tiles of the same rows follow each other: what they read lies side by side in memory.
    grid = (-(-tokens // rows) * -(-width // columns), 1, batch)
    return grid, {"ROWS": rows, "COLUMNS": columns, "STATES": max(16, power_of_2(s.shape[2]))}


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch and token."""
    return [stride for t in tensors for stride in t.stride()[:2]]


@triton.jit(do_not_specialize=["tokens"])
def _project_and_mix(
    attended, gate, bias, states, weight, out,
    a_batch, a_token, g_batch, g_token, s_batch, s_token, o_batch, o_token, w_row, tokens, width, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    item = tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, STATES)
    there = (rows < tokens)[:, None] & (cols < width)[None, :]
    s = tl.load(
        states + item * s_batch + (rows * s_token)[:, None] + channels[None, :],
        mask=(rows < tokens)[:, None] & (channels < count)[None, :],
        other=0.0,
    )
    w = tl.load(
        weight + (cols * w_row)[:, None] + channels[None, :],
        mask=(cols < width)[:, None] & (channels < count)[None, :],
        other=0.0,
    )
    a = tl.load(attended + item * a_batch + (rows * a_token)[:, None] + cols[None, :], mask=there, other=0.0)
    g = tl.load(gate + item * g_batch + (rows * g_token)[:, None] + cols[None, :], mask=there, other=0.0)
    b = tl.load(bias + cols, mask=cols < width, other=0.0)
    recurrent = tl.dot(s, tl.trans(w), input_precision="ieee")
    share = tl.sigmoid(g.to(tl.float32) + b.to(tl.float32)[None, :])
    mixed = recurrent + share * (a.to(tl.float32) - recurrent)
    tl.store(
        out + item * o_batch + (rows * o_token)[:, None] + cols[None, :], mixed.to(out.dtype.element_ty), mask=there
    )


@triton.jit(do_not_specialize=["tokens"])
def _project_and_mix_backward(
    grad, attended, gate, bias, states, weight, for_recurrent, for_gate, sums,
    d_batch, d_token, a_batch, a_token, g_batch, g_token, s_batch, s_token, f_batch, f_token, o_batch, o_token,
    w_row, tokens, width, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    part = tl.program_id(0) // across
    rows = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    item = tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, STATES)
    there = (rows < tokens)[:, None] & (cols < width)[None, :]
    s = tl.load(
        states + item * s_batch + (rows * s_token)[:, None] + channels[None, :],
        mask=(rows < tokens)[:, None] & (channels < count)[None, :],
        other=0.0,
    )
    w = tl.load(
        weight + (cols * w_row)[:, None] + channels[None, :],
        mask=(cols < width)[:, None] & (channels < count)[None, :],
        other=0.0,
    )
    d = tl.load(grad + item * d_batch + (rows * d_token)[:, None] + cols[None, :], mask=there, other=0.0)
    mine = attended + item * a_batch + (rows * a_token)[:, None] + cols[None, :]
    a = tl.load(mine, mask=there, other=0.0)
    g = tl.load(gate + item * g_batch + (rows * g_token)[:, None] + cols[None, :], mask=there, other=0.0)
    b = tl.load(bias + cols, mask=cols < width, other=0.0)
    recurrent = tl.dot(s, tl.trans(w), input_precision="ieee")
    share = tl.sigmoid(g.to(tl.float32) + b.to(tl.float32)[None, :])
    d = d.to(tl.float32)
    of_attended = d * share
    of_gate = of_attended * (1.0 - share) * (a.to(tl.float32) - recurrent)
    kind = for_gate.dtype.element_ty
    tl.store(mine, of_attended.to(kind), mask=there)
    tl.store(
        for_recurrent + item * f_batch + (rows * f_token)[:, None] + cols[None, :],
        (d - of_attended).to(kind),
        mask=there,
    )
    tl.store(for_gate + item * o_batch + (rows * o_token)[:, None] + cols[None, :], of_gate.to(kind), mask=there)
    # Rows past the end are zeros of grad, and so of what is summed.
    parts = tl.num_programs(0) // across
    total = sums + (item * parts + part) * width + cols
    tl.store(total, tl.sum(of_attended, 0), mask=cols < width)
    total += tl.num_programs(2).to(tl.int64) * parts * width
    tl.store(total, tl.sum(of_gate, 0), mask=cols < width)


@triton.jit(do_not_specialize=["tokens"])
def _mix(
    attended, recurrent, gate, out,
    a_batch, a_token, r_batch, r_token, g_batch, g_token, o_batch, o_token, tokens, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    item = tl.program_id(2).to(tl.int64)
    there = (rows < tokens)[:, None] & (cols < width)[None, :]
    a = tl.load(attended + item * a_batch + (rows * a_token)[:, None] + cols[None, :], mask=there, other=0.0)
    r = tl.load(recurrent + item * r_batch + (rows * r_token)[:, None] + cols[None, :], mask=there, other=0.0)
    g = tl.load(gate + item * g_batch + (rows * g_token)[:, None] + cols[None, :], mask=there, other=0.0)
    a, r, share = a.to(tl.float32), r.to(tl.float32), tl.sigmoid(g.to(tl.float32))
    mixed = (r + share * (a - r)).to(out.dtype.element_ty)
    tl.store(out + item * o_batch + (rows * o_token)[:, None] + cols[None, :], mixed, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _mix_backward(
    grad, attended, recurrent, gate, for_attended, for_recurrent, for_gate,
    d_batch, d_token, a_batch, a_token, r_batch, r_token, g_batch, g_token, o_batch, o_token, tokens, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    item = tl.program_id(2).to(tl.int64)
    there = (rows < tokens)[:, None] & (cols < width)[None, :]
    d = tl.load(grad + item * d_batch + (rows * d_token)[:, None] + cols[None, :], mask=there, other=0.0)
    a = tl.load(attended + item * a_batch + (rows * a_token)[:, None] + cols[None, :], mask=there, other=0.0)
    r = tl.load(recurrent + item * r_batch + (rows * r_token)[:, None] + cols[None, :], mask=there, other=0.0)
    g = tl.load(gate + item * g_batch + (rows * g_token)[:, None] + cols[None, :], mask=there, other=0.0)
    d, share = d.to(tl.float32), tl.sigmoid(g.to(tl.float32))
    part = d * share
    at = item * o_batch + (rows * o_token)[:, None] + cols[None, :]
    kind = for_gate.dtype.element_ty
    tl.store(for_attended + at, part.to(kind), mask=there)
    tl.store(for_recurrent + at, (d - part).to(kind), mask=there)
    tl.store(for_gate + at, (part * (1.0 - share) * (a.to(tl.float32) - r.to(tl.float32))).to(kind), mask=there)
