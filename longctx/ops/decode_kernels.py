"""One token through a whole block in five Triton kernels, which read each weight once.

    project   queries, keys and values of the normed token; with a recurrence also its gate and its new state
    attend    partial softmax of some keys of one head
    combine   partials to attended; out_proj, gate and recurrence; residual
    expand    gelu(ffn_up(norm))
    contract  ffn_down, residual, the sum of outputs if one is kept, and on to the next position

Keys and values lie in a ring: that of position p in row g + p % R, behind g rows that every token sees. Every product
is a row of weights times a token in registers: there is too little work for tensor cores, and sums are fp32 in a fixed
order. Where the stream is, the kernels read from memory, so that a CUDA graph of them is good for every position.

Letters: B batch, D d_model, H n_heads, K head width, E = D + 2GK rows of qkv_proj, W window, d dilation, R rows of the
ring, g globals, N state_dim, P partials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.diagonal_scan_kernel import channel_decay
from longctx.ops.launch import capability, launch, power_of_2

LOG2_E = 1.4426950408889634
TILE = 4096
"""Elements of a matrix that a program holds."""
KEYS = 64
MOST_PARTIALS = 8
MOST_SIDE = 8
"""Tokens of a batch that go side by side: the same weights are then read from the L2 cache."""
WIDEST = 8192


@dataclass(frozen=True, eq=False)
class Recurrence:
    """What DPASSM has besides: gate_proj, ssm_in, the decay before tanh `[N]`, ssm_out `[D, N]`."""

    gate: tuple[Tensor, Tensor]
    enter: tuple[Tensor, Tensor]
    decay: Tensor
    leave: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StepWeights:
    """The parameters that a step reads, matrices with their biases, norms with their eps."""

    n_heads: int
    head_dim: int
    attn_norm: tuple[Tensor, Tensor, float]
    qkv: Tensor
    out: tuple[Tensor, Tensor]
    ffn_norm: tuple[Tensor, Tensor, float]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    recurrence: Recurrence | None = None
    injects: bool = False
    """Whether something is added to queries and to what is attended, and outputs are summed up, as in BLADE."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        pairs = [self.attn_norm[:2], self.out, self.ffn_norm[:2], self.up, self.down]
        rest = [self.qkv]
        if self.recurrence is not None:
            pairs += [self.recurrence.gate, self.recurrence.enter]
            rest += [self.recurrence.decay, self.recurrence.leave]
        return [*(tensor for pair in pairs for tensor in pair), *rest]


@dataclass(kw_only=True, eq=False)
class StepBuffers:
    """What a step works on. x and y `[B, 1, D]`; kv `[B, g + R, 2GK]`; s `[B, N]` fp32; position `[1]` int64.

    for_q, for_attended: what is added to queries and to what is attended; total: the sum of y; all `[B, D]` fp32.
    """

    x: Tensor
    y: Tensor
    kv: Tensor
    s: Tensor
    position: Tensor
    for_q: Tensor
    for_attended: Tensor
    total: Tensor
    q: Tensor
    gate: Tensor
    partials: Tensor
    maxima: Tensor
    residual: Tensor
    hidden: Tensor

    @classmethod
    def new(cls, weights: StepWeights, batch: int, *, window: int, dilation: int, lead: int) -> StepBuffers:
        """All zeros, at position 0."""
        like = weights.qkv
        rows, width = like.shape
        recurrence = weights.recurrence
        states = 0 if recurrence is None else recurrence.decay.shape[0]
        sums = width if weights.injects else 0
        partials = _partials(window + lead)[1]
        wide = {"dtype": torch.float32}
        return cls(
            x=like.new_zeros(batch, 1, width),
            y=like.new_zeros(batch, 1, width),
            kv=like.new_zeros(batch, lead + (window - 1) * dilation + 1, rows - width),
            s=like.new_zeros(batch, states, **wide),
            position=like.new_zeros(1, dtype=torch.int64),
            **{name: like.new_zeros(batch, sums, **wide) for name in ("for_q", "for_attended", "total")},
            q=like.new_zeros(batch, width),
            gate=like.new_zeros(batch, width if states else 0, **wide),
            partials=like.new_zeros(batch, partials, width, **wide),
            maxima=like.new_zeros(batch, partials, weights.n_heads, 2, **wide),
            residual=like.new_zeros(batch, width),
            hidden=like.new_zeros(batch, weights.up[0].shape[0]),
        )


