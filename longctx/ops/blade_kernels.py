"""Three Triton kernels that do one chunk of BLADE's chain, for half precision on CUDA.

The chain is bound by latency, not by work. So its small products are composed beforehand (ops/blade_composed.py), and
what is left of them rides on the three kernels that have to run one after the other:

    attend    s = c + sum of partials;  q + (W_q W_inject) s;  causal attention within the chunk
    project   r = x + W_out a + (W_out W_v W_inject) s;  row statistics of r;  partials of W_state mean(r)
    expand    gelu(W_up norm(r));  partials of (W_state W_down) mean(gelu)

and y = r + W_down gelu + b_down off the chain: `project` also leaves r + b_down, to which that product is added.

The norm before W_up is taken out of the product: W_up norm(r) = ((W_up g) r - mean W_up g) / std + W_up b, so that
tiles of r go from memory to the tensor cores untouched. A partial is what one tile adds to the next s. They are summed
in a fixed order: the same input gives the same bits.

Letters: B batch, C tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.blade_composed import Composed, padded_states
from longctx.ops.blade_table import at, rows_at
from longctx.ops.launch import launch, launches_early, shared_memory

MOST_PARTS = 256
"""Partials of a chunk that every program of `_attend` sums itself; more of them are summed beforehand, once."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes, warps and pipeline stages: rows, columns (for project and expand: and depth), warps, stages."""

    attend: tuple[int, int, int, int] = (64, 64, 4, 2)
    project: tuple[int, int, int, int, int] = (64, 64, 64, 4, 3)
    expand: tuple[int, int, int, int, int] = (64, 128, 64, 8, 3)


LARGE = Tiles(attend=(64, 64, 4, 4), project=(64, 64, 64, 4, 6), expand=(64, 128, 64, 8, 5))
"""The fastest on an H200. There a program of any two of the kernels has room beside one of the other in the shared
memory of a multiprocessor, so that the next is there when the one before ends: 80, 96 and 120 of 227 KiB."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the forward chain of some chunks reads and writes, all contiguous.

    Read: x `[count, B, C, D]` and qkv `[count, B, C, E]`. Overwritten: out, like x (it may be x), the residual with the
    bias of W_down; hidden `[count, B * C, 4D]`, rows after GELU; residual `[B, C, D]`, the sum with the mixer;
    attended, like it, without what the injection adds to it; states `[B, N]` fp32, at the start of a chunk. lse and
    wide may be anything.

    Where rows are kept for a backward pass, residual, attended and states have room for each chunk; overwritten are
    also the queries in qkv, with the injected ones, lse `[count, B, H, C]` fp32, log-sum-exp of the scores, and wide,
    like hidden, rows before GELU.
    """

    x: Tensor
    out: Tensor
    residual: Tensor
    qkv: Tensor
    hidden: Tensor
    attended: Tensor
    states: Tensor
    lse: Tensor
    wide: Tensor

    @property
    def entries(self) -> list[Tensor]:
        """In the order in which the kernels look them up."""
        rows = [self.x, self.out, self.residual, self.qkv, self.hidden]
        return [*rows, self.attended, self.states, self.lse, self.wide]


INPUT, OUT, RESIDUAL, QKV, HIDDEN, ATTENDED, STATES, LSE, WIDE_ROWS = map(tl.constexpr, range(9))


