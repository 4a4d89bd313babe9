"""What the Triton kernels of attention do with one tile of scores, forward and backward.

Softmax is taken online (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691). The backward pass
computes the weights again from the log-sum-exp of each row. Dropout comes from a counter-based generator (Salmon et al.
2011, Philox): a weight's fate is a function of the seed, head, query and key, so the backward pass finds it again and
nothing of it is kept.

Letters: M queries and N keys of a tile, K head width. `scale` turns a product into a score in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# Seven rounds pass every test that ten pass (Salmon et al. 2011, table 2).
ROUNDS = tl.constexpr(7)


@triton.jit
def load_rows(base, start, stride, there, SIZE: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    """`[SIZE, K]` rows from `start` on, zero where not `there` `[SIZE]`. Only offsets in the tile are 32 bits wide."""
    pointers = base + tl.cast(start, tl.int64) * stride
    pointers += tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, K)[None, :]
    if MASKED:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, start, stride, there, values, SIZE: tl.constexpr, K: tl.constexpr):
    """The reverse of `load_rows`, in the dtype of what is stored to."""
    pointers = base + tl.cast(start, tl.int64) * stride
    pointers += tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, K)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=there[:, None])


@triton.jit
def kept(seed, lane, queries, keys, dropout):
    """Which weights dropout lets through: queries and keys are int32 numbers that broadcast to the tile.

    Philox gives each query of each lane two words; they make one hash of the key's number out of a family of them
    (multiply, shift, exclusive or), which costs an eighth of a Philox for each weight.
    """
    none = queries * 0
    offset, factor, _, _ = tl.philox(seed, queries, none + lane, none, none, ROUNDS)
    x = keys.to(tl.uint32) * 0x9E3779B1 + offset
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * (factor | 1)
    return tl.uint_to_uniform_float(x ^ (x >> 16)) >= dropout


@triton.jit
def add(
    q, k, v, seen, let, scale, top, total, acc, MASKED: tl.constexpr, DROPOUT: tl.constexpr
):  # fmt: skip
    """A tile of keys added to what the rows have seen so far; returns (top, total, acc) anew.

    q `[M, K]`, k, v `[N, K]`, seen, let bool `[M, N]`: which keys a query sees, and what dropout lets through.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = higher
    if MASKED:
        # A row that has seen no key yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - base)
    p = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(let, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def add_to_queries(
    q, k, v, above, sums, delta, seen, let, scale, lift, grad, MASKED: tl.constexpr, DROPOUT: tl.constexpr
):  # fmt: skip
    """grad `[M, K]` and what a tile of keys adds to the gradient of the queries, but for the factor 1 / sqrt(K).

    above `[M, K]`: the gradient of the output. sums, delta `[M]`: log-sum-exp in powers of two, rowsum(above * out).
    lift: 1 / (1 - dropout).
    """
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - sums[:, None])
    slope = tl.dot(above, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        slope = tl.where(let, slope * lift, 0.0)
    slope = p * (slope - delta[:, None])
    if MASKED:
        slope = tl.where(seen, slope, 0.0)
    return tl.dot(slope.to(k.dtype), k, grad, input_precision="ieee")


@triton.jit
def weights_of_keys(q, k, sums, scale):
    """`[N, M]`: what each key weighs in the softmax of each query, computed again. What is hidden is the caller's."""
    return tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - sums[None, :])


@triton.jit
def add_to_keys(
    p, q, v, above, delta, let, lift, grad_k, grad_v, DROPOUT: tl.constexpr
):  # fmt: skip
    """The same for keys and values, `[N, K]` each: what a tile of queries adds.

    p `[N, M]`: `weights_of_keys`, zero where hidden. let is `[N, M]` here.
    """
    passed = p
    if DROPOUT:
        passed = tl.where(let, p * lift, 0.0)
    grad_v = tl.dot(passed.to(above.dtype), above, grad_v, input_precision="ieee")
    slope = tl.dot(v, tl.trans(above), input_precision="ieee")
    if DROPOUT:
        slope = tl.where(let, slope * lift, 0.0)
    slope = p * (slope - delta[None, :])
    return tl.dot(slope.to(q.dtype), q, grad_k, input_precision="ieee"), grad_v
