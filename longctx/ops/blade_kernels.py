"""Three Triton kernels that do one chunk of BLADE's chain, for half precision on CUDA.

The chain is bound by latency, not by work. So its small products are composed beforehand, and what is left of them
rides on the three kernels that have to run one after the other:

    attend    s = c + sum of partials;  q + (W_q W_inject) s;  causal attention within the chunk
    project   r = x + W_out a + (W_out W_v W_inject) s;  row statistics of r;  partials of W_state mean(r)
    expand    gelu(W_up norm(r));  partials of (W_state W_down) mean(gelu)

The norm before W_up is taken out of the product: W_up norm(r) = ((W_up g) r - mean W_up g) / std + W_up b, so that
tiles of r go from memory to the tensor cores untouched. A partial is what one tile adds to the next s. They are summed
in a fixed order: the same input gives the same bits.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from longctx.ops.blade_chain import ChainWeights

MOST_PARTS = 256
"""Partials of a chunk that every program of `_attend` sums itself; more of them are summed beforehand, once."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes, warps and pipeline stages: rows, columns (for project and expand: and depth), warps, stages."""

    attend: tuple[int, int, int, int] = (64, 64, 4, 2)
    project: tuple[int, int, int, int, int] = (64, 64, 64, 4, 3)
    expand: tuple[int, int, int, int, int] = (64, 128, 64, 8, 3)


LARGE = Tiles(attend=(64, 128, 4, 3), project=(64, 64, 64, 4, 4), expand=(64, 128, 128, 8, 3))
"""The fastest on an H100, where a program has room for them: some 150 KiB of shared memory."""


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

    inject `[E, N + 1 or more]`: W_qkv [W_inject, b_inject]. values `[D, the same]`: its part of the values, for each
    query head. pass_on `[D, the same]`: W_out applied to that. up `[4D, D]`: W_up with the norm's gain. up_sum and
    up_shift `[4D]`, fp32: its row sums; W_up applied to the norm's bias, and b_up. state `[N, 4D]`: W_state W_down.
    constant `[N]`, fp32: W_state b_down + b_state. plain: W_out, b_out and W_state as they are; with copies=True copies
    of them, so that nothing that is read lies where the parameters do.
    """

    def __init__(self, weights: ChainWeights, *, copies: bool = False) -> None:
        qkv = weights.qkv
        rows, width = qkv.shape
        states = weights.inject[0].shape[1]
        columns = (states + 8) // 8 * 8
        self.weights: ChainWeights | None = weights
        self.heads, self.groups, self.eps = weights.n_heads, weights.num_kv_heads, weights.norm[2]
        self.plain = (*weights.out, weights.state[0])
        self.copies = copies
        if copies:
            self.plain = tuple(torch.empty_like(tensor) for tensor in self.plain)
        self.augmented = qkv.new_zeros(width, columns)
        self.inject = qkv.new_empty(rows, columns)
        self.values = qkv.new_empty(width, columns)
        self.pass_on = qkv.new_empty(width, columns)
        self.up = torch.empty_like(weights.up[0])
        self.up_sum, self.up_shift = (torch.empty_like(weights.up[1], dtype=torch.float32) for _ in range(2))
        self.state = qkv.new_empty(states, weights.down[0].shape[1])
        self.constant = qkv.new_empty(states, dtype=torch.float32)

    def compose(self) -> None:
        weights = self.weights
        states = weights.inject[0].shape[1]
        if self.copies:
            for copy, tensor in zip(self.plain, (*weights.out, weights.state[0]), strict=True):
                copy.copy_(tensor)
        self.augmented[:, :states] = weights.inject[0]
        self.augmented[:, states] = weights.inject[1]
        torch.mm(weights.qkv, self.augmented, out=self.inject)
        width = weights.qkv.shape[1]
        values = self.inject[(width + weights.qkv.shape[0]) // 2 :]
        group = weights.n_heads // weights.num_kv_heads
        if group == 1:
            self.values.copy_(values)
        else:
            heads = values.view(weights.num_kv_heads, 1, -1, values.shape[1]).expand(-1, group, -1, -1)
            self.values.view(heads.shape).copy_(heads)
        torch.mm(weights.out[0], self.values, out=self.pass_on)
        torch.mul(weights.up[0], weights.norm[0], out=self.up)
        # Of the rounded product: the mean of a row then cancels exactly.
        torch.sum(self.up, 1, dtype=torch.float32, out=self.up_sum)
        self.up_shift.copy_(torch.addmv(weights.up[1], weights.up[0], weights.norm[1]))
        torch.mm(weights.state[0], weights.down[0], out=self.state)
        self.constant.copy_(torch.addmv(weights.state[1], weights.state[0], weights.down[1]))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What training keeps of a chain beside its residual: wide `[count, B * C, 4D]`, the hidden rows before GELU,
    attended `[count, B, C, D]` without what the injection adds to it, its log-sum-exp `[count, B, H, C]` and the states
    `[count, B, N padded]` at the start of each chunk, both in fp32."""

    wide: Tensor
    attended: Tensor
    lse: Tensor
    states: Tensor