class Forward:
    """The three kernels for chunks of one shape, and the memory in which they hand each other sums."""

    def __init__(
        self, composed: Composed, batch: int, chunk: int, *, kept: bool = False, tiles: Tiles | None = None
    ) -> None:
        self.composed, self.batch, self.chunk, self.kept = composed, batch, chunk, kept
        sums = composed.constant
        width, wide, states = composed.values.shape[0], composed.up.shape[0], len(sums)
        self.padded = padded_states(states)
        head = width // composed.heads
        self.early = launches_early(sums.device)
        self.options = {"launch_pdl": True} if self.early else {}
        self.tiles = tiles or (LARGE if large_tiles_fit(sums.device, head) else Tiles())
        project_m, project_n, *_ = self.tiles.project
        expand_m, expand_n, *_ = self.tiles.expand
        self.attend_grid = (triton.cdiv(chunk, self.tiles.attend[0]), composed.heads, batch)
        self.project_grid = (triton.cdiv(chunk, project_m), width // project_n, batch)
        self.expand_grid = (triton.cdiv(chunk, expand_m), wide // expand_n, batch)
        self.first, self.parts = (grid[0] * grid[1] for grid in (self.project_grid, self.expand_grid))
        self.halfway = sums.new_empty(batch, self.first, self.padded)
        self.partials = sums.new_zeros(batch, self.parts, self.padded)
        few = self.parts <= MOST_PARTS
        self.gathered = self.partials if few else sums.new_zeros(batch, 1, self.padded)
        self.stats = sums.new_empty(batch, chunk, width // project_n, 2)

    def run(self, table: Tensor, s: Tensor, count: int) -> None:
        """`count` chunks, with rows where the table says; s `[B, N]` fp32 before the first becomes s after them."""
        composed, gathered = self.composed, self.gathered
        states = s.shape[1]
        gathered.zero_()
        torch.sub(s, composed.constant, out=gathered[:, 0, :states])
        for index in range(count):
            self._chunk(table, index, ahead=int(index + 1 < count))
            if gathered is not self.partials:
                torch.sum(self.partials, 1, keepdim=True, out=gathered)
        torch.sum(gathered[:, :, :states], 1, out=s)
        s.add_(composed.constant)

    def _chunk(self, table: Tensor, index: int, ahead: int) -> None:
        composed, chunk, padded, kept = self.composed, self.chunk, self.padded, self.kept
        early, more = self.early, self.options
        width, wide, states = composed.values.shape[0], composed.up.shape[0], len(composed.constant)
        rows, columns = composed.inject.shape
        heads, groups = composed.heads, composed.groups
        head = width // heads
        weights = composed.weights
        tile_m, tile_n, warps, stages = self.tiles.attend
        values = (table, self.gathered, composed.constant, composed.inject, index, chunk, width, rows, columns, states)
        constants = {"GROUP": heads // groups, "KV": groups * head, "PARTS": self.gathered.shape[1], "PAD": padded}
        constants |= {"K": head, "M": tile_m, "N": tile_n, "KEEP": kept, "EARLY": early}
        scale = head**-0.5 * 1.4426950408889634
        launch(_attend, self.attend_grid, (*values, scale), constants, num_warps=warps, num_stages=stages, **more)

        tile_m, tile_n, tile_k, warps, stages = self.tiles.project
        values = (table, *weights.out, weights.down[1], composed.pass_on, weights.state[0], self.stats, self.halfway)
        values = (*values, index, ahead, chunk, rows, columns, states, 1.0 / chunk)
        constants = {"D": width, "PAD": padded, "M": tile_m, "N": tile_n, "K": tile_k, "KEEP": kept, "EARLY": early}
        launch(_project, self.project_grid, values, constants, num_warps=warps, num_stages=stages, **more)

        tiles = width // tile_n
        constants = {
            "D": width,
            "WIDE": wide,
            "TILE": tile_n,
            "TILES": tiles,
            "PAD_TILES": triton.next_power_of_2(tiles),
        }
        tile_m, tile_n, tile_k, warps, stages = self.tiles.expand
        tile_k = tile_k if width % tile_k == 0 else 64
        values = (table, self.stats, composed.up, composed.up_sum, composed.up_shift, composed.state)
        values = (*values, self.halfway, self.partials, index, chunk, states, self.first, self.parts)
        values = (*values, 1.0 / chunk, composed.eps)
        constants |= {"PAD": padded, "M": tile_m, "N": tile_n, "K": tile_k, "KEEP": kept, "EARLY": early}
        constants["SHARES"] = -(-self.first // self.parts)
        launch(_expand, self.expand_grid, values, constants, num_warps=warps, num_stages=stages, **more)


def large_tiles_fit(device: torch.device, head: int) -> bool:
    """Whether the device has the shared memory for large tiles of heads of this width."""
    if device.type != "cuda" or head > 64:
        return False
    return shared_memory(device) >= 160 << 10


@triton.jit
def summed(partials, item, PARTS: tl.constexpr, PAD: tl.constexpr):
    """The sum `(PAD,)` of all partials of an item of the batch, `[B, PARTS, PAD]`."""
    channels = tl.arange(0, PAD)
    block = tl.zeros((64, PAD), tl.float32)
    for part in tl.static_range(0, PARTS, 64):
        parts = part + tl.arange(0, 64)
        places = (item * PARTS + parts[:, None]) * PAD + channels[None, :]
        block += tl.load(partials + places, mask=(parts < PARTS)[:, None], other=0.0)
    return tl.sum(block, 0)


@triton.jit
def share_of(partials, item, tile, count, tiles, SHARES: tl.constexpr, PAD: tl.constexpr):
    """The sum `(PAD,)` of each `tiles`-th of an item's partials `[B, count, PAD]`, from `tile` on: SHARES at most."""
    part = tl.zeros((PAD,), tl.float32)
    for share in tl.static_range(SHARES):
        other = tile + share * tiles
        # Of a vector: Triton 3.9's interpreter takes no scalar for a mask.
        there = tl.full((PAD,), other, tl.int32) < count
        part += tl.load(partials + (item * count + other) * PAD + tl.arange(0, PAD), mask=there, other=0.0)
    return part


@triton.jit
def fetch_rows(start, rows, width, turn, turns):
    """Let rows of `width` two-byte numbers behind `start` come to the L2 cache, and wait for none of them.

    Of each row only lines `turn`, `turn + turns`, ... of 128 bytes: so many programs share the rows.
    """
    for line in range(turn, width // 64, turns):
        places = (start + rows * width + line * 64).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["index"])
def _attend(
    table, partials, constant, inject, index, chunk, width, row, columns, states, scale,
    GROUP: tl.constexpr, KV: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # The next kernel may come in beside this one. It waits before it reads what this one writes, and so does each:
        # what was written before the kernel before has been written by then too.
        tl.extra.cuda.gdc_launch_dependents()
    # The last rows see most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, item = tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PAD)
    known = channels < states
    lanes = tl.arange(0, K)
    mine = (head * K + lanes) * columns
    injected = tl.load(inject + mine[:, None] + channels[None, :], mask=known[None, :], other=0.0)
    bias = tl.load(inject + mine + states).to(tl.float32)
    # Of what is kept, each chunk has its own; the rest lies where the chunk before had it.
    place = index.to(tl.int64) * tl.num_programs(2) + item
    own = place if KEEP else item.to(tl.int64)
    base = rows_at(table, QKV, inject, place * chunk * row)
    rows = tile * M + tl.arange(0, M)
    there = rows[:, None] < chunk
    q = tl.load(base + rows[:, None] * row + head * K + lanes[None, :], mask=there, other=0.0)
    keys = base + width + (head // GROUP) * K
    fixed = tl.load(constant + channels, mask=known, other=0.0)
    handed_on = at(table, STATES, constant, own * states)
    target = rows_at(table, ATTENDED, inject, own * chunk * width) + rows[:, None] * width + head * K + lanes[None, :]
    lse = at(table, LSE, constant, (place * tl.num_programs(1) + head) * chunk)
    # The keys that all rows see do not wait for s.
    cols = tl.arange(0, N)
    inside = cols[:, None] < chunk
    k = tl.load(keys + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)
    v = tl.load(keys + KV + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)

    if EARLY:
        tl.extra.cuda.gdc_wait()
    s = summed(partials, item, PARTS, PAD) + fixed
    if (tile == 0) & (head == 0):
        tl.store(handed_on + channels, s, mask=known)
    shift = tl.sum(injected.to(tl.float32) * s[None, :], 1) + bias
    q = (q.to(tl.float32) + shift[None, :]).to(inject.dtype.element_ty)
    if KEEP:
        tl.store(base + rows[:, None] * row + head * K + lanes[None, :], q, mask=there)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, K), tl.float32)
    top, total, acc = _attend_keys(q, k, v, rows, cols, scale, top, total, acc)
    for start in range(N, min((tile + 1) * M, chunk), N):
        cols = start + tl.arange(0, N)
        inside = cols[:, None] < chunk
        k = tl.load(keys + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)
        v = tl.load(keys + KV + cols[:, None] * row + lanes[None, :], mask=inside, other=0.0)
        top, total, acc = _attend_keys(q, k, v, rows, cols, scale, top, total, acc)
    acc = acc / total[:, None]
    tl.store(target, acc.to(inject.dtype.element_ty), mask=there)
    if KEEP:
        tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < chunk)


@triton.jit
def _attend_keys(q, k, v, rows, cols, scale, top, total, acc):
    """Row maxima, sums and weighted values `(M,), (M,), (M, K)` with these keys taken in (online softmax)."""
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(rows[:, None] >= cols[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    return higher, total * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit(do_not_specialize=["index", "ahead"])
def _project(
    table, weight, bias, down_bias, pass_on, state, stats, partials, index, ahead, chunk, row, columns, states, inverse,
    D: tl.constexpr, PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = index.to(tl.int64) * tl.num_programs(2) + item
    own = place if KEEP else item.to(tl.int64)
    spots = rows[:, None] * D + cols[None, :]
    x = tl.load(rows_at(table, INPUT, weight, place * chunk * D) + spots, mask=there, other=0.0).to(tl.float32)
    attended = rows_at(table, ATTENDED, weight, own * chunk * D) + rows[:, None] * D
    through = tl.load(pass_on + cols[:, None] * columns + channels[None, :], mask=known[None, :], other=0.0)
    fixed = tl.load(bias + cols).to(tl.float32) + tl.load(pass_on + cols * columns + states).to(tl.float32)
    w = tl.load(state + channels[:, None] * D + cols[None, :], mask=known[:, None], other=0.0)
    added = tl.load(down_bias + cols).to(tl.float32)
    handed_on = at(table, STATES, stats, own * states)
    residual = rows_at(table, RESIDUAL, weight, own * chunk * D) + spots
    out = rows_at(table, OUT, weight, place * chunk * D) + spots

    if EARLY and ahead != 0:
        # What the next chunk's attention reads comes from memory meanwhile.
        following = rows_at(table, QKV, weight, (place + tl.num_programs(2)) * chunk * row)
        fetch_rows(following, tl.minimum(rows, chunk - 1), row, tile_n, D // N)

    if EARLY:
        tl.extra.cuda.gdc_wait()
    s = tl.load(handed_on + channels, mask=known, other=0.0)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        a = tl.load(attended + inner[None, :], mask=there, other=0.0)
        b = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    # Behind the product: its first tiles are then under way while s is.
    acc += x + (tl.sum(through.to(tl.float32) * s[None, :], 1) + fixed)[None, :]
    r = acc.to(weight.dtype.element_ty)
    tl.store(residual, r, mask=there)
    tl.store(out, (acc + added[None, :]).to(weight.dtype.element_ty), mask=there)

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


@triton.jit(do_not_specialize=["index"])
def _expand(
    table, stats, weight, weight_sum, weight_shift, state, halfway, partials,
    index, chunk, states, first, parts, inverse, eps,
    D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PAD_TILES: tl.constexpr,
    PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr, EARLY: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile_m, tile_n, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    there = rows[:, None] < chunk
    channels = tl.arange(0, PAD)
    known = channels < states
    place = index.to(tl.int64) * tl.num_programs(2) + item
    own = place if KEEP else item.to(tl.int64)
    residual = rows_at(table, RESIDUAL, weight, own * chunk * D) + rows[:, None] * D
    hidden = rows_at(table, HIDDEN, weight, place * chunk * WIDE)
    wide = rows_at(table, WIDE_ROWS, weight, place * chunk * WIDE)
    spots = rows[:, None] * WIDE + cols[None, :]
    sums, shift = tl.load(weight_sum + cols), tl.load(weight_shift + cols)
    w = tl.load(state + channels[:, None] * WIDE + cols[None, :], mask=known[:, None], other=0.0)

    if EARLY:
        tl.extra.cuda.gdc_wait()
    pieces = tl.arange(0, PAD_TILES)
    counted = there & (pieces < TILES)[None, :]
    spot = stats + ((item * chunk + rows[:, None]) * TILES + pieces[None, :]) * 2
    means = tl.load(spot, mask=counted, other=0.0)
    squares = tl.load(spot + 1, mask=counted, other=0.0)
    # Of the partials of the kernel before, each program passes on its share.
    tile = tile_m * (WIDE // N) + tile_n
    part = share_of(halfway, item, tile, first, parts, SHARES, PAD)

    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        inner = start + tl.arange(0, K)
        a = tl.load(residual + inner[None, :], mask=there, other=0.0)
        b = tl.load(weight + cols[:, None] * D + inner[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    mean = tl.sum(means, 1) / TILES
    away = tl.where(counted, means - mean[:, None], 0.0)
    variance = (tl.sum(squares, 1) + TILE * tl.sum(away * away, 1)) / D
    inverse_std = tl.rsqrt(variance + eps)
    acc = (acc - mean[:, None] * sums[None, :]) * inverse_std[:, None] + shift[None, :]
    if KEEP:
        tl.store(wide + spots, acc.to(weight.dtype.element_ty), mask=there)
    acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    tl.store(hidden + spots, acc.to(weight.dtype.element_ty), mask=there)
    part += tl.sum(w.to(tl.float32) * tl.sum(tl.where(there, acc, 0.0), 0)[None, :], 1) * inverse
    tl.store(partials + (item * parts + tile) * PAD + channels, part)