def fits(weights: StepWeights) -> bool:
    """Whether the kernels can step a block with these weights."""
    like = weights.qkv
    return runs_on(like) and all(t.dtype == like.dtype and t.is_contiguous() for t in weights.tensors)


def runs_on(weight: Tensor) -> bool:
    """Whether the kernels are for a matrix `[..., D]` like this one."""
    return (
        weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and weight.shape[1] <= WIDEST
        and capability(weight.device) >= (8, 0)
    )


def step(weights: StepWeights, buffers: StepBuffers, *, window: int, dilation: int, lead: int) -> None:
    """buffers.x -> buffers.y; writes this token's keys and values, s and position. The first `lead` rows of kv are seen
    by every token, and of the others those at distances 0, d, ..., (W-1)d behind it that there are."""
    batch, _, width = buffers.x.shape
    rows, head = weights.qkv.shape[0], weights.head_dim
    group = weights.n_heads * 2 * head // (rows - width)
    recurrence = weights.recurrence
    dual = recurrence is not None
    gate, enter, decay, leave = (
        (recurrence.gate, recurrence.enter, recurrence.decay, recurrence.leave)
        if dual
        else ((weights.qkv,) * 2, (weights.qkv,) * 2, weights.qkv, weights.qkv)
    )
    states = buffers.s.shape[1]
    ring = buffers.kv.shape[1] - lead
    tiles, partials = _partials(window + lead)
    block, wide = power_of_2(width), weights.up[0].shape[0]
    lines = max(1, TILE // block)
    few = max(1, lines // 2)  # of the narrowest product, so that it is shared by enough programs
    wide_block = power_of_2(wide)
    wide_lines = max(1, TILE // wide_block)
    side = min(batch, MOST_SIDE)
    kinds = {"DUAL": dual, "INJECTS": weights.injects}

    parts = -(-rows // lines) + (-(-width // lines) + -(-states // lines) if dual else 0)
    values = (
        buffers.x, *weights.attn_norm[:2], weights.qkv, *gate, *enter, decay,
        buffers.q, buffers.kv, buffers.gate, buffers.s, buffers.position, buffers.for_q,
        batch, weights.attn_norm[2], rows, states, lead, ring,
    )  # fmt: skip
    launch(_project, (parts, side), values, {"D": width, "BLOCK": block, "ROWS": lines, **kinds}, num_warps=4)

    values = (
        buffers.q, buffers.kv, buffers.position, buffers.partials, buffers.maxima,
        window, dilation, lead, ring, rows - width, group, head**-0.5 * LOG2_E,
    )  # fmt: skip
    constants = {"K": head, "PAD": power_of_2(head), "KEYS": KEYS, "TILES": tiles}
    launch(_attend, (partials, weights.n_heads, batch), values, constants, num_warps=4)

    values = (
        buffers.partials, buffers.maxima, *weights.out, buffers.x, buffers.gate, buffers.s, leave,
        buffers.for_attended, buffers.residual, batch, states, partials,
    )  # fmt: skip
    constants = {"D": width, "BLOCK": block, "ROWS": few, "HEADS": weights.n_heads, "K": head}
    constants |= {"PARTIALS": power_of_2(partials), "STATES": power_of_2(max(states, 1)), **kinds}
    launch(_combine, (-(-width // few), side), values, constants, num_warps=4)

    values = (
        buffers.residual, *weights.ffn_norm[:2], *weights.up, buffers.hidden, batch, weights.ffn_norm[2], wide,
    )  # fmt: skip
    launch(_expand, (-(-wide // lines), side), values, {"D": width, "BLOCK": block, "ROWS": lines}, num_warps=4)

    values = (
        buffers.hidden, *weights.down, buffers.residual, buffers.y, buffers.total, buffers.position, batch, width,
    )  # fmt: skip
    constants = {"WIDE": wide, "BLOCK": wide_block, "ROWS": wide_lines, "INJECTS": weights.injects}
    launch(_contract, (-(-width // wide_lines), side), values, constants, num_warps=4)


def _partials(keys: int) -> tuple[int, int]:
    """(tiles of keys that a program goes through, programs that share the keys of a head)."""
    tiles = -(-keys // (KEYS * MOST_PARTIALS))
    return tiles, -(-keys // (KEYS * tiles))


@triton.jit
def _norm(row, gain, offset, inside, eps, D: tl.constexpr):
    """LayerNorm of a row `[BLOCK]` in fp32, D of its elements inside."""
    mean = tl.sum(row, 0) / D
    away = tl.where(inside, row - mean, 0.0)
    return away * tl.rsqrt(tl.sum(away * away, 0) / D + eps) * gain + offset


@triton.jit(do_not_specialize=["batch", "rows", "count", "lead", "ring"])
def _project(
    x, gain, offset, qkv, gate_w, gate_b, enter_w, enter_b, decay, q, kv, gate, states, position, for_q,
    batch, eps, rows, count, lead, ring,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr, INJECTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    qkv_parts = tl.cdiv(rows, ROWS)
    gate_parts = tl.cdiv(D, ROWS)
    weight = qkv
    most = rows
    first = part
    if DUAL:
        if part >= qkv_parts + gate_parts:
            weight = enter_w
            most = count
            first = part - qkv_parts - gate_parts
        elif part >= qkv_parts:
            weight = gate_w
            most = tl.minimum(rows, D)  # D, which rows is never below
            first = part - qkv_parts
    lines = first * ROWS + tl.arange(0, ROWS)
    there = lines < most
    w = tl.load(weight + lines[:, None] * D + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    w = w.to(tl.float32)
    g = tl.load(gain + cols, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(offset + cols, mask=inside, other=0.0).to(tl.float32)
    slot = lead + tl.load(position) % ring  # 64 bits wide, as the offsets that it is in
    for item in range(tl.program_id(1), batch, tl.num_programs(1)):
        row = tl.load(x + item * D + cols, mask=inside, other=0.0).to(tl.float32)
        u = _norm(row, g, o, inside, eps, D).to(x.dtype.element_ty).to(tl.float32)
        y = tl.sum(w * u[None, :], 1)
        if part < qkv_parts:
            kind = q.dtype.element_ty
            if INJECTS:
                y += tl.load(for_q + item * D + lines, mask=lines < D, other=0.0)
            tl.store(q + item * D + lines, y.to(kind), mask=there & (lines < D))
            place = (item * (lead + ring) + slot) * (rows - D)
            tl.store(kv + place + lines - D, y.to(kind), mask=there & (lines >= D))
        if DUAL:
            if (part >= qkv_parts) & (part < qkv_parts + gate_parts):
                y += tl.load(gate_b + lines, mask=there, other=0.0).to(tl.float32)
                tl.store(gate + item * D + lines, tl.sigmoid(y), mask=there)
            if part >= qkv_parts + gate_parts:
                y += tl.load(enter_b + lines, mask=there, other=0.0).to(tl.float32)
                a = channel_decay(decay, lines, there, True).to(tl.float32)
                at = states + item * count + lines
                tl.store(at, a * tl.load(at, mask=there, other=0.0) + y, mask=there)


@triton.jit(do_not_specialize=["window", "dilation", "lead", "ring", "group"])
def _attend(
    q, kv, position, partials, maxima, window, dilation, lead, ring, row, group, scale,
    K: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    part, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    lanes = tl.arange(0, PAD)
    wide = lanes < K
    now = tl.load(position)
    query = tl.load(q + (item * heads + head) * K + lanes, mask=wide, other=0.0).to(tl.float32) * scale
    base = kv + item.to(tl.int64) * (lead + ring) * row + (head // group) * K
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((PAD,), tl.float32)
    for tile in tl.static_range(TILES):
        index = (part * TILES + tile) * KEYS + tl.arange(0, KEYS)
        back = (index - lead) * dilation
        seen = (index < lead) | ((index < lead + window) & (back <= now))
        place = tl.where(index < lead, index, lead + (now - back) % ring)
        at = (place * row)[:, None] + lanes[None, :]
        mask = seen[:, None] & wide[None, :]
        k = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(base + row // 2 + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(k * query[None, :], 1), float("-inf"))
        # A tile that sees nothing leaves no weight behind, rather than inf - inf.
        higher = tl.maximum(tl.maximum(top, tl.max(scores, 0)), -1e30)
        p = tl.exp2(scores - higher)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        top = higher
    place = item * tl.num_programs(0) + part
    tl.store(partials + (place * heads + head) * K + lanes, acc, mask=wide)
    tl.store(maxima + (place * heads + head) * 2, top)
    tl.store(maxima + (place * heads + head) * 2 + 1, total)


@triton.jit(do_not_specialize=["batch", "count", "parts"])
def _combine(
    partials, maxima, weight, bias, x, gate, states, leave, for_attended, residual, batch, count, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    PARTIALS: tl.constexpr, STATES: tl.constexpr, DUAL: tl.constexpr, INJECTS: tl.constexpr,
):  # fmt: skip
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = lines < D
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    w = tl.load(weight + lines[:, None] * D + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    w = w.to(tl.float32)
    b = tl.load(bias + lines, mask=there, other=0.0).to(tl.float32)
    kind = residual.dtype.element_ty
    if DUAL:
        channels = tl.arange(0, STATES)
        known = channels < count
        c = tl.load(leave + lines[:, None] * count + channels[None, :], mask=there[:, None] & known[None, :], other=0.0)
        c = c.to(tl.float32)
    pieces = tl.arange(0, PARTIALS)
    mask = (pieces < parts)[:, None] & inside[None, :]
    for item in range(tl.program_id(1), batch, tl.num_programs(1)):
        place = item * parts + pieces
        spot = maxima + (place[:, None] * HEADS + cols[None, :] // K) * 2
        tops = tl.load(spot, mask=mask, other=float("-inf"))
        totals = tl.load(spot + 1, mask=mask, other=0.0)
        acc = tl.load(partials + place[:, None] * D + cols[None, :], mask=mask, other=0.0)
        share = tl.exp2(tops - tl.maximum(tl.max(tops, 0), -1e30)[None, :])
        sums = tl.sum(share * totals, 0)
        attended = tl.sum(share * acc, 0) / tl.where(inside, sums, 1.0)
        if INJECTS:
            attended += tl.load(for_attended + item * D + cols, mask=inside, other=0.0)
        y = tl.sum(w * attended.to(kind).to(tl.float32)[None, :], 1) + b
        if DUAL:
            s = tl.load(states + item * count + channels, mask=known, other=0.0).to(kind).to(tl.float32)
            recurrent = tl.sum(c * s[None, :], 1)
            y = recurrent + tl.load(gate + item * D + lines, mask=there, other=0.0) * (y - recurrent)
        y += tl.load(x + item * D + lines, mask=there, other=0.0).to(tl.float32)
        tl.store(residual + item * D + lines, y.to(kind), mask=there)


@triton.jit(do_not_specialize=["batch", "wide"])
def _expand(
    residual, gain, offset, weight, bias, hidden, batch, eps, wide,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = lines < wide
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    w = tl.load(weight + lines[:, None] * D + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    w = w.to(tl.float32)
    g = tl.load(gain + cols, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(offset + cols, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + lines, mask=there, other=0.0).to(tl.float32)
    kind = residual.dtype.element_ty
    for item in range(tl.program_id(1), batch, tl.num_programs(1)):
        row = tl.load(residual + item * D + cols, mask=inside, other=0.0).to(tl.float32)
        u = _norm(row, g, o, inside, eps, D).to(kind).to(tl.float32)
        y = tl.sum(w * u[None, :], 1) + b
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(hidden + item * wide + lines, y.to(kind), mask=there)


@triton.jit(do_not_specialize=["batch", "width"])
def _contract(
    hidden, weight, bias, residual, y, total, position, batch, width,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INJECTS: tl.constexpr,
):  # fmt: skip
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = lines < width
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDE
    w = tl.load(weight + lines[:, None] * WIDE + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    w = w.to(tl.float32)
    b = tl.load(bias + lines, mask=there, other=0.0).to(tl.float32)
    for item in range(tl.program_id(1), batch, tl.num_programs(1)):
        row = tl.load(hidden + item * WIDE + cols, mask=inside, other=0.0).to(tl.float32)
        out = tl.sum(w * row[None, :], 1) + b
        out += tl.load(residual + item * width + lines, mask=there, other=0.0).to(tl.float32)
        tl.store(y + item * width + lines, out.to(y.dtype.element_ty), mask=there)
        if INJECTS:
            at = total + item * width + lines
            tl.store(at, tl.load(at, mask=there, other=0.0) + out, mask=there)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        # No other program of this kernel reads it.
        tl.store(position, tl.load(position) + 1)
