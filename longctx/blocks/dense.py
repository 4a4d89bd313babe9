"""Dense: full attention, the cost that every other block wants to beat (Vaswani et al. 2017, arXiv 1706.03762).

Letters: B batch, T tokens, D d_model, H heads, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.blocks._shell import PreNormBlock, check_batch, check_counts
from longctx.blocks._spec import BlockSpec, Cost, shell_cost
from longctx.config import Cell
from longctx.ops.dense_attention import dense_attention, dense_attention_path
from longctx.ops.key_values import KeyValues


@dataclass(kw_only=True)
class DenseState:
    """Keys and values of all tokens so far."""

    cache: KeyValues

    def detach(self) -> DenseState:
        """The same state, cut off from the graph of the calls that made it."""
        return DenseState(cache=self.cache.detach())


class DenseBlock(PreNormBlock):
    """Full attention: every token sees all tokens, up to itself if causal."""

    # The fused kernels keep memory linear by themselves; slabs would only run them on awkward shapes.
    streams = False
    restarts = False

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        recompute: str = "norms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model=d_model,
            n_heads=n_heads,
            num_kv_heads=num_kv_heads,
            dropout=dropout,
            recompute=recompute,
            causal=causal,
            device=device,
            dtype=dtype,
        )

    @property
    def mixer_path(self) -> str:
        weight = self.qkv_proj.weight
        return dense_attention_path(weight.device, weight.dtype, self.n_heads, self.num_kv_heads, self.head_dim)

    def init_state(self, batch_size: int) -> DenseState:
        self.check_causal("state")
        check_counts(batch_size=batch_size)
        none = self.qkv_proj.weight.new_empty(batch_size, 0, 2, self.num_kv_heads, self.head_dim)
        return DenseState(cache=KeyValues(buffer=none))

    def forward(
        self, x: Tensor, state: DenseState | None = None, *, keep_state: bool = True
    ) -> tuple[Tensor, DenseState | None]:
        """As `PreNormBlock.forward`; the state given is left as it was, and can be continued again."""
        if isinstance(state, DenseState):
            state = replace(state, cache=state.cache.fork())
        return super().forward(x, state, keep_state=keep_state)

    def step(self, x_t: Tensor, state: DenseState) -> tuple[Tensor, DenseState]:
        self.check_step(x_t)
        return super().forward(x_t, state)

    def mix(self, u: Tensor, state: DenseState | None, keep_state: bool) -> tuple[Tensor, DenseState | None]:
        q, kv = self.qkv_proj(u).split([self.d_model, 2 * self.num_kv_heads * self.head_dim], dim=-1)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        kv = kv.unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        if state is None and keep_state:
            state = self.init_state(u.shape[0])
        if state is not None:
            check_batch(state.cache.buffer.shape[0], u.shape[0])
            kv = state.cache.append(kv)
        dropout = self.dropout if self.training else 0.0
        mixed = dense_attention(q, *kv.unbind(2), causal=self.causal, dropout_p=dropout)
        return self.out_proj(mixed.flatten(2)), state if keep_state else None


def reference(block: DenseBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, None]:
    """x `[B, T, D]` -> (y `[B, T, D]`, None) by a dense mask."""
    q, k, v = (t.transpose(1, 2) for t in block.split_qkv(block.qkv_proj(block.attn_norm(x))))
    k, v = (t.repeat_interleave(block.n_heads // block.num_kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / block.head_dim**0.5
    if block.causal:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    x = x + block.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    return x + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(x)))), None


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """The shell and every visible pair; the state is all keys and values."""
    length = cell.length
    token = 2 * (cell.num_kv_heads or cell.n_heads) * (cell.d_model // cell.n_heads)
    if cell.mode == "decode":
        pairs = length
    else:
        pairs = length * (length + 1) // 2 if options["causal"] else length * length
    return shell_cost(
        cell,
        pairs=pairs,
        state_elements=length * token if options["causal"] else 0,
        read_elements=(length - 1) * token,
    )


SPEC = BlockSpec(label="Dense", build=DenseBlock, reference=reference, cost=cost)
