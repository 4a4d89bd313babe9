"""The end of DPASSM's mixer in Triton kernels: g = sigmoid(gate), out = g * attended + (1 - g) * recurrent.

`project_and_mix` makes recurrent from the states on the way, a narrow product that then never goes through memory;
`mix` and `mix_backward` are elementwise, for training.

Letters: B batch, T tokens, D width, N states.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = {2: (64, 128), 4: (32, 32)}
"""Rows and columns of a tile with a product in it, by the bytes of an element: fp32 products take many registers."""

MOST_STATES = 256


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: one dtype, on one GPU, rows that are contiguous."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and all(t.dtype == first.dtype and t.stride(-1) == 1 for t in tensors)
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
    )


def project_and_mix(attended: Tensor, gate: Tensor, bias: Tensor, s: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """attended and gate `[B, T, D]`, bias of the gate `[D]`, s `[B, T, N]`, weight `[D, N]` -> out `[B, T, D]`, which
    may be attended. Recurrent is weight s; N at most MOST_STATES."""
    batch, tokens, width = attended.shape
    rows, columns = TILES[attended.element_size()]
    # Tiles of the same rows follow each other: what they read lies side by side in memory.
    grid = (triton.cdiv(tokens, rows) * triton.cdiv(width, columns), 1, batch)
    with _on(attended):
        _project_and_mix[grid](
            attended, gate, bias, s, weight, out,
            *(stride for t in (attended, gate, s, out) for stride in t.stride()[:2]), weight.stride(0),
            tokens, width, s.shape[2],
            ROWS=rows, COLUMNS=columns, STATES=max(16, triton.next_power_of_2(s.shape[2])), num_warps=8,
        )  # fmt: skip
    return out


def mix(attended: Tensor, recurrent: Tensor, gate: Tensor) -> Tensor:
    """All `[B, T, D]` -> out, the same."""
    out = torch.empty_like(attended, memory_format=torch.contiguous_format)
    tensors = (attended, recurrent, gate, out)
    with _on(attended):
        _mix[_grid(attended)](*tensors, *_strides(tensors), *attended.shape[1:], ROWS=8, COLUMNS=512, num_warps=4)
    return out


def mix_backward(grad: Tensor, attended: Tensor, recurrent: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to attended, recurrent and gate, all `[B, T, D]`."""
    grads = tuple(torch.empty_like(attended, memory_format=torch.contiguous_format) for _ in range(3))
    tensors = (grad, attended, recurrent, gate, *grads)
    with _on(attended):
        _mix_backward[_grid(attended)](
            *tensors, *_strides(tensors), *attended.shape[1:], ROWS=8, COLUMNS=512, num_warps=4
        )
    return grads


def _grid(like: Tensor) -> tuple[int, int, int]:
    batch, tokens, width = like.shape
    return triton.cdiv(tokens, 8), triton.cdiv(width, 512), batch


def _strides(tensors: tuple[Tensor, ...]) -> list[int]:
    """Of batch and token: the inputs' own, and of the outputs, which are all alike, one pair."""
    return [stride for t in tensors[: 4 if len(tensors) == 4 else 5] for stride in t.stride()[:2]]


def _on(like: Tensor) -> contextlib.AbstractContextManager:
    # On a CPU under Triton's interpreter, which tests use.
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


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