def padded_states(states: int) -> int:
    """Channels of a state as the kernels hold it."""
    return max(16, triton.next_power_of_2(states))


def fused_chain(
    composed: Composed,
    residual: Tensor,
    qkv: Tensor,
    hidden: Tensor,
    s: Tensor,
    *,
    kept: Kept | None = None,
    tiles: Tiles | None = None,
) -> None:
    """All chunks of a slab: qkv `[count, B, C, E]` and s `[B, N]` fp32 are read, residual `[count, B, C, D]` holds x.

    Overwrites residual (x + mixer), hidden `[count, B * C, 4D]` (after GELU), s (after the last chunk), and kept.
    """
    count, batch, chunk, width = residual.shape
    heads, groups = composed.heads, composed.groups
    states, head = s.shape[1], width // heads
    wide = hidden.shape[-1]
    padded = padded_states(states)
    tiles = tiles or (LARGE if large_tiles_fit(residual.device, head) else Tiles())
    attend_m, attend_n, attend_warps, attend_stages = tiles.attend
    project_m, project_n, project_k, project_warps, project_stages = tiles.project
    expand_m, expand_n, expand_k, expand_warps, expand_stages = tiles.expand
    expand_k = expand_k if width % expand_k == 0 else 64
    project_grid = (triton.cdiv(chunk, project_m), width // project_n, batch)
    expand_grid = (triton.cdiv(chunk, expand_m), wide // expand_n, batch)
    attend_grid = (triton.cdiv(chunk, attend_m), heads, batch)
    first, parts = (grid[0] * grid[1] for grid in (project_grid, expand_grid))

    halfway = s.new_empty(batch, first, padded)
    partials = s.new_zeros(batch, parts, padded)
    gathered = partials if parts <= MOST_PARTS else s.new_zeros(batch, 1, padded)
    torch.sub(s, composed.constant, out=gathered[:, 0, :states])
    present = [s.new_empty(batch, padded)] * count if kept is None else kept.states
    attended = [residual.new_empty(batch, chunk, width)] * count if kept is None else kept.attended
    # Where nothing is kept, nothing is written to what stands for it.
    lse, wide_rows = ([s] * count, hidden) if kept is None else (kept.lse, kept.wide)
    out_w, out_b, state_w = composed.plain
    stats = s.new_empty(batch, chunk, width // project_n, 2)
    columns = composed.inject.shape[1]
    # On a CPU under Triton's interpreter, which tests use.
    with torch.cuda.device(residual.device) if residual.is_cuda else contextlib.nullcontext():
        for index in range(count):
            _attend[attend_grid](
                qkv[index], attended[index], lse[index], gathered, composed.constant, composed.inject, present[index],
                chunk, width, qkv.shape[-1], columns, states, head**-0.5 * 1.4426950408889634,
                GROUP=heads // groups, KV=groups * head, PARTS=gathered.shape[1], PAD=padded,
                K=head, M=attend_m, N=attend_n, KEEP=kept is not None,
                num_warps=attend_warps, num_stages=attend_stages,
            )  # fmt: skip
            _project[project_grid](
                attended[index], out_w, out_b, composed.pass_on, present[index], state_w,
                residual[index], stats, halfway, chunk, columns, states, 1.0 / chunk,
                D=width, PAD=padded, M=project_m, N=project_n, K=project_k,
                num_warps=project_warps, num_stages=project_stages,
            )  # fmt: skip
            _expand[expand_grid](
                residual[index], stats, composed.up, composed.up_sum, composed.up_shift, composed.state,
                hidden[index], wide_rows[index], halfway, partials,
                chunk, states, first, parts, 1.0 / chunk, composed.eps,
                D=width, WIDE=wide, TILE=project_n, TILES=width // project_n,
                PAD_TILES=triton.next_power_of_2(width // project_n), PAD=padded,
                M=expand_m, N=expand_n, K=expand_k, KEEP=kept is not None,
                num_warps=expand_warps, num_stages=expand_stages,
            )  # fmt: skip
            if gathered is not partials:
                torch.sum(partials, 1, keepdim=True, out=gathered)
    torch.sum(gathered[:, :, :states], 1, out=s)
    s.add_(composed.constant)


def large_tiles_fit(device: torch.device, head: int) -> bool:
    """Whether the device has the shared memory for large tiles of heads of this width."""
    if device.type != "cuda" or head > 64:
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 160 << 10


@triton.jit
def _attend(
    qkv, out, lse, partials, constant, inject, present,
    chunk, width, row, columns, states, scale,
    GROUP: tl.constexpr, KV: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr,
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
    base = qkv + item.to(tl.int64) * chunk * row
    rows = tile * M + tl.arange(0, M)
    there = rows[:, None] < chunk
    q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=there, other=0.0)

    block = tl.zeros((64, PAD), tl.float32)
    for part in tl.static_range(0, PARTS, 64):
        parts = part + tl.arange(0, 64)
        places = (item * PARTS + parts[:, None]) * PAD + channels[None, :]
        block += tl.load(partials + places, mask=(parts < PARTS)[:, None], other=0.0)
    s = tl.sum(block, 0) + tl.load(constant + channels, mask=known, other=0.0)
    if (tile == 0) & (head == 0):
        tl.store(present + item * PAD + channels, s)
    shift = tl.sum(injected.to(tl.float32) * s[None, :], 1) + bias
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
    if KEEP:
        place = (item * tl.num_programs(1) + head) * chunk + rows
        tl.store(lse + place, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < chunk)


@triton.jit
def _project(
    attended, weight, bias, pass_on, present, state, residual, stats, partials,
    chunk, columns, states, inverse,
    D: tl.constexpr, PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = (item.to(tl.int64) * chunk + rows[:, None]) * D
    x = tl.load(residual + place + cols[None, :], mask=there, other=0.0).to(tl.float32)
    through = tl.load(pass_on + cols[:, None] * columns + channels[None, :], mask=known[None, :], other=0.0)
    fixed = tl.load(bias + cols).to(tl.float32) + tl.load(pass_on + cols * columns + states).to(tl.float32)
    w = tl.load(state + channels[:, None] * D + cols[None, :], mask=known[:, None], other=0.0)

    s = tl.load(present + item * PAD + channels)
    shift = tl.sum(through.to(tl.float32) * s[None, :], 1) + fixed
    acc = x + shift[None, :]
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        a = tl.load(attended + place + inner[None, :], mask=there, other=0.0)
        b = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    r = acc.to(residual.dtype.element_ty)
    tl.store(residual + place + cols[None, :], r, mask=there)

    # Mean and squared deviations of each row within this tile: the next kernel joins them without cancellation.
    r = tl.where(there, r.to(tl.float32), 0.0)
    mean = tl.sum(r, 1) / N
    away = r - mean[:, None]
    spot = stats + ((item * chunk + rows) * (D // N) + tile_n) * 2
    tl.store(spot, mean, mask=rows < chunk)
    tl.store(spot + 1, tl.sum(away * away, 1), mask=rows < chunk)
    part = tl.sum(w.to(tl.float32) * tl.sum(r, 0)[None, :], 1) * inverse
    tiles = tl.num_programs(0) * (D // N)
    tl.store(partials + (item * tiles + tile_m * (D // N) + tile_n) * PAD + channels, part)


@triton.jit
def _expand(
    residual, stats, weight, weight_sum, weight_shift, state, hidden, wide, halfway, partials,
    chunk, states, first, parts, inverse, eps,
    D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PAD_TILES: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    sums, shift = tl.load(weight_sum + cols), tl.load(weight_shift + cols)
    w = tl.load(state + channels[:, None] * WIDE + cols[None, :], mask=known[:, None], other=0.0)

    pieces = tl.arange(0, PAD_TILES)
    counted = there & (pieces < TILES)[None, :]
    spot = stats + ((item * chunk + rows[:, None]) * TILES + pieces[None, :]) * 2
    means = tl.load(spot, mask=counted, other=0.0)
    squares = tl.load(spot + 1, mask=counted, other=0.0)
    mean = tl.sum(means, 1) / TILES
    away = tl.where(counted, means - mean[:, None], 0.0)
    variance = (tl.sum(squares, 1) + TILE * tl.sum(away * away, 1)) / D
    inverse_std = tl.rsqrt(variance + eps)
    # Of the partials of the kernel before, each program passes on its share.
    own = tile_m * (WIDE // N) + tile_n
    part = tl.zeros((PAD,), tl.float32)
    for other in range(own, first, parts):
        part += tl.load(halfway + (item * first + other) * PAD + channels)

    place = item.to(tl.int64) * chunk + rows[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        a = tl.load(residual + place * D + inner[None, :], mask=there, other=0.0)
        b = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    acc = (acc - mean[:, None] * sums[None, :]) * inverse_std[:, None] + shift[None, :]
    if KEEP:
        tl.store(wide + place * WIDE + cols[None, :], acc.to(wide.dtype.element_ty), mask=there)
    acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    tl.store(hidden + place * WIDE + cols[None, :], acc.to(hidden.dtype.element_ty), mask=there)
    part += tl.sum(w.to(tl.float32) * tl.sum(tl.where(there, acc, 0.0), 0)[None, :], 1) * inverse
    tl.store(partials + (item * parts + own) * PAD + channels, part)
