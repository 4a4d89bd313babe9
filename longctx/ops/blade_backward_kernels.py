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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.blade_composed import Composed, padded_states
from longctx.ops.blade_kernels import MOST_PARTS, fetch_rows, large_tiles_fit, share_of, summed
from longctx.ops.blade_table import at, rows_at
from longctx.ops.launch import launch, launches_early

WIDEN = (64, 128, 8)
TURN = (64, 64, 128, 4, 4)
ATTEND = (64, 64, 4, 2)
"""Tile sizes (rows, columns, for turn depth), warps, and pipeline stages."""


class ComposedBackward:
    """More products of weights: through `[4D, D]` is M above, through_sum `[D]` c, pass_mean `[N, D]` W_state W_out."""

    def __init__(self, composed: Composed) -> None:
        out_w = composed.weights.out[0]
        self.composed = composed
        self.through = torch.empty_like(composed.up)
        self.through_sum = torch.empty_like(composed.up_sum[: out_w.shape[0]])
        self.pass_mean = torch.empty_like(composed.weights.state[0])

    def compose(self) -> None:
        """From what `composed` holds now."""
        out_w, state_w = self.composed.weights.out[0], self.composed.weights.state[0]
        torch.mm(self.composed.up, out_w, out=self.through)
        torch.sum(out_w, 0, dtype=torch.float32, out=self.through_sum)
        torch.mm(state_w, out_w, out=self.pass_mean)


