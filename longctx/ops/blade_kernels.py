"""Three Triton kernels that do one chunk of BLADE's chain, for half precision on CUDA.

The chain is bound by the number of launches, not by work. So its small products are composed beforehand, and what is
left of them rides on the three kernels that have to run one after the other:

    attend    s = c + sum of partials;  q + (W_q W_inject) s;  causal attention within the chunk
    project   r = x + W_out a + (W_out W_v W_inject) s;  row statistics of r;  partials of W_state mean(r)
    expand    gelu(W_up norm(r));  partials of (W_state W_down) mean(gelu)

A partial is what one tile adds to the next s. They are summed in a fixed order: the same input gives the same bits.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longctx.ops.blade_chain import ChainWeights


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes (rows, columns), warps and pipeline stages of each kernel."""

    attend: tuple[int, int, int, int] = (64, 64, 4, 2)
    project: tuple[int, int, int, int] = (64, 64, 4, 3)
    expand: tuple[int, int, int, int] = (64, 128, 8, 3)


def fits(weights: ChainWeights) -> bool:
    """Whether the kernels can do a chain with these weights."""
    width = weights.qkv.shape[1]
    return (
        weights.qkv.is_cuda
        and weights.qkv.dtype in (torch.float16, torch.bfloat16)
        and weights.global_tokens is None
        and width % 64 == 0
        and width // weights.n_heads in (16, 32, 64, 128)
        and weights.inject[0].shape[1] <= 128
        and all(tensor.is_contiguous() for tensor in weights.tensors)
        and torch.cuda.get_device_capability(weights.qkv.device) >= (8, 0)
    )


