"""How the operators of BLADE's training take what they are given: their parameters by name, rows by chunks and slabs.

Letters: B batch, T sequence length, n tokens of a chunk, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longctx.ops.blade_chain import ChainWeights

CPU_SLAB_TOKENS = 1024
"""Tokens taken at once off the chain on a CPU: they stay in the cache."""
GPU_SLAB_TOKENS, MOST_SLAB_TOKENS = 8192, 65536
"""On a GPU slabs have some number of tokens between the two: few launches, and buffers small beside what is kept."""
GPU_SHARES = (2, 1, 2, 1, 2)
"""A call is at least that many slabs if it has the tokens, and so large, if it has no more. The buffers of two
neighbours exist at once, 6D a token each in backward: a large and a small one are less than two of a fifth."""
GRAPH_CHUNKS = 8
"""Slabs of whole multiples of it are done in the fewest graphs, see `blade_training_graph`."""

NAMES = ("attn_w", "attn_b", "inject_w", "inject_b", "qkv", "out_w", "out_b", "norm_w", "norm_b", "up_w", "up_b")
NAMES += ("down_w", "down_b", "state_w", "state_b", "global_tokens")
"""The operators' parameters."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operators need beside tensors."""

    n_heads: int
    num_kv_heads: int
    chunk: int
    attn_eps: float
    ffn_eps: float


def listed(attn_norm: tuple[Tensor, Tensor, float], weights: ChainWeights) -> list[Tensor]:
    """The parameters in the order of their names."""
    parameters = [*attn_norm[:2], *weights.inject, weights.qkv, *weights.out, *weights.norm[:2], *weights.up]
    parameters += [*weights.down, *weights.state]
    return parameters if weights.global_tokens is None else [*parameters, weights.global_tokens]


def named(parameters: Sequence[Tensor], settings: Settings) -> tuple[tuple[Tensor, Tensor, float], ChainWeights]:
    """The norm in front of the chain (weight, bias, epsilon), and what the chain reads."""
    attn_w, attn_b, inject_w, inject_b, qkv, out_w, out_b, norm_w, norm_b, *rest = parameters
    up_w, up_b, down_w, down_b, state_w, state_b, *global_tokens = rest
    weights = ChainWeights(
        n_heads=settings.n_heads,
        num_kv_heads=settings.num_kv_heads,
        inject=(inject_w, inject_b),
        qkv=qkv,
        out=(out_w, out_b),
        norm=(norm_w, norm_b, settings.ffn_eps),
        up=(up_w, up_b),
        down=(down_w, down_b),
        state=(state_w, state_b),
        global_tokens=global_tokens[0] if global_tokens else None,
    )
    return (attn_w, attn_b, settings.attn_eps), weights


def by_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, D]` -> a view `[count, B, n, D]`: each chunk of the batch is one matrix then."""
    return x.unflatten(1, (x.shape[1] // chunk, chunk)).transpose(0, 1)


def slabs(count: int, tokens: int, device: torch.device) -> list[slice]:
    """Slices of `count` chunks, each of `tokens` over the batch; the first is the largest."""
    if device.type == "cuda":
        sizes = _gpu_sizes(count, tokens)
    else:
        step = max(1, CPU_SLAB_TOKENS // tokens)
        sizes = [min(step, count - start) for start in range(0, count, step)]
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _gpu_sizes(count: int, tokens: int) -> list[int]:
    total = count * tokens
    parts = max(min(len(GPU_SHARES), total // GPU_SLAB_TOKENS), -(-total // MOST_SLAB_TOKENS), 1)
    parts = min(parts, count)
    unit = GRAPH_CHUNKS if count >= GRAPH_CHUNKS * parts else 1
    units, rest = divmod(count, unit)
    shares = list(accumulate(GPU_SHARES))
    largest = -(-units * GPU_SHARES[0] // shares[-1]) * unit * tokens
    if parts < len(GPU_SHARES) or units < shares[-1] or largest > MOST_SLAB_TOKENS:
        shares = list(range(1, parts + 1))
    # Rounded up, so that none is larger than the first.
    ends = [unit * -(-units * share // shares[-1]) for share in shares]
    sizes = [end - start for start, end in pairwise([0, *ends])]
    # To one with room for it, as the first is to stay the largest.
    sizes[next((index for index, size in enumerate(sizes) if size < sizes[0]), 0)] += rest
    return sizes


def dense(rows: Tensor) -> Tensor:
    """Contiguous, and where a kernel that reads 16 bytes at a time may begin."""
    rows = rows.contiguous()
    return rows.clone() if rows.is_cuda and rows.data_ptr() % 16 else rows
