"""BigBird: block-sparse attention to global, window and random blocks (Zaheer et al. 2020, arXiv 2007.14062).

Causal, query block i sees the first num_global_blocks blocks, its own and the num_window_blocks - 1 before
it, and num_random_blocks of the remaining earlier ones, drawn for each head; a block counts once. causal=False:
an odd window centred on i, globals at both ends that see everything themselves, random blocks from all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.blocks._shell import PreNormBlock, check_batch, check_counts
from longctx.blocks._spec import BlockSpec, Cost, shell_cost
from longctx.config import Cell
from longctx.errors import UsageError
from longctx.ops.block_plan import (
    BlockPattern,
    BlockSparse,
    check_plan,
    draw_random_blocks,
    transposed_plan,
    visible_blocks,
)
from longctx.ops.block_sparse_attention import (
    block_sparse_attention,
    fused,
    kernel_fits,
    packed_block_sparse_attention,
)
from longctx.ops.precision import autocasts
from longctx.ops.projections import project_into

FEW_TOKENS = 256
"""Below so many a copy of their keys and values costs less than a product of their own."""


@dataclass
class BigBirdState:
    """All keys and values so far: `[B, G, capacity, K]`, of which `position` are used.

    A random block may be any earlier one, so nothing can be forgotten. capacity is a multiple of block_size;
    what follows `position` inside its block is zero, because it is read and then hidden by a mask. written: how far the
    buffers are, one number that all states on them share.
    """

    keys: Tensor
    values: Tensor
    position: int
    written: list[int] = field(default_factory=lambda: [0])

    @property
    def may_grow(self) -> bool:
        """Whether what follows `position` is free: another state may have gone on from this one."""
        return self.written[0] == self.position

    def detach(self) -> BigBirdState:
        return replace(self, keys=self.keys.detach(), values=self.values.detach())


class BigBirdBlock(PreNormBlock):
    """Block-sparse attention. `plan(T)` gives the random blocks, `set_plan` replaces them."""

    restarts = False  # the state is every key and value

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        block_size: int = 64,
        num_window_blocks: int = 3,
        num_random_blocks: int = 3,
        num_global_blocks: int = 2,
        causal: bool = True,
        seed: int = 0,
        dropout: float = 0.0,
        recompute: str = "norms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = {"d_model": d_model, "n_heads": n_heads, "num_kv_heads": num_kv_heads}
        super().__init__(**shape, dropout=dropout, causal=causal, recompute=recompute, device=device, dtype=dtype)
        check_counts(block_size=block_size, num_window_blocks=num_window_blocks)
        check_counts(least=0, num_random_blocks=num_random_blocks, num_global_blocks=num_global_blocks)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"seed must be a whole number, not {seed!r}")
        if not causal and num_window_blocks % 2 == 0:
            raise UsageError(
                f"num_window_blocks must be odd with causal=False, not {num_window_blocks}",
                "the window reaches equally far to both sides of a block",
            )
        self.pattern = BlockPattern(
            block_size=block_size,
            num_window_blocks=num_window_blocks,
            num_random_blocks=num_random_blocks,
            num_global_blocks=num_global_blocks,
            causal=causal,
        )
        self.seed = seed
        self._given_plan: Tensor | None = None
        self._after_holes = 0
        self._drawn: Tensor | None = None
        self._transposed: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    # -- which blocks ---------------------------------------------------------------------------------------

    def plan(self, length: int) -> Tensor:
        """Random blocks for T = length: int64 `[H, n_blocks, num_random_blocks]`, -1 for none; not to be changed.

        Causal, it is a prefix of the plan for any longer T. Raises UsageError where a plan was set for another T.
        """
        # The lists are drawn here and now: a length that a compiler would leave open is that of its example.
        length = int(length) if isinstance(length, torch.SymInt) else length
        check_counts(length=length)
        n_blocks = self.pattern.count(length)
        device = self.qkv_proj.weight.device
        if self._given_plan is not None:
            given = self._given_plan.shape[1]
            if n_blocks > given or (n_blocks < given and not self.causal):
                raise UsageError(f"the plan that was set is for {given} blocks, and {length} tokens have {n_blocks}")
            self._given_plan = self._given_plan.to(device)
            return self._given_plan[:, :n_blocks]
        drawn = self._drawn
        short = drawn is None or drawn.device != device or drawn.shape[1] < n_blocks
        if short or (not self.causal and drawn.shape[1] != n_blocks):
            # A causal plan is a prefix of longer ones: doubling spares a stream of steps a new one at each block.
            count = 1 << (n_blocks - 1).bit_length() if self.causal else n_blocks
            with torch.inference_mode(False):  # autograd refuses to save what inference mode made
                drawn = self._drawn = draw_random_blocks(
                    self.pattern, seed=self.seed, n_heads=self.n_heads, n_blocks=count, device=device
                )
        return drawn[:, :n_blocks]

    def set_plan(self, plan: Tensor | None) -> None:
        """Use these random blocks: int64 `[H, n_blocks, num_random_blocks]`, -1 for none. None: the drawn ones.

        They serve sequences of up to n_blocks blocks, of exactly so many with causal=False. Raises UsageError
        for another shape, or an entry that is global, in the window, later (when causal) or named twice.
        """
        self._given_plan = None
        if plan is None:
            return
        check_plan(self.pattern, plan, self.n_heads)
        first, last = self.pattern.inner(plan.shape[1])
        holes = (plan[:, first:last] < 0).flatten(2).any(-1).any(0).nonzero()
        self._after_holes = first + int(holes.max()) + 1 if len(holes) else 0
        with torch.inference_mode(False):
            self._given_plan = plan.detach().clone()

    def _readers(self, length: int) -> tuple[Tensor, Tensor]:
        """The plan for T = length transposed, which gradients ask for; kept from step to step."""
        n_blocks = self.pattern.count(length)
        plan = self.plan(length)
        source = self._drawn if self._given_plan is None else self._given_plan
        known = self._transposed
        if known is None or known[0] is not source or known[1] != n_blocks:
            known = self._transposed = (source, n_blocks, transposed_plan(plan, n_blocks))
        return known[2]

    def _complete(self, length: int) -> range:
        """Query blocks with nothing missing from their lists, which spares them a mask."""
        complete = self.pattern.complete(length)
        return complete if self._given_plan is None else range(max(complete.start, self._after_holes), complete.stop)

    # -- the mixer ------------------------------------------------------------------------------------------

    def mix(self, u: Tensor, state: BigBirdState | None, keep_state: bool) -> tuple[Tensor, BigBirdState | None]:
        if state is not None:
            check_batch(state.keys.shape[0], u.shape[0])
        start = 0 if state is None else state.position
        length = start + u.shape[1]
        sparse = BlockSparse(
            pattern=self.pattern,
            plan=self.plan(length),
            complete=self._complete(length),
            start=start,
            length=length,
        )
        dropout = self.dropout if self.training else 0.0
        carried = start > 0 or keep_state
        if carried and self._streams_in_rows(u):
            q, state = self._project_rows(u, self._state(u.shape[0], u) if state is None else state)
            attended = block_sparse_attention(q, state.keys, state.values, sparse, dropout=dropout)
            return self.out_proj(attended.flatten(2)), state if keep_state else None
        qkv = self.qkv_proj(u)
        q, k, v = self.split_qkv(qkv)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        in_place = fused(q, keys, values, sparse)
        if in_place and torch.is_grad_enabled():
            sparse = replace(sparse, readers=self._readers(length))
        if in_place and torch.is_grad_enabled() and not carried:
            qkv = qkv.unflatten(-1, (-1, self.head_dim))
            attended = packed_block_sparse_attention(qkv, self.n_heads, sparse, dropout=dropout)
            return self.out_proj(attended.flatten(2)), None
        if carried or not in_place:
            state = self._state(u.shape[0], k) if state is None else state
            keys, values = (self._append(state, kept, new) for kept, new in ((state.keys, k), (state.values, v)))
        attended = block_sparse_attention(q, keys, values, sparse, dropout=dropout)
        mixed = self.out_proj(attended.flatten(2))
        return mixed, _gone_on(state, keys, values, length) if keep_state else None

    def init_state(self, batch_size: int) -> BigBirdState:
        self.check_causal("state")
        check_counts(batch_size=batch_size)
        return self._state(batch_size, self.qkv_proj.weight)

    def _streams_in_rows(self, u: Tensor) -> bool:
        """Whether projections are written where the kernels read keys and values, rather than copied there."""
        followed = torch.is_grad_enabled() or autocasts(u.device.type)
        return not followed and not torch.compiler.is_compiling() and kernel_fits(self.pattern, u, self.head_dim)

    def _project_rows(self, u: Tensor, state: BigBirdState) -> tuple[Tensor, BigBirdState]:
        """q `[B, t, H, K]` and the state with the keys and values of u `[B, t, D]`, without autograd."""
        width, start, length = self.d_model, state.position, state.position + u.shape[1]
        rows = _rows(state)
        capacity = self.pattern.count(length) * self.pattern.block_size
        room = state.keys.shape[2]
        if rows is None or room < capacity or not state.may_grow or rows.dtype != u.dtype:
            grown = self._state(u.shape[0], u, max(capacity, 2 * room) if room < capacity else room)
            for old, new in ((state.keys, grown.keys), (state.values, grown.values)):
                new[:, :, :start] = old[:, :, :start]
            state, rows = grown, _rows(grown)
        new, weight = rows.flatten(2)[:, start:length], self.qkv_proj.weight
        if u.shape[1] < FEW_TOKENS:
            q, kv = self.qkv_proj(u).split([width, weight.shape[0] - width], dim=-1)
            new.copy_(kv)
        else:
            q = F.linear(u, weight[:width])
            project_into(u, weight[width:], out=new)
        return q.unflatten(-1, (self.n_heads, -1)), _gone_on(state, state.keys, state.values, length)

    def _append(self, state: BigBirdState, kept: Tensor, new: Tensor) -> Tensor:
        """kept, keys or values of the state `[B, G, capacity, K]`, and new `[B, t, G, K]` after them in one buffer.

        Without autograd in place, growing at least twofold; with it never, as an earlier graph may need the old one.
        """
        new = new.transpose(1, 2)
        position, size = state.position, self.pattern.block_size
        end = position + new.shape[2]
        blocks_end = -(-end // size) * size
        if torch.is_grad_enabled():
            earlier = kept[:, :, :position].to(new.dtype)
            return F.pad(torch.cat([earlier, new], dim=2), (0, 0, 0, blocks_end - end))
        short = kept.shape[2] < blocks_end
        # Autocast may have begun or ended since: queries must find keys of their own format.
        if short or not state.may_grow or not kept.is_contiguous() or kept.dtype != new.dtype:
            capacity = max(blocks_end, 2 * kept.shape[2]) if short else kept.shape[2]
            grown = new.new_empty(*kept.shape[:2], capacity, kept.shape[3])
            grown[:, :, :position] = kept[:, :, :position]
            kept = grown
        # Where no query of before looks: a graph that still needs the keys it has seen need not hear of the change.
        room = kept.data
        room[:, :, position:end] = new
        room[:, :, end:blocks_end] = 0
        return kept

    def _state(self, batch_size: int, like: Tensor, capacity: int = 0) -> BigBirdState:
        if self._streams_in_rows(like):
            rows = like.new_empty(batch_size, capacity, 2, self.num_kv_heads, self.head_dim)
            return BigBirdState(*(part.transpose(1, 2) for part in rows.unbind(2)), 0)
        shape = (batch_size, self.num_kv_heads, capacity, self.head_dim)
        return BigBirdState(like.new_empty(shape), like.new_empty(shape), 0)

    def _infer(self, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
        if self.causal and state is None and (keep_state or len(list(self._slabs(x))) > 1):
            # The shell streams slab after slab: room for all at once spares the growing buffer its copies.
            capacity = self.pattern.count(x.shape[1]) * self.pattern.block_size
            state = self._state(x.shape[0], x, capacity)
        return super()._infer(x, state, keep_state)

    @property
    def mixer_path(self) -> str:
        weight = self.qkv_proj.weight
        if weight.device.type == "cpu":
            direct = self.causal and weight.dtype in (torch.float32, torch.float64)
            if not direct or (self.training and self.dropout):
                return "gathered blocks, SDPA"
            products = "global, window and random products"
            return f"{products}, gradients through gathered blocks" if self.training else products
        if kernel_fits(self.pattern, weight, self.head_dim):
            return "Triton list attention"
        return "gathered blocks, SDPA with bottom-right causal mask" if self.causal else "gathered blocks, SDPA"


def _rows(state: BigBirdState) -> Tensor | None:
    """The buffer `[B, capacity, 2, G, K]` that keys and values lie in side by side, as a projection gives them; None
    if they lie apart."""
    keys, values = state.keys, state.values
    batch, groups, capacity, width = keys.shape
    token = 2 * groups * width
    strides = (capacity * token, width, token, 1)
    beside = keys.data_ptr() + groups * width * keys.element_size() == values.data_ptr()
    if not beside or not capacity or keys.stride() != strides or values.stride() != strides:
        return None
    return keys.as_strided((batch, capacity, 2, groups, width), (strides[0], token, groups * width, width, 1))


def _gone_on(state: BigBirdState, keys: Tensor, values: Tensor, position: int) -> BigBirdState:
    """The state after `state`, on these buffers: its own, written further, or others."""
    written = state.written if keys is state.keys else [0]
    written[0] = position
    return BigBirdState(keys, values, position, written)


def reference(block: BigBirdBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, None]:
    """x `[B, T, D]` -> (y `[B, T, D]`, None): dense attention under a mask that is written out."""
    group = block.n_heads // block.num_kv_heads
    q, k, v = block.split_qkv(block.qkv_proj(block.attn_norm(x)))
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / block.head_dim**0.5
    weights = scores.masked_fill(~visible(block, x.shape[1]), float("-inf")).softmax(dim=-1)
    x = x + block.out_proj(torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2))
    return x + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(x)))), None


def visible(block: BigBirdBlock, length: int) -> Tensor:
    """Which keys each query sees: bool `[H, T, T]`, from the definition."""
    pattern, plan = block.pattern, block.plan(length)
    heads, n, _ = plan.shape
    index = torch.arange(n, device=plan.device)
    behind = index[:, None] - index
    if block.causal:
        seen = (index < pattern.num_global_blocks) | (behind < pattern.num_window_blocks)
    else:
        last = pattern.num_global_blocks // 2
        ends = (index < pattern.num_global_blocks - last) | (index >= n - last)
        seen = ends | ends[:, None] | (behind.abs() <= pattern.num_window_blocks // 2)
    # An entry of -1 marks a column that is then cut off.
    random = torch.zeros(heads, n, n + 1, dtype=torch.bool, device=plan.device).scatter_(2, plan % (n + 1), True)
    seen = (seen | random[:, :, :n]).repeat_interleave(pattern.block_size, dim=1)
    seen = seen.repeat_interleave(pattern.block_size, dim=2)[:, :length, :length]
    return seen.tril() if block.causal else seen


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """Visible pairs counted exactly; the state is every key and value of the sequence."""
    names = ("block_size", "num_window_blocks", "num_random_blocks", "num_global_blocks", "causal")
    pattern = BlockPattern(**{name: options[name] for name in names})
    heads_kv, width = cell.num_kv_heads or cell.n_heads, cell.d_model // cell.n_heads
    if not pattern.causal:
        return shell_cost(cell, pairs=_bidirectional_pairs(pattern, cell, options["seed"]))
    size, length = pattern.block_size, cell.length
    near = pattern.num_global_blocks + pattern.num_window_blocks - 1
    most = near + pattern.num_random_blocks
    whole, rest = divmod(length, size)
    # Query block i sees min(i, most) blocks before it, and of itself the lower triangle.
    few = min(whole, most)
    earlier = few * (few - 1) // 2 + most * (whole - few)
    pairs = earlier * size**2 + whole * size * (size + 1) // 2
    pairs += rest * min(whole, most) * size + rest * (rest + 1) // 2
    block, row = divmod(length - 1, size)
    shared = min(block, near) * size + row + 1
    random = min(block - min(block, near), pattern.num_random_blocks) * size
    return shell_cost(
        cell,
        pairs=pairs if cell.mode != "decode" else shared + random,
        state_elements=2 * heads_kv * width * length,
        # Heads of one group share globals and window; each has random blocks of its own.
        read_elements=2 * width * (heads_kv * shared + cell.n_heads * random),
    )


def _bidirectional_pairs(pattern: BlockPattern, cell: Cell, seed: int) -> float:
    """Visible pairs of one sequence, the mean over heads: a random block may be the ragged last one."""
    size, n = pattern.block_size, pattern.count(cell.length)
    plan = draw_random_blocks(pattern, seed=seed, n_heads=cell.n_heads, n_blocks=n)
    first, last = pattern.inner(n)
    tokens = torch.full((n + 1,), size)
    tokens[n - 1] -= n * size - cell.length
    tokens[n] = 0  # what an entry of -1 stands for
    keys = tokens[visible_blocks(pattern, plan, first, last, n)].sum(-1)
    inner = (keys * tokens[first:last]).sum().item() / cell.n_heads
    return inner + (cell.length - tokens[first:last].sum().item()) * cell.length


SPEC = BlockSpec(label="BigBird", build=BigBirdBlock, reference=reference, cost=cost)