@dataclass(frozen=True, kw_only=True)
class ReverseRows:
    """What the reverse chain of some chunks reads and writes, all contiguous.

    Read: qkv `[count, B, C, E]`, the queries injected; wide `[count, B * C, 4D]`, attended `[count, B, C, D]`, lse
    `[count, B, H, C]` fp32 as kept; rstd `[count, B, C]` fp32 of the norm before W_up; from_dy and along
    `[count, B, C, D]`: dy W_out and n W_out. Overwritten: dwide `[count, B * C, 4D]`, W_down^T dy before and the
    gradient of wide after; dattended `[count, B, C, D]`, which may be from_dy; dstates `[count, B, N]` fp32, the
    gradient of the state after each chunk.
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

    @property
    def entries(self) -> list[Tensor]:
        """In the order in which the kernels look them up."""
        kept = [self.qkv, self.wide, self.attended, self.lse, self.rstd, self.from_dy, self.along]
        return [*kept, self.dwide, self.dattended, self.dstates]


QKV, WIDE_ROWS, ATTENDED, LSE, RSTD, FROM_DY, ALONG, DWIDE, DATTENDED, DSTATES = map(tl.constexpr, range(10))


class Backward:
    """The three kernels for chunks of one shape, and the memory in which they hand each other sums."""

    def __init__(self, weights: ComposedBackward, batch: int, chunk: int) -> None:
        self.weights, self.batch, self.chunk = weights, batch, chunk
        composed = weights.composed
        sums = composed.constant
        width, wide, heads = composed.values.shape[0], composed.up.shape[0], composed.heads
        self.head = width // heads
        self.padded = padded_states(len(sums))
        self.early = launches_early(sums.device)
        self.options = {"launch_pdl": True} if self.early else {}
        turn_m, turn_n, turn_k, *rest = TURN
        # A tile holds whole heads.
        turn_n = max(turn_n, self.head)
        if not large_tiles_fit(sums.device, self.head):
            turn_k = 64
        self.turn = (turn_m, turn_n, turn_k, *rest)
        widen_m, widen_n, _ = WIDEN
        self.widen_grid = (triton.cdiv(chunk, widen_m), wide // widen_n, batch)
        self.turn_grid = (triton.cdiv(chunk, turn_m), width // turn_n, batch)
        self.attend_grid = (triton.cdiv(chunk, ATTEND[1]), heads, batch)
        self.first, self.parts = (grid[0] * grid[1] for grid in (self.turn_grid, self.attend_grid))
        self.halfway = sums.new_empty(batch, self.first, self.padded)
        self.partials = sums.new_zeros(batch, self.parts, self.padded)
        few = self.parts <= MOST_PARTS
        self.gathered = self.partials if few else sums.new_zeros(batch, 1, self.padded)
        self.moments = sums.new_empty(batch, chunk, wide // widen_n, 2)
        self.delta = sums.new_empty(batch, chunk, heads)

    def run(self, table: Tensor, ds: Tensor, count: int) -> None:
        """`count` chunks from the last to the first: ds `[B, N]` fp32, gradient of the state behind them, becomes that
        of the state before."""
        gathered, states = self.gathered, ds.shape[1]
        gathered.zero_()
        # By a kernel, not by a copy of memory, behind which no kernel can be launched early.
        torch.mul(ds, 1.0, out=gathered[:, 0, :states])
        for index in reversed(range(count)):
            self._chunk(table, index, ahead=int(index > 0))
            if gathered is not self.partials:
                torch.sum(self.partials, 1, keepdim=True, out=gathered)
        torch.sum(gathered[:, :, :states], 1, out=ds)

    def _chunk(self, table: Tensor, index: int, ahead: int) -> None:
        weights, composed, chunk, padded = self.weights, self.weights.composed, self.chunk, self.padded
        width, wide, states = composed.values.shape[0], composed.up.shape[0], len(composed.constant)
        rows, columns = composed.inject.shape
        heads, groups, head = composed.heads, composed.groups, self.head
        early, more = self.early, self.options
        tile_m, tile_n, warps = WIDEN
        values = (table, self.gathered, composed.state, composed.up_sum, composed.up_shift, self.moments)
        constants = {"WIDE": wide, "PARTS": self.gathered.shape[1], "PAD": padded, "M": tile_m, "N": tile_n}
        constants["EARLY"] = early
        launch(
            _widen, self.widen_grid, (*values, index, chunk, states, 1.0 / chunk), constants, num_warps=warps, **more
        )

        tiles = wide // tile_n
        constants = {"D": width, "HEAD": head, "WIDE": wide, "TILES": tiles, "PAD_TILES": triton.next_power_of_2(tiles)}
        tile_m, tile_n, tile_k, warps, stages = self.turn
        values = (table, weights.through, weights.through_sum, weights.pass_mean, composed.values, self.moments)
        values = (*values, self.delta, self.halfway, index, chunk, columns, states, 1.0 / chunk)
        constants |= {"PAD": padded, "M": tile_m, "N": tile_n, "K": tile_k, "EARLY": early}
        launch(_turn, self.turn_grid, values, constants, num_warps=warps, num_stages=stages, **more)

        tile_m, tile_n, warps, stages = ATTEND
        values = (table, self.delta, composed.inject, self.halfway, self.partials, index, ahead, chunk, width, rows)
        values = (*values, columns, states, self.first, self.parts, head**-0.5)
        constants = {"GROUP": heads // groups, "KV": groups * head, "PAD": padded, "K": head, "M": tile_m, "N": tile_n}
        constants |= {"SHARES": -(-self.first // self.parts), "EARLY": early}
        launch(_attend_backward, self.attend_grid, values, constants, num_warps=warps, num_stages=stages, **more)


@triton.jit(do_not_specialize=["index"])
def _widen(
    table, partials, state, up_sum, up_shift, moments, index, chunk, states, inverse,
    WIDE: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = index.to(tl.int64) * tl.num_programs(2) + item
    spots = rows[:, None] * WIDE + cols[None, :]
    dwide = rows_at(table, DWIDE, state, place * chunk * WIDE) + spots
    u = tl.load(rows_at(table, WIDE_ROWS, state, place * chunk * WIDE) + spots, mask=there, other=0.0).to(tl.float32)
    given = tl.load(dwide, mask=there, other=0.0).to(tl.float32)
    w = tl.load(state + channels[:, None] * WIDE + cols[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    sums, shift = tl.load(up_sum + cols), tl.load(up_shift + cols)
    slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    handed_on = at(table, DSTATES, up_sum, place * states)

    if EARLY:
        tl.extra.cuda.gdc_wait()
    ds = summed(partials, item, PARTS, PAD)
    if (tile_m == 0) & (tile_n == 0):
        tl.store(handed_on + channels, ds, mask=known)
    added = tl.sum(w * ds[:, None], 0) * inverse
    grad = (slope * (given + added[None, :])).to(state.dtype.element_ty)
    tl.store(dwide, grad, mask=there)
    grad = tl.where(there, grad.to(tl.float32), 0.0)
    spot = moments + ((item * chunk + rows) * (WIDE // N) + tile_n) * 2
    tl.store(spot, tl.sum(grad * sums[None, :], 1), mask=rows < chunk)
    tl.store(spot + 1, tl.sum(grad * (u - shift[None, :]), 1), mask=rows < chunk)


@triton.jit(do_not_specialize=["index"])
def _turn(
    table, through, through_sum, pass_mean, values, moments, delta, partials,
    index, chunk, columns, states, inverse,
    D: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, PAD_TILES: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = index.to(tl.int64) * tl.num_programs(2) + item
    base, spots = place * chunk * D, rows[:, None] * D + cols[None, :]
    bare = tl.load(rows_at(table, FROM_DY, through, base) + spots, mask=there, other=0.0).to(tl.float32)
    normed = tl.load(rows_at(table, ALONG, through, base) + spots, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(at(table, RSTD, through_sum, place * chunk) + rows, mask=rows < chunk, other=0.0)
    o = tl.load(rows_at(table, ATTENDED, through, base) + spots, mask=there, other=0.0)
    dwide = rows_at(table, DWIDE, through, place * chunk * WIDE) + rows[:, None] * WIDE
    sums = tl.load(through_sum + cols)
    w = tl.load(pass_mean + channels[:, None] * D + cols[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    back = tl.load(values + cols[:, None] * columns + channels[None, :], mask=known[None, :], other=0.0)
    handed_on = at(table, DSTATES, through_sum, place * states)
    dattended = rows_at(table, DATTENDED, through, base) + spots

    if EARLY:
        tl.extra.cuda.gdc_wait()
    # What these are for comes behind the product, whose first tiles are then under way with them.
    ds = tl.load(handed_on + channels, mask=known, other=0.0)
    pieces = tl.arange(0, PAD_TILES)
    counted = there & (pieces < TILES)[None, :]
    spot = moments + ((item * chunk + rows[:, None]) * TILES + pieces[None, :]) * 2
    means, parts_along = tl.load(spot, mask=counted, other=0.0), tl.load(spot + 1, mask=counted, other=0.0)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, WIDE, K):
        inner = start + tl.arange(0, K)
        a = tl.load(dwide + inner[None, :], mask=there, other=0.0)
        b = tl.load(through + inner[:, None] * D + cols[None, :])
        acc = tl.dot(a, b, acc)
    bare += (tl.sum(w * ds[:, None], 0) * inverse)[None, :]
    mean, part_along = tl.sum(means, 1) / D, tl.sum(parts_along, 1) / D
    acc = bare + scale[:, None] * (acc - mean[:, None] * sums[None, :] - part_along[:, None] * normed)
    grad = acc.to(through.dtype.element_ty)
    tl.store(dattended, grad, mask=there)
    HEADS: tl.constexpr = N // HEAD
    head = tile_n * HEADS + tl.arange(0, HEADS)
    by_head = tl.sum(tl.reshape(grad.to(tl.float32) * o.to(tl.float32), (M, HEADS, HEAD)), 2)
    tl.store(delta + (item * chunk + rows[:, None]) * (D // HEAD) + head[None, :], by_head, mask=there)
    total = tl.sum(tl.where(there, grad.to(tl.float32), 0.0), 0)
    part = tl.sum(back.to(tl.float32) * total[:, None], 0)
    tiles = tl.num_programs(0) * (D // N)
    tl.store(partials + (item * tiles + tile_m * (D // N) + tile_n) * PAD + channels, part)


@triton.jit(do_not_specialize=["index", "ahead"])
def _attend_backward(
    table, deltas, inject, halfway, partials, index, ahead, chunk, width, row, columns, states, first, parts, scale,
    GROUP: tl.constexpr, KV: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SHARES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # The first keys are seen by most rows: they start first, as they are.
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PAD)
    known = channels < states
    lanes = tl.arange(0, K)
    place = index.to(tl.int64) * tl.num_programs(2) + item
    base = rows_at(table, QKV, inject, place * chunk * row)
    grad = rows_at(table, DATTENDED, inject, place * chunk * width) + head * K
    lse = at(table, LSE, deltas, (place * tl.num_programs(1) + head) * chunk)
    cols = tile * N + tl.arange(0, N)
    inside = cols[:, None] < chunk
    keys = base + width + (head // GROUP) * K + cols[:, None] * row + lanes[None, :]
    k = tl.load(keys, mask=inside, other=0.0)
    v = tl.load(keys + KV, mask=inside, other=0.0)
    mine = (head * K + lanes) * columns
    injected = tl.load(inject + mine[:, None] + channels[None, :], mask=known[None, :], other=0.0)
    deltas += item * chunk * tl.num_programs(1) + head
    # The rows nearest to the keys: what they give them in weight does not wait for their gradients.
    nearest = (tile * N // M) * M
    rows = nearest + tl.arange(0, M)
    q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=rows[:, None] < chunk, other=0.0)
    top = tl.load(lse + rows, mask=rows < chunk, other=0.0)
    p = _weights(q, k, top, rows, cols, chunk, scale)
    if EARLY and ahead != 0:
        # What the next chunk reads comes from memory meanwhile.
        heads = tl.num_programs(1)
        following = (place - tl.num_programs(2)) * chunk
        inner = tl.minimum(cols, chunk - 1)
        fetch_rows(rows_at(table, WIDE_ROWS, inject, following * 4 * width), inner, 4 * width, head, heads)
        fetch_rows(rows_at(table, DWIDE, inject, following * 4 * width), inner, 4 * width, head, heads)
        fetch_rows(rows_at(table, QKV, inject, following * row), inner, row, head, heads)
        fetch_rows(rows_at(table, FROM_DY, inject, following * width), inner, width, head, heads)
        fetch_rows(rows_at(table, ALONG, inject, following * width), inner, width, head, heads)
        fetch_rows(rows_at(table, ATTENDED, inject, following * width), inner, width, head, heads)

    if EARLY:
        tl.extra.cuda.gdc_wait()
    own = tile * tl.num_programs(1) + head
    part = share_of(halfway, item, own, first, parts, SHARES, PAD)
    da = tl.load(grad + rows[:, None] * width + lanes[None, :], mask=rows[:, None] < chunk, other=0.0)
    delta = tl.load(deltas + rows * tl.num_programs(1), mask=rows < chunk, other=0.0)
    acc = tl.dot(p, da)
    weighted = tl.sum(p.to(tl.float32) * delta[None, :], 1)
    for start in range(nearest + M, chunk, M):
        rows = start + tl.arange(0, M)
        there = rows[:, None] < chunk
        q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=there, other=0.0)
        da = tl.load(grad + rows[:, None] * width + lanes[None, :], mask=there, other=0.0)
        top = tl.load(lse + rows, mask=rows < chunk, other=0.0)
        delta = tl.load(deltas + rows * tl.num_programs(1), mask=rows < chunk, other=0.0)
        p = _weights(q, k, top, rows, cols, chunk, scale)
        acc = tl.dot(p, da, acc)
        weighted += tl.sum(p.to(tl.float32) * delta[None, :], 1)
    share = tl.sum(acc * v.to(tl.float32), 1) - weighted
    dq = tl.sum(share[:, None] * k.to(tl.float32), 0) * scale
    part += tl.sum(injected.to(tl.float32) * dq[:, None], 0)
    tl.store(partials + (item * parts + own) * PAD + channels, part)


@triton.jit
def _weights(q, k, top, rows, cols, chunk, scale):
    """Attention's weights, keys by rows `(N, M)`, from log-sum-exps."""
    scores = tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634) - top[None, :] * 1.4426950408889634
    seen = (rows[None, :] >= cols[:, None]) & (rows[None, :] < chunk)
    return tl.where(seen, tl.exp2(scores), 0.0).to(k.dtype)