class Composed:
    """Products of weights that the kernels read, in tensors of their own: `compose` puts the present values there.

    inject `[E, N + 1 or more]`: W_qkv [W_inject, b_inject]. pass_on `[D, the same]`: W_out applied to its part of the
    values. state `[N, 4D]`: W_state W_down. constant `[N]`: W_state b_down + b_state, in fp32.
    """

    def __init__(self, weights: ChainWeights) -> None:
        qkv = weights.qkv
        rows, width = qkv.shape
        states = weights.inject[0].shape[1]
        columns = (states + 8) // 8 * 8
        self.weights = weights
        self.augmented = qkv.new_zeros(width, columns)
        self.inject = qkv.new_empty(rows, columns)
        self.pass_on = qkv.new_empty(width, columns)
        self.state = qkv.new_empty(states, weights.down[0].shape[1])
        self.constant = qkv.new_empty(states, dtype=torch.float32)

    def compose(self) -> None:
        weights = self.weights
        states = weights.inject[0].shape[1]
        self.augmented[:, :states] = weights.inject[0]
        self.augmented[:, states] = weights.inject[1]
        torch.mm(weights.qkv, self.augmented, out=self.inject)
        width = weights.qkv.shape[1]
        values = self.inject[(width + weights.qkv.shape[0]) // 2 :]
        group = weights.n_heads // weights.num_kv_heads
        if group > 1:
            heads = values.view(weights.num_kv_heads, -1, values.shape[1])
            values = heads.repeat_interleave(group, dim=0).flatten(0, 1)
        torch.mm(weights.out[0], values, out=self.pass_on)
        torch.mm(weights.state[0], weights.down[0], out=self.state)
        self.constant.copy_(torch.addmv(weights.state[1], weights.state[0], weights.down[1]))


def fused_chain(
    composed: Composed, residual: Tensor, qkv: Tensor, hidden: Tensor, s: Tensor, tiles: Tiles = Tiles()
) -> None:
    """All chunks of a slab: qkv `[count, B, C, E]` and s `[B, N]` fp32 are read, residual `[count, B, C, D]` holds x.

    Overwrites residual (x + mixer), hidden `[count, B * C, 4D]` (after GELU) and s (after the last chunk).
    """
    weights = composed.weights
    count, batch, chunk, width = residual.shape
    heads, groups = weights.n_heads, weights.num_kv_heads
    states, head = s.shape[1], width // weights.n_heads
    wide = hidden.shape[-1]
    padded = max(16, triton.next_power_of_2(states))
    attend_m, attend_n, attend_warps, attend_stages = tiles.attend
    project_m, project_n, project_warps, project_stages = tiles.project
    expand_m, expand_n, expand_warps, expand_stages = tiles.expand
    project_grid = (triton.cdiv(chunk, project_m), width // project_n, batch)
    expand_grid = (triton.cdiv(chunk, expand_m), wide // expand_n, batch)
    attend_grid = (triton.cdiv(chunk, attend_m), heads, batch)
    first = project_grid[0] * project_grid[1]
    parts = first + expand_grid[0] * expand_grid[1]

    partials = s.new_zeros(batch, parts, padded)
    torch.sub(s, composed.constant, out=partials[:, 0, :states])
    present = s.new_empty(batch, padded)
    stats = s.new_empty(batch, chunk, width // project_n, 2)
    attended = residual.new_empty(batch, chunk, width)
    columns = composed.inject.shape[1]
    norm_w, norm_b, eps = weights.norm
    for index in range(count):
        _attend[attend_grid](
            qkv[index], attended, partials, composed.constant, composed.inject, present,
            chunk, width, qkv.shape[-1], columns, states, head**-0.5 * 1.4426950408889634,
            GROUP=heads // groups, KV=groups * head, PARTS=parts, PAD=padded, K=head, M=attend_m, N=attend_n,
            num_warps=attend_warps, num_stages=attend_stages,
        )  # fmt: skip
        _project[project_grid](
            attended, weights.out[0], weights.out[1], composed.pass_on, present, weights.state[0],
            residual[index], stats, partials, chunk, columns, states, parts, 1.0 / chunk,
            D=width, PAD=padded, M=project_m, N=project_n, K=64,
            num_warps=project_warps, num_stages=project_stages,
        )  # fmt: skip
        _expand[expand_grid](
            residual[index], stats, norm_w, norm_b, weights.up[0], weights.up[1], composed.state,
            hidden[index], partials, chunk, states, first, parts, 1.0 / chunk, eps,
            D=width, WIDE=wide, TILE=project_n, TILES=width // project_n,
            PAD_TILES=triton.next_power_of_2(width // project_n), PAD=padded, M=expand_m, N=expand_n, K=64,
            num_warps=expand_warps, num_stages=expand_stages,
        )  # fmt: skip
    torch.sum(partials[:, :, :states], 1, out=s)
    s.add_(composed.constant)


@triton.jit
def _attend(
    qkv, out, partials, constant, inject, present,
    chunk, width, row, columns, states, scale,
    GROUP: tl.constexpr, KV: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # The last rows see most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, item = tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PAD)
    known = channels < states
    lanes = tl.arange(0, K)
    mine = (head * K + lanes) * columns
    injected = tl.load(inject + mine[:, None] + channels[None, :], mask=known[None, :], other=0.0)
    bias = tl.load(inject + mine + states).to(tl.float32)
    s = tl.load(constant + channels, mask=known, other=0.0)
    for part in tl.static_range(0, PARTS, 64):
        parts = part + tl.arange(0, 64)
        block = tl.load(
            partials + (item * PARTS + parts[:, None]) * PAD + channels[None, :],
            mask=(parts < PARTS)[:, None] & known[None, :],
            other=0.0,
        )
        s += tl.sum(block, 0)
    if (tile == 0) & (head == 0):
        tl.store(present + item * PAD + channels, s)
    shift = tl.sum(injected.to(tl.float32) * s[None, :], 1) + bias

    base = qkv + item.to(tl.int64) * chunk * row
    rows = tile * M + tl.arange(0, M)
    there = rows[:, None] < chunk
    q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=there, other=0.0)
    q = (q.to(tl.float32) + shift[None, :]).to(qkv.dtype.element_ty)
    keys = base + width + (head // GROUP) * K
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, K), tl.float32)
    for start in range(0, min((tile + 1) * M, chunk), N):
        cols = start + tl.arange(0, N)
        inside = cols[:, None] < chunk
        k = tl.load(keys + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)
        v = tl.load(keys + KV + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(rows[:, None] >= cols[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    acc = acc / total[:, None]
    target = out + (item.to(tl.int64) * chunk + rows[:, None]) * width + head * K + lanes[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def _project(
    attended, weight, bias, pass_on, present, state, residual, stats, partials,
    chunk, columns, states, parts, inverse,
    D: tl.constexpr, PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = (item.to(tl.int64) * chunk + rows[:, None]) * D
    # What does not wait for the products is loaded ahead of them.
    x = tl.load(residual + place + cols[None, :], mask=there, other=0.0).to(tl.float32)
    s = tl.load(present + item * PAD + channels, mask=known, other=0.0)
    through = tl.load(pass_on + cols[:, None] * columns + channels[None, :], mask=known[None, :], other=0.0)
    shift = tl.sum(through.to(tl.float32) * s[None, :], 1)
    shift += tl.load(bias + cols).to(tl.float32) + tl.load(pass_on + cols * columns + states).to(tl.float32)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        a = tl.load(attended + place + inner[None, :], mask=there, other=0.0)
        w = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(a, tl.trans(w), acc)
    r = (acc + x + shift[None, :]).to(residual.dtype.element_ty)
    tl.store(residual + place + cols[None, :], r, mask=there)

    # Mean and squared deviations of each row within this tile: the next kernel joins them without cancellation.
    r = tl.where(there, r.to(tl.float32), 0.0)
    mean = tl.sum(r, 1) / N
    away = r - mean[:, None]
    spot = stats + ((item * chunk + rows) * (D // N) + tile_n) * 2
    tl.store(spot, mean, mask=rows < chunk)
    tl.store(spot + 1, tl.sum(away * away, 1), mask=rows < chunk)
    w = tl.load(state + channels[:, None] * D + cols[None, :], mask=known[:, None], other=0.0)
    part = tl.sum(w.to(tl.float32) * tl.sum(r, 0)[None, :], 1) * inverse
    tl.store(partials + (item * parts + tile_m * (D // N) + tile_n) * PAD + channels, part)


@triton.jit
def _expand(
    residual, stats, norm_w, norm_b, weight, bias, state, hidden, partials,
    chunk, states, first, parts, inverse, eps,
    D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PAD_TILES: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    pieces = tl.arange(0, PAD_TILES)
    counted = there & (pieces < TILES)[None, :]
    spot = stats + ((item * chunk + rows[:, None]) * TILES + pieces[None, :]) * 2
    means = tl.load(spot, mask=counted, other=0.0)
    squares = tl.load(spot + 1, mask=counted, other=0.0)
    mean = tl.sum(means, 1) / TILES
    away = tl.where(counted, means - mean[:, None], 0.0)
    variance = (tl.sum(squares, 1) + TILE * tl.sum(away * away, 1)) / D
    inverse_std = tl.rsqrt(variance + eps)
    place = item.to(tl.int64) * chunk + rows[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        r = tl.load(residual + place * D + inner[None, :], mask=there, other=0.0).to(tl.float32)
        gain, offset = tl.load(norm_w + inner).to(tl.float32), tl.load(norm_b + inner).to(tl.float32)
        r = (r - mean[:, None]) * inverse_std[:, None] * gain[None, :] + offset[None, :]
        w = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(r.to(w.dtype), tl.trans(w), acc)
    acc += tl.load(bias + cols).to(tl.float32)[None, :]
    acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    tl.store(hidden + place * WIDE + cols[None, :], acc.to(hidden.dtype.element_ty), mask=there)

    channels = tl.arange(0, PAD)
    known = channels < states
    w = tl.load(state + channels[:, None] * WIDE + cols[None, :], mask=known[:, None], other=0.0)
    part = tl.sum(w.to(tl.float32) * tl.sum(tl.where(there, acc, 0.0), 0)[None, :], 1) * inverse
    tl.store(partials + (item * parts + first + tile_m * (WIDE // N) + tile_n) * PAD + channels, part)
