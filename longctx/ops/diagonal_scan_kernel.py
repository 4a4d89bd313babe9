"""The diagonal scan in two Triton kernels, forward or from the end: half precision and fp32.

A sequence is cut in chunks, one for each program, a chunk in tiles, and a tile in runs of a few tokens that go side by
side, one token of each at a time: so the recurrence is an FMA a token, and rows of x are read and written whole.

    ends     what each run and each chunk would end with, if nothing came before it
    apply    what comes before a chunk: the ends of all earlier ones and the initial state, in one weighted sum;
             what comes before each run of it: a short scan over ends; then the recurrence itself

Both read x where it lies, once each. Powers of the decay are taken in fp64 and rounded once, sums are fp32, in a fixed
order: the same input gives the same bits. Chunks grow with the sequence, so that no program sums over many.

Letters: B batch, T sequence length, N channels, M chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.ops.launch import capability, launch, power_of_2

RUN, RUNS = 16, 16
"""Tokens of a run, and runs of a tile."""

MOST_CHUNKS = 512
"""More would fill no GPU better, and each reads the ends of all that came before it."""

LANES = 64
"""Channels of a program, at most."""


def fits(x: Tensor, decay: Tensor) -> bool:
    """Whether the kernels can scan x."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and decay.dtype != torch.float64
        and capability(x.device) >= (8, 0)
    )


def scan_kernel(
    x: Tensor,
    decay: Tensor,
    initial: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    tanh: bool = False,
) -> tuple[Tensor, Tensor]:
    """s_t = decay * s_{t-1} + x_t + bias: (s `[B, T, N]` in `dtype`, its last row `[B, N]` in fp32).

    x `[B, T, N]`, any strides; decay and bias `[N]`; initial `[B, N]`, zeros if None. tanh: the decay is tanh(decay).
    """
    s, final, _ = _scan(x, decay, initial, dtype=dtype, bias=bias, tanh=tanh)
    return s, final


