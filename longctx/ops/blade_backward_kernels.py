"""Three Triton kernels that do one chunk of BLADE's reverse chain, for half precision on CUDA.

On it is only what the gradient of the state passes through, ds after a chunk -> ds before it. Its small products are
composed beforehand, and what does not depend on ds is taken off it, for all chunks at once:

    widen     ds = sum of partials;  dwide = gelu'(wide) (W_down^T dy + (W_state W_down)^T ds / C);  two sums a row
    turn      da = W_out^T (dy + W_state^T ds / C + norm'(W_up^T dwide));  partials of (W_v W_inject)^T sum(da)
    attend    partials of (W_q W_inject)^T sum(dq) from da

In `turn` the product with W_up and that with W_out are one, M = W_up g W_out. The rest of the norm's derivative takes
off the mean of each row and its part along the normed row n; both follow from dwide and wide alone:

    da = dy W_out + ds (W_state W_out) / C
         + (dwide M - c sum(dwide W_up g) / D - n W_out sum(dwide (wide - b)) / D) / std

with c the column sums of W_out and b = W_up norm_b + b_up. In `attend` no dq is formed: sum(dq) = sum_j sigma_j k_j
with sigma_j = (P^T da)_j v_j - (P^T delta)_j, delta the row sums of da * out.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.blade_kernels import MOST_PARTS, Composed, large_tiles_fit

WIDEN = (64, 128, 8)
TURN = (64, 64, 128, 4, 3)
ATTEND = (64, 64, 4, 2)
"""Tile sizes (rows, columns, for turn depth), warps, and pipeline stages."""


class ComposedBackward:
    """More products of weights: through `[4D, D]` is M above, through_sum `[D]` c, pass_mean `[N, D]` W_state W_out."""

    def __init__(self, composed: Composed) -> None:
        out_w = composed.plain[0]
        self.composed = composed
        self.through = torch.empty_like(composed.up)
        self.through_sum = torch.empty_like(composed.up_sum[: out_w.shape[0]])
        self.pass_mean = torch.empty_like(composed.plain[2])

    def compose(self) -> None:
        """From what `composed` holds now."""
        out_w, _, state_w = self.composed.plain
        torch.mm(self.composed.up, out_w, out=self.through)
        torch.sum(out_w, 0, dtype=torch.float32, out=self.through_sum)
        torch.mm(state_w, out_w, out=self.pass_mean)


@dataclass(frozen=True, kw_only=True)
class Reverse:
    """What the reverse chain of some chunks reads and writes.

    Read: qkv `[count, B, C, E]`, the queries injected; wide `[count, B * C, 4D]`, attended `[count, B, C, D]`, lse
    `[count, B, H, C]` fp32 as kept; rstd `[count, B, C]` fp32 of the norm before W_up; from_dy and along
    `[count, B, C, D]`: dy W_out and n W_out. Overwritten: dwide `[count, B * C, 4D]`, W_down^T dy before and the
    gradient of wide after; dattended `[count, B, C, D]`; dstates `[count, B, N padded]` fp32, the gradient of the state
    after each chunk; ds `[B, N]` fp32, of the state after the last chunk before and of that before the first after.
    """

    qkv: Tensor
    wide: Tensor
    attended: Tensor
    lse: Tensor
    rstd: Tensor
    from_dy: Tensor
    along: Tensor
    dwide: Tensor
    dattended: Tensor
    dstates: Tensor
    ds: Tensor


def reverse_chain(weights: ComposedBackward, chain: Reverse) -> None:
    """All chunks, from the last to the first."""
    composed = weights.composed
    count, batch, chunk, width = chain.attended.shape
    heads, groups = composed.heads, composed.groups
    states, padded = chain.ds.shape[1], chain.dstates.shape[2]
    head, wide = width // heads, chain.wide.shape[-1]
    widen_m, widen_n, widen_warps = WIDEN
    turn_m, turn_n, turn_k, turn_warps, turn_stages = TURN
    # A tile holds whole heads.
    turn_n = max(turn_n, head)
    if not large_tiles_fit(chain.ds.device, head):
        turn_k = 64
    attend_m, attend_n, attend_warps, attend_stages = ATTEND
    widen_grid = (triton.cdiv(chunk, widen_m), wide // widen_n, batch)
    turn_grid = (triton.cdiv(chunk, turn_m), width // turn_n, batch)
    attend_grid = (triton.cdiv(chunk, attend_n), heads, batch)
    first, parts = (grid[0] * grid[1] for grid in (turn_grid, attend_grid))

    ds = chain.ds
    halfway = ds.new_empty(batch, first, padded)
    partials = ds.new_zeros(batch, parts, padded)
    gathered = partials if parts <= MOST_PARTS else ds.new_zeros(batch, 1, padded)
    gathered[:, 0, :states] = ds
    moments = ds.new_empty(batch, chunk, wide // widen_n, 2)
    delta = ds.new_empty(batch, chunk, heads)
    columns = composed.inject.shape[1]
    with torch.cuda.device(ds.device) if ds.is_cuda else contextlib.nullcontext():
        for index in reversed(range(count)):
            _widen[widen_grid](
                chain.wide[index], chain.dwide[index], gathered, composed.state, composed.up_sum, composed.up_shift,
                moments, chain.dstates[index], chunk, states, 1.0 / chunk,
                WIDE=wide, PARTS=gathered.shape[1], PAD=padded, M=widen_m, N=widen_n,
                num_warps=widen_warps,
            )  # fmt: skip
            _turn[turn_grid](
                chain.dwide[index], weights.through, weights.through_sum, weights.pass_mean, composed.values,
                moments, chain.rstd[index], chain.from_dy[index], chain.along[index], chain.dstates[index],
                chain.dattended[index], chain.attended[index], delta, halfway, chunk, columns, states, 1.0 / chunk,
                D=width, HEAD=head, WIDE=wide, TILES=wide // widen_n, PAD_TILES=triton.next_power_of_2(wide // widen_n),
                PAD=padded, M=turn_m, N=turn_n, K=turn_k,
                num_warps=turn_warps, num_stages=turn_stages,
            )  # fmt: skip
            _attend_backward[attend_grid](
                chain.qkv[index], chain.dattended[index], chain.lse[index], delta, composed.inject, halfway, partials,
                chunk, width, chain.qkv.shape[-1], columns, states, first, parts, head**-0.5,
                GROUP=heads // groups, KV=groups * head, PAD=padded, K=head, M=attend_m, N=attend_n,
                num_warps=attend_warps, num_stages=attend_stages,
            )  # fmt: skip
            if gathered is not partials:
                torch.sum(partials, 1, keepdim=True, out=gathered)
    torch.sum(gathered[:, :, :states], 1, out=ds)


@triton.jit
def _widen(
    wide, dwide, partials, state, up_sum, up_shift, moments, dstates,
    chunk, states, inverse,
    WIDE: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = (item.to(tl.int64) * chunk + rows[:, None]) * WIDE + cols[None, :]
    u = tl.load(wide + place, mask=there, other=0.0).to(tl.float32)
    given = tl.load(dwide + place, mask=there, other=0.0).to(tl.float32)
    w = tl.load(state + channels[:, None] * WIDE + cols[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    sums, shift = tl.load(up_sum + cols), tl.load(up_shift + cols)
    slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)

    block = tl.zeros((64, PAD), tl.float32)
    for part in tl.static_range(0, PARTS, 64):
        parts = part + tl.arange(0, 64)
        places = (item * PARTS + parts[:, None]) * PAD + channels[None, :]
        block += tl.load(partials + places, mask=(parts < PARTS)[:, None], other=0.0)
    ds = tl.sum(block, 0)
    if (tile_m == 0) & (tile_n == 0):
        tl.store(dstates + item * PAD + channels, ds)
    added = tl.sum(w * ds[:, None], 0) * inverse
    grad = (slope * (given + added[None, :])).to(dwide.dtype.element_ty)
    tl.store(dwide + place, grad, mask=there)
    grad = tl.where(there, grad.to(tl.float32), 0.0)
    spot = moments + ((item * chunk + rows) * (WIDE // N) + tile_n) * 2
    tl.store(spot, tl.sum(grad * sums[None, :], 1), mask=rows < chunk)
    tl.store(spot + 1, tl.sum(grad * (u - shift[None, :]), 1), mask=rows < chunk)


@triton.jit
def _turn(
    dwide, through, through_sum, pass_mean, values, moments, rstd, from_dy, along, dstates, dattended, out,
    delta, partials, chunk, columns, states, inverse,
    D: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, PAD_TILES: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = item.to(tl.int64) * chunk + rows[:, None]
    bare = tl.load(from_dy + place * D + cols[None, :], mask=there, other=0.0).to(tl.float32)
    normed = tl.load(along + place * D + cols[None, :], mask=there, other=0.0).to(tl.float32)
    scale = tl.load(rstd + item * chunk + rows, mask=rows < chunk, other=0.0)
    o = tl.load(out + place * D + cols[None, :], mask=there, other=0.0)
    sums = tl.load(through_sum + cols)
    w = tl.load(pass_mean + channels[:, None] * D + cols[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    back = tl.load(values + cols[:, None] * columns + channels[None, :], mask=known[None, :], other=0.0)

    ds = tl.load(dstates + item * PAD + channels)
    bare += (tl.sum(w * ds[:, None], 0) * inverse)[None, :]
    pieces = tl.arange(0, PAD_TILES)
    counted = there & (pieces < TILES)[None, :]
    spot = moments + ((item * chunk + rows[:, None]) * TILES + pieces[None, :]) * 2
    mean = tl.sum(tl.load(spot, mask=counted, other=0.0), 1) / D
    part_along = tl.sum(tl.load(spot + 1, mask=counted, other=0.0), 1) / D
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, WIDE, K):
        inner = start + tl.arange(0, K)
        a = tl.load(dwide + place * WIDE + inner[None, :], mask=there, other=0.0)
        b = tl.load(through + inner[:, None] * D + cols[None, :])
        acc = tl.dot(a, b, acc)
    acc = bare + scale[:, None] * (acc - mean[:, None] * sums[None, :] - part_along[:, None] * normed)
    grad = acc.to(dattended.dtype.element_ty)
    tl.store(dattended + place * D + cols[None, :], grad, mask=there)
    HEADS: tl.constexpr = N // HEAD
    head = tile_n * HEADS + tl.arange(0, HEADS)
    by_head = tl.sum(tl.reshape(grad.to(tl.float32) * o.to(tl.float32), (M, HEADS, HEAD)), 2)
    tl.store(delta + place * (D // HEAD) + head[None, :], by_head, mask=there)
    total = tl.sum(tl.where(there, grad.to(tl.float32), 0.0), 0)
    part = tl.sum(back.to(tl.float32) * total[:, None], 0)
    tiles = tl.num_programs(0) * (D // N)
    tl.store(partials + (item * tiles + tile_m * (D // N) + tile_n) * PAD + channels, part)


@triton.jit
def _attend_backward(
    qkv, grad, lse, deltas, inject, halfway, partials,
    chunk, width, row, columns, states, first, parts, scale,
    GROUP: tl.constexpr, KV: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by most rows: they start first, as they are.
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PAD)
    known = channels < states
    lanes = tl.arange(0, K)
    base = qkv + item.to(tl.int64) * chunk * row
    cols = tile * N + tl.arange(0, N)
    inside = cols[:, None] < chunk
    keys = base + width + (head // GROUP) * K + cols[:, None] * row + lanes[None, :]
    k = tl.load(keys, mask=inside, other=0.0)
    v = tl.load(keys + KV, mask=inside, other=0.0)
    mine = (head * K + lanes) * columns
    injected = tl.load(inject + mine[:, None] + channels[None, :], mask=known[None, :], other=0.0)

    own = tile * tl.num_programs(1) + head
    part = tl.zeros((PAD,), tl.float32)
    for other in range(own, first, parts):
        part += tl.load(halfway + (item * first + other) * PAD + channels)
    acc = tl.zeros((N, K), tl.float32)
    weighted = tl.zeros((N,), tl.float32)
    for start in range((tile * N // M) * M, chunk, M):
        rows = start + tl.arange(0, M)
        there = rows[:, None] < chunk
        q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=there, other=0.0)
        place = (item.to(tl.int64) * chunk + rows[:, None]) * width + head * K + lanes[None, :]
        da = tl.load(grad + place, mask=there, other=0.0)
        top = tl.load(lse + (item * tl.num_programs(1) + head) * chunk + rows, mask=rows < chunk, other=0.0)
        spot = (item * chunk + rows) * tl.num_programs(1) + head
        delta = tl.load(deltas + spot, mask=rows < chunk, other=0.0)
        scores = tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634) - top[None, :] * 1.4426950408889634
        seen = (rows[None, :] >= cols[:, None]) & (rows[None, :] < chunk)
        p = tl.where(seen, tl.exp2(scores), 0.0).to(da.dtype)
        acc = tl.dot(p, da, acc)
        weighted += tl.sum(p.to(tl.float32) * delta[None, :], 1)
    share = tl.sum(acc * v.to(tl.float32), 1) - weighted
    dq = tl.sum(share[:, None] * k.to(tl.float32), 0) * scale
    part += tl.sum(injected.to(tl.float32) * dq[:, None], 0)
    tl.store(partials + (item * parts + own) * PAD + channels, part)
