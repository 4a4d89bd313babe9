"""BLADE's definition as a loop over chunks, and what it costs.

Letters: B batch, T sequence length, D d_model, N state_dim, m num_global_tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.blocks._spec import ELEMENT_BYTES, Cost, shell_cost
from longctx.config import Cell

if TYPE_CHECKING:
    from longctx.blocks.blade import BLADEBlock


def reference(block: BLADEBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, s `[B, N]` or None -> (y `[B, T, D]`, s): a loop over chunks, each with a dense mask."""
    batch, m = x.shape[0], block.num_global_tokens
    heads, groups, width = block.n_heads, block.num_kv_heads, block.head_dim
    s = x.new_zeros(batch, block.state_dim) if s is None else s
    chunks = []
    for chunk in x.split(block.chunk_size, dim=1):
        z = block.attn_norm(chunk) + block.state_inject(s)[:, None]
        if m:
            z = torch.cat([block.global_tokens.expand(batch, -1, -1), z], dim=1)
        length = z.shape[1]
        q, k, v = block.qkv_proj(z).split([heads * width, groups * width, groups * width], dim=-1)
        q = q.view(batch, length, heads, width).transpose(1, 2)
        k, v = (
            rows.view(batch, length, groups, width).transpose(1, 2).repeat_interleave(heads // groups, dim=1)
            for rows in (k, v)
        )
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(later, float("-inf"))
        a = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)[:, m:]
        y = chunk + block.out_proj(a)
        y = y + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(y))))
        s = block.state_proj(y.mean(1))
        chunks.append(y)
    return torch.cat(chunks, dim=1), s


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """The shell, the pairs inside chunks and with globals, two narrow matrices a chunk, the globals' keys and values.

    In mode decode: the last of T tokens.
    """
    chunk, states, m = options["chunk_size"], options["state_dim"], options["num_global_tokens"]
    width, length, decode = cell.d_model, cell.length, cell.mode == "decode"
    kv_row = 2 * (cell.num_kv_heads or cell.n_heads) * (width // cell.n_heads)
    whole, tail = divmod(length, chunk)
    visible = (length - 1) % chunk + 1
    pairs = whole * chunk * (chunk + 1) / 2 + tail * (tail + 1) / 2 + length * m
    calls = 1 if decode else whole + (tail > 0)
    # s, the s that the chunk began with and the sum of y are kept in fp32 where the rest is in half precision.
    size = ELEMENT_BYTES[cell.dtype]
    sums = (2 * states + width) * max(4, size) / size
    shared = shell_cost(
        cell,
        pairs=visible + m if decode else pairs,
        other_flops=2.0 * (calls * 2 * width * states + m * width * kv_row),
        state_elements=tail * kv_row + sums,
        read_elements=(visible - 1) * kv_row + sums,
    )
    own = (2 * width * states + m * width) * size * (3 if cell.mode == "train" else 1)
    return dataclasses.replace(shared, bytes=shared.bytes + own)
