"""Which key blocks each query block of BigBird sees: globals, a window, and random ones drawn by counting.

Letters: H n_heads, n query blocks, r num_random_blocks, L length of a block's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import UsageError

_LOW_63_BITS = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """The part of the pattern that is the same for every head, counted in blocks of `block_size` tokens."""

    block_size: int
    num_window_blocks: int
    num_random_blocks: int
    num_global_blocks: int
    causal: bool

    def count(self, length: int) -> int:
        """Blocks that hold `length` tokens, a ragged last one included."""
        return -(-length // self.block_size)

    def window(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """First block of each query block's window and the one after its last, not clipped to the ends."""
        if self.causal:
            return blocks - self.num_window_blocks + 1, blocks + 1
        half = self.num_window_blocks // 2
        return blocks - half, blocks + half + 1

    def inner(self, n_blocks: int) -> tuple[int, int]:
        """The blocks that are not global are range(first, last)."""
        if self.causal:
            return min(self.num_global_blocks, n_blocks), n_blocks
        first = min(-(-self.num_global_blocks // 2), n_blocks)
        return first, max(first, n_blocks - self.num_global_blocks // 2)

    def sees_all(self, block: int, n_blocks: int) -> bool:
        """Whether a query block reads every key: the global ones do, unless later keys are hidden."""
        first, last = self.inner(n_blocks)
        return not self.causal and not first <= block < last

    def complete(self, length: int) -> range:
        """Query blocks whose lists of key blocks lack nothing, random blocks being drawn.

        All that hides in them is the diagonal when causal, and otherwise the tail of a ragged last block, which
        then ends the list.
        """
        n_blocks, reach = self.count(length), self.num_random_blocks
        first, last = self.inner(n_blocks)
        if self.causal:
            return range(min(n_blocks, first + self.num_window_blocks + reach - 1), n_blocks)
        ragged_inside = length % self.block_size and last == n_blocks
        if ragged_inside or last - first - self.num_window_blocks < reach:
            return range(0)
        return range(first + self.num_window_blocks // 2, last - self.num_window_blocks // 2)


@dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Which keys the queries of one call see.

    plan: random blocks `[H, >= n, r]`, as `draw_random_blocks` gives them. complete: query blocks from whose
    lists nothing is missing (`BlockPattern.complete`, less those with a -1 in the plan). start: position of the
    first query. length: number of keys; when causal, start + t. readers: the random blocks transposed, as
    `transposed_plan` gives them, for the gradients of the kernel; None: made when they are needed.
    """

    pattern: BlockPattern
    plan: Tensor
    complete: range
    start: int
    length: int
    readers: tuple[Tensor, Tensor] | None = None

    @property
    def n_blocks(self) -> int:
        return self.pattern.count(self.length)


def draw_random_blocks(
    pattern: BlockPattern, *, seed: int, n_heads: int, n_blocks: int, device: torch.device | str | None = None
) -> Tensor:
    """The random blocks of every head and query block: int64 `[H, n, r]`, ascending, then -1 for none.

    r distinct blocks out of those that are neither global nor in the window (nor later, when causal); all of
    them if there are fewer. Each entry is a function of (seed, head, query block) and of the number of blocks to
    choose from, so a causal plan does not depend on the length of the sequence. Robert Floyd's sampling with a
    hash of the counters in place of a generator: O(r^2) work for each list, the same on every device.
    """
    picks = pattern.num_random_blocks
    head = torch.arange(n_heads, device=device)[:, None]
    block = torch.arange(n_blocks, device=device)[None, :]
    first, last = pattern.inner(n_blocks)
    window_first, window_last = (edge.clamp(first, last) for edge in pattern.window(block))
    if pattern.causal:
        candidates = (window_first - first).expand(n_heads, -1)
    else:
        candidates = (last - first - (window_last - window_first)).expand(n_heads, -1)
    key = _scramble(_scramble(_scramble(torch.full_like(head, _signed(seed))) + head) + block)
    chosen = torch.empty(n_heads, n_blocks, 0, dtype=torch.int64, device=device)
    for pick in range(picks):
        top = candidates - picks + pick
        rank = (_scramble(key + pick) & _LOW_63_BITS) % (top + 1).clamp(min=1)
        taken = (chosen == rank[..., None]).any(-1)
        rank = torch.where(taken, top, rank)
        chosen = torch.cat([chosen, torch.where(top >= 0, rank, -1)[..., None]], dim=-1)
    drawn = chosen + first
    if not pattern.causal:
        drawn += torch.where(drawn >= window_first[..., None], (window_last - window_first)[..., None], 0)
    drawn = torch.where(chosen >= 0, drawn, _LOW_63_BITS).sort(-1).values
    if not pattern.causal:
        rows = torch.arange(n_blocks, device=device)
        drawn[:, (rows < first) | (rows >= last)] = _LOW_63_BITS
    return torch.where(drawn == _LOW_63_BITS, -1, drawn)


def visible_blocks(pattern: BlockPattern, plan: Tensor, first: int, last: int, n_blocks: int) -> Tensor:
    """Key blocks that query blocks first..last-1 see, each once: int64 `[H, last - first, L]`, -1 for none.

    Causal lists end with the query block itself, bidirectional ones with the last block of the sequence where
    that is global. plan `[H, >= last, r]`. Blocks that see everything are not asked for here.
    """
    block = torch.arange(first, last, device=plan.device)[:, None]
    start, stop = pattern.window(block)
    width = pattern.num_window_blocks
    window = start + torch.arange(width, device=plan.device)
    inner_first, inner_last = pattern.inner(n_blocks)
    edges = [
        torch.arange(inner_first, device=plan.device),
        torch.arange(inner_last, n_blocks, device=plan.device),
    ]
    globals_ = torch.cat(edges).expand(last - first, -1)
    globals_ = torch.where((globals_ >= start) & (globals_ < stop), -1, globals_)
    if pattern.causal:
        globals_ = torch.where(globals_ <= block, globals_, -1)
    window = torch.where((window >= 0) & (window < n_blocks), window, -1)
    parts = [plan[:, first:last], window.expand(plan.shape[0], -1, -1)]
    parts.insert(0 if pattern.causal else 2, globals_.expand(plan.shape[0], -1, -1))
    return torch.cat(parts, dim=-1)


def transposed_plan(plan: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    """(readers int32 `[H, n * r]`, ends int32 `[H, n + 1]`): which query blocks have drawn each key block.

    Those of block j are readers[ends[j]:ends[j + 1]], ascending. plan `[H, >= n, r]`, -1 for none.
    """
    picks = plan.shape[2]
    drawn = plan[:, :n_blocks].flatten(1)
    ordered, order = torch.where(drawn < 0, n_blocks, drawn).sort(dim=1, stable=True)
    blocks = torch.arange(n_blocks + 1, device=plan.device).expand(plan.shape[0], -1).contiguous()
    return (order // max(picks, 1)).to(torch.int32), torch.searchsorted(ordered, blocks).to(torch.int32)


def check_plan(pattern: BlockPattern, plan: Tensor, n_heads: int) -> None:
    """Raises UsageError unless plan is int64 `[H, n, r]`: -1, or distinct blocks that may be random ones."""
    picks = pattern.num_random_blocks
    if not isinstance(plan, Tensor) or plan.dtype != torch.int64:
        raise UsageError("a plan is an int64 tensor [H, n_blocks, num_random_blocks]")
    if plan.dim() != 3 or plan.shape[0] != n_heads or plan.shape[1] < 1 or plan.shape[2] != picks:
        raise UsageError(f"a plan of this block is [{n_heads}, n_blocks, {picks}], not {list(plan.shape)}")
    n_blocks = plan.shape[1]
    block = torch.arange(n_blocks, device=plan.device)[:, None]
    first, last = pattern.inner(n_blocks)
    start, stop = pattern.window(block)
    allowed = (plan >= first) & (plan < last) & ((plan < start) | (plan >= stop))
    if pattern.causal:
        allowed &= plan < start
    else:
        allowed &= (block >= first) & (block < last)
    if not bool(((plan == -1) | allowed).all()):
        raise UsageError(
            "a plan holds a block that is no random one of its query block",
            "random blocks are neither global nor in the window, never later when causal; -1 stands for none",
        )
    ordered = plan.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise UsageError("a plan names a block twice for one query block", "a block counts once; -1 stands for none")


def _signed(value: int) -> int:
    """`value` modulo 2^64 as an int64 holds it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _scramble(x: Tensor) -> Tensor:
    """One step of splitmix64 (Steele et al. 2014) from the state x, on int64, which wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
