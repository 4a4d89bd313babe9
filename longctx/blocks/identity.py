"""Identity: the shell without mixing. The whole QKV projection is computed, then v goes straight to out_proj.

Its time is the cost that no mixer can beat: every other row of a table is read against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longctx.blocks._shell import PreNormBlock
from longctx.blocks._spec import BlockSpec, Cost, shell_cost
from longctx.config import Cell


@dataclass
class IdentityState:
    """Nothing is carried: each token stands alone."""

    def detach(self) -> IdentityState:
        return self


class IdentityBlock(PreNormBlock):
    """No mixing: out_proj(v), v repeated over the query heads of its group."""

    def mix(self, u: Tensor, state: IdentityState | None, keep_state: bool) -> tuple[Tensor, IdentityState | None]:
        _, _, v = self.split_qkv(self.qkv_proj(u))
        group = self.n_heads // self.num_kv_heads
        if group > 1:
            v = v.repeat_interleave(group, dim=2)
        # As rows of one matrix, read where the projection left them: torch would copy a strided batch of them.
        mixed = self.out_proj(v.flatten(2).flatten(0, 1)).view_as(u)
        return mixed, IdentityState() if keep_state else None

    def init_state(self, batch_size: int) -> IdentityState:
        return IdentityState()


def reference(block: IdentityBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, None]:
    """x `[B, T, D]` -> (y `[B, T, D]`, None), written out once more and plainly."""
    group = block.n_heads // block.num_kv_heads
    rows = block.qkv_proj.weight[-block.num_kv_heads * block.head_dim :]
    v = F.linear(block.attn_norm(x), rows).unflatten(-1, (block.num_kv_heads, block.head_dim))
    v = v[:, :, [head // group for head in range(block.n_heads)]].flatten(2)
    x = x + block.out_proj(v)
    return x + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(x)))), None


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """The shell alone: no query sees a key."""
    return shell_cost(cell, pairs=0.0)


SPEC = BlockSpec(label="Identity", build=IdentityBlock, reference=reference, cost=cost)