def backward_kernel(
    grad: Tensor,
    for_final: Tensor | None,
    decay: Tensor,
    initial: Tensor | None,
    s: Tensor,
    *,
    dtype: torch.dtype,
    tanh: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x `[B, T, N]` in `dtype`, decay `[N]` and r_0 `[B, N]`, which times decay is that to initial.

    grad `[B, T, N]` and for_final `[B, N]`, zeros if None, are those to s, contiguous, and to its last row:
    r_t = grad_t + decay * r_{t+1}. tanh: the decay is tanh(decay), and the gradient that to the tanh. out: where to
    write the gradient to x, channels behind each other; None: new memory.
    """
    how = {"dtype": dtype, "tanh": tanh, "extra": for_final, "before": s, "start": initial, "out": out}
    r, first, partials = _scan(grad, decay, None, **how)
    return r, partials.sum((0, 1)), first


def _scan(
    x: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    tanh: bool = False,
    extra: Tensor | None = None,
    before: Tensor | None = None,
    start: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """before `[B, T, N]`: go from the end, and sum r_t * before_{t-1} (start at the first) for each chunk."""
    batch, length, channels = x.shape
    lanes = min(LANES, max(16, power_of_2(channels)))
    tiles = -(-length // (RUN * RUNS * MOST_CHUNKS))
    chunks = -(-length // (RUN * RUNS * tiles))
    if x.stride(2) != 1:
        x = x.contiguous()
    back = before is not None
    s = torch.empty(batch, length, channels, device=x.device, dtype=dtype) if out is None else out
    new = {"device": x.device, "dtype": torch.float32}
    ends = torch.empty(batch, chunks * tiles * RUNS, channels, **new)
    totals = torch.empty(batch, chunks, channels, **new)
    final = torch.empty(batch, channels, **new)
    partials = torch.empty(batch, chunks, channels, **new) if back else totals
    # Going from the end is going forward through memory laid out the other way round.
    turn = -1 if back else 1
    steps = (x.stride(0), turn * x.stride(1), (length - 1) * x.stride(1) if back else 0)
    grid = (chunks, -(-channels // lanes), batch)
    initial, bias, extra, start = (None if t is None else t.contiguous() for t in (initial, bias, extra, start))
    constants = {"RUN": RUN, "RUNS": RUNS, "LANES": lanes}
    constants |= {"TANH": tanh, "BIAS": bias is not None, "EXTRA": extra is not None}
    common = (*steps, length, channels, tiles)
    launch(_ends, grid, (x, bias, extra, decay, ends, totals, *common), constants, num_warps=4)
    values = (
        x, bias, extra, decay, ends, totals, initial, s, final, before, start, partials, *s.stride()[:2], *common,
    )  # fmt: skip
    constants |= {"INITIAL": initial is not None, "BACK": back, "START": start is not None}
    launch(_apply, grid, values, constants, num_warps=4)
    return s, final, partials


@triton.jit(do_not_specialize=["tiles", "length"])
def _ends(
    x, bias, extra, decay, ends, totals, x_batch, x_token, x_first, length, channels, tiles,
    RUN: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr,
    TANH: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    chunk, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    known = lanes < channels
    runs = tl.arange(0, RUNS)
    exact = channel_decay(decay, lanes, known, TANH)
    a = exact.to(tl.float32)
    run = _squared(exact, RUN)
    weights = _powers(run, RUNS - 1 - runs, RUNS).to(tl.float32)
    tile_decay = _squared(run, RUNS).to(tl.float32)
    x += item * x_batch + x_first
    total = tl.zeros((LANES,), tl.float32)
    for tile in range(tiles):
        first = (chunk * tiles + tile) * RUNS + runs
        s = tl.zeros((RUNS, LANES), tl.float32)
        start = first.to(tl.int64) * RUN
        for step in range(0, RUN, 4):
            x0, x1, x2, x3 = _rows(
                x, bias, extra, start + step, item, x_token, length, channels, lanes, known, BIAS, EXTRA
            )
            s = a[None, :] * s + x0
            s = a[None, :] * s + x1
            s = a[None, :] * s + x2
            s = a[None, :] * s + x3
        place = (item * tl.num_programs(0) * tiles * RUNS + first) * channels
        tl.store(ends + place[:, None] + lanes[None, :], s, mask=known[None, :])
        total = tile_decay * total + tl.sum(weights * s, 0)
    tl.store(totals + (item * tl.num_programs(0) + chunk) * channels + lanes, total, mask=known)


@triton.jit(do_not_specialize=["tiles", "length"])
def _apply(
    x, bias, extra, decay, ends, totals, initial, out, final, before, start, partials,
    out_batch, out_token, x_batch, x_token, x_first, length, channels, tiles,
    RUN: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr,
    TANH: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    INITIAL: tl.constexpr, BACK: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    chunk, chunks, item = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    known = lanes < channels
    runs = tl.arange(0, RUNS)
    exact = channel_decay(decay, lanes, known, TANH)
    a = exact.to(tl.float32)
    run = _squared(exact, RUN)

    # All that comes before the chunk, 32 chunks at a time, the last of them just before this one. The initial state
    # counts as the end of a chunk before the first.
    chunk_decay = _power(_squared(run, RUNS), tiles)
    away = 31 - tl.arange(0, 32)
    weights = _powers(chunk_decay, away, 32).to(tl.float32)
    leap = _squared(chunk_decay, 32).to(tl.float32)
    carry = tl.zeros((LANES,), tl.float32)
    for group in range((chunk + 32) // 32, 0, -1):
        earlier = chunk - 1 - (group - 1) * 32 - away
        place = (item * chunks + earlier) * channels
        end = tl.load(
            totals + place[:, None] + lanes[None, :], mask=(earlier >= 0)[:, None] & known[None, :], other=0.0
        )
        if INITIAL:
            given = tl.load(initial + item * channels + lanes, mask=known, other=0.0).to(tl.float32)
            end = tl.where((earlier == -1)[:, None], given[None, :], end)
        carry = leap * carry + tl.sum(weights * end, 0)

    x += item * x_batch + x_first
    turn = -1 if BACK else 1
    out += item * out_batch + (tl.cast(length - 1, tl.int64) * out_token if BACK else 0)
    correlation = tl.zeros((RUNS, LANES), tl.float32)
    for tile in range(tiles):
        first = (chunk * tiles + tile) * RUNS + runs
        place = (item * chunks * tiles * RUNS + first - 1) * channels
        s = tl.load(ends + place[:, None] + lanes[None, :], mask=(runs > 0)[:, None] & known[None, :], other=0.0)
        s = tl.where((runs == 0)[:, None], carry[None, :], s).to(tl.float64)
        _, s = tl.associative_scan((tl.broadcast_to(run[None, :], (RUNS, LANES)), s), 0, _join)
        s = s.to(tl.float32)
        first = first.to(tl.int64) * RUN
        for step in range(0, RUN, 4):
            # Loads ahead of the stores, behind which they would have to wait.
            x0, x1, x2, x3 = _rows(
                x, bias, extra, first + step, item, x_token, length, channels, lanes, known, BIAS, EXTRA
            )
            if BACK:
                b0 = _earlier(before, start, first + step, item, length, channels, lanes, known, START)
                b1 = _earlier(before, start, first + step + 1, item, length, channels, lanes, known, START)
                b2 = _earlier(before, start, first + step + 2, item, length, channels, lanes, known, START)
                b3 = _earlier(before, start, first + step + 3, item, length, channels, lanes, known, START)
            s0 = a[None, :] * s + x0
            s1 = a[None, :] * s0 + x1
            s2 = a[None, :] * s1 + x2
            s = a[None, :] * s2 + x3
            _put(out, final, s0, turn * out_token, first + step, item, length, channels, lanes, known)
            _put(out, final, s1, turn * out_token, first + step + 1, item, length, channels, lanes, known)
            _put(out, final, s2, turn * out_token, first + step + 2, item, length, channels, lanes, known)
            _put(out, final, s, turn * out_token, first + step + 3, item, length, channels, lanes, known)
            if BACK:
                correlation += s0 * b0 + s1 * b1 + s2 * b2 + s * b3
        carry = tl.sum(tl.where((runs == RUNS - 1)[:, None], s, 0.0), 0)
    if BACK:
        tl.store(partials + (item * chunks + chunk) * channels + lanes, tl.sum(correlation, 0), mask=known)


@triton.jit
def channel_decay(decay, lanes, known, TANH: tl.constexpr):
    """The decay of each channel, in fp64; that of tanh rounded to fp32, as torch has it."""
    a = tl.load(decay + lanes, mask=known, other=0.0).to(tl.float64)
    if TANH:
        shrunk = tl.exp(-2.0 * tl.abs(a))
        large = (1.0 - shrunk) / (1.0 + shrunk)
        # Where 1 - exp(-2a) would cancel, the first terms of the series are exact.
        a = tl.where(tl.abs(a) < 1e-3, a - a * a * a / 3.0, tl.where(a < 0, -large, large))
        a = a.to(tl.float32).to(tl.float64)
    return a


@triton.jit
def _squared(base, EXPONENT: tl.constexpr):
    """base ** EXPONENT, a power of two up to 64."""
    for bit in tl.static_range(1, 7):
        if (1 << bit) <= EXPONENT:
            base = base * base
    return base


@triton.jit
def _power(base, exponent):
    """base ** exponent for any whole number."""
    result = tl.full(base.shape, 1.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _powers(base, exponents, BELOW: tl.constexpr):
    """base `[N]`, exponents `[R]`, all of them below BELOW -> `[R, N]`."""
    result = tl.full((exponents.shape[0], base.shape[0]), 1.0, tl.float64)
    for bit in tl.static_range(0, 6):
        if (1 << bit) < BELOW:
            result = tl.where(((exponents >> bit) & 1)[:, None] == 1, result * base[None, :], result)
            base = base * base
    return result


@triton.jit
def _join(a, s, b, r):
    return a * b, b * s + r


@triton.jit
def _rows(
    x, bias, extra, at, item, x_token, length, channels, lanes, known, BIAS: tl.constexpr, EXTRA: tl.constexpr
):  # fmt: skip
    """What enters the recurrence at the tokens `at` `[RUNS]` and the three after each, which are never the first."""
    x0 = _row(x, bias, at, x_token, length, lanes, known, BIAS)
    x1 = _row(x, bias, at + 1, x_token, length, lanes, known, BIAS)
    x2 = _row(x, bias, at + 2, x_token, length, lanes, known, BIAS)
    x3 = _row(x, bias, at + 3, x_token, length, lanes, known, BIAS)
    if EXTRA:
        place = item * channels + lanes[None, :] + 0 * at[:, None]
        more = tl.load(extra + place, mask=(at == 0)[:, None] & known[None, :], other=0.0)
        x0 += more.to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _row(x, bias, at, x_token, length, lanes, known, BIAS: tl.constexpr):
    there = (at < length)[:, None] & known[None, :]
    row = tl.load(x + (at * x_token)[:, None] + lanes[None, :], mask=there, other=0.0).to(tl.float32)
    if BIAS:
        row += tl.load(bias + lanes, mask=known, other=0.0).to(tl.float32)[None, :]
    return row


@triton.jit
def _earlier(before, start, at, item, length, channels, lanes, known, START: tl.constexpr):
    """s just before the token that is `at` from the end."""
    own = length - 1 - at
    place = (item * length + own - 1) * channels
    row = tl.load(before + place[:, None] + lanes[None, :], mask=(own > 0)[:, None] & known[None, :], other=0.0)
    row = row.to(tl.float32)
    if START:
        given = tl.load(start + item * channels + lanes, mask=known, other=0.0).to(tl.float32)
        row = tl.where((own == 0)[:, None], given[None, :], row)
    return row


@triton.jit
def _put(out, final, s, out_token, at, item, length, channels, lanes, known):
    place = at * out_token
    there = (at < length)[:, None] & known[None, :]
    tl.store(out + place[:, None] + lanes[None, :], s.to(out.dtype.element_ty), mask=there)
    last = (at == length - 1)[:, None] & known[None, :]
    tl.store(final + item * channels + lanes[None, :] + 0 * at[:, None], s, mask=last)
