"""Longformer: a window of recent tokens and a few global ones (Beltagy et al. 2020, arXiv 2004.05150).

Causal: token t sees the tokens at distances 0, d, ..., (W-1)d behind it and the first g tokens, none of them twice.
Not causal: distances up to (W // 2)d on both sides, and the first g tokens see all. The row of a global token takes
its query, and all the keys and values that it reads, from a projection of its own.

Letters: B batch, T tokens, D d_model, H heads, G key-value heads, K head width, W window, d dilation, g globals.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.blocks._shell import PreNormBlock, check_batch, check_counts
from longctx.blocks._spec import ELEMENT_BYTES, BlockSpec, Cost, shell_cost
from longctx.config import Cell
from longctx.errors import UsageError
from longctx.ops.decode import Decoder, Live, Stream, decode_path, step_key, step_weights
from longctx.ops.dense_attention import dense_attention
from longctx.ops.key_values import KeyValues
from longctx.ops.precision import autocasts
from longctx.ops.projections import project_beside, project_into
from longctx.ops.window_attention import packed_window_attention, window_attention, window_attention_path


@dataclass(kw_only=True)
class LongformerState:
    """What later tokens need of earlier ones.

    seen: tokens so far. recent: keys and values of the last (W-1)d tokens behind the globals. first: those of the
    globals so far, `[B, min(seen, g), 2, G, K]`. first_rows: the same from the globals' own projection, None once
    all g tokens have passed.
    """

    seen: int
    recent: KeyValues
    first: Tensor
    first_rows: Tensor | None

    def detach(self) -> LongformerState:
        """The same state, cut off from the graph of the calls that made it."""
        rows = None if self.first_rows is None else self.first_rows.detach()
        return replace(self, recent=self.recent.detach(), first=self.first.detach(), first_rows=rows)


@dataclass(kw_only=True, eq=False)
class LongformerStream(Stream):
    """What a stream carries on where steps are replays of a CUDA graph.

    seen: tokens so far. first: keys and values of the globals, `[B, g, 2, G, K]`.
    """

    live: Live
    seen: int
    first: Tensor
    reach: int

    def detach(self) -> LongformerState:
        rows = self.live.recent().unflatten(-1, self.first.shape[2:])
        count = rows.shape[1]
        recent = KeyValues(buffer=rows, reach=self.reach, lead=self.first.shape[1], end=count, alive=count)
        return LongformerState(seen=self.seen, recent=recent, first=self.first, first_rows=None)


class LongformerBlock(PreNormBlock):
    """Sliding-window attention with global tokens.

    window_size: W, even without causality. dilation: d. num_global_tokens: g, the first tokens of the sequence.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        window_size: int = 512,
        dilation: int = 1,
        num_global_tokens: int = 1,
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
        check_counts(window_size=window_size, dilation=dilation)
        check_counts(least=0, num_global_tokens=num_global_tokens)
        if not causal and window_size % 2:
            raise UsageError(f"without causality window_size must be even, half on each side, not {window_size}")
        self.window_size, self.dilation, self.num_global_tokens = window_size, dilation, num_global_tokens
        if num_global_tokens:
            rows = self.qkv_proj.out_features
            self.qkv_global_proj = nn.Linear(d_model, rows, bias=False, device=device, dtype=dtype)
        self._decoder = Decoder(window_size, dilation, num_global_tokens)

    @property
    def mixer_path(self) -> str:
        weight = self.qkv_proj.weight
        path = window_attention_path(weight.device, weight.dtype, self.head_dim)
        return path + (decode_path(weight) if self.causal else "")

    def init_state(self, batch_size: int) -> LongformerState:
        self.check_causal("state")
        check_counts(batch_size=batch_size)
        none = self.qkv_proj.weight.new_empty(batch_size, 0, 2, self.num_kv_heads, self.head_dim)
        reach = (self.window_size - 1) * self.dilation
        recent = KeyValues(buffer=none, reach=reach, lead=self.num_global_tokens)
        return LongformerState(seen=0, recent=recent, first=none, first_rows=none if self.num_global_tokens else None)

    def forward(
        self, x: Tensor, state: LongformerState | None = None, *, keep_state: bool = True
    ) -> tuple[Tensor, LongformerState | None]:
        """As `PreNormBlock.forward`; the state given is left as it was, and can be continued again."""
        if isinstance(state, LongformerStream):
            state = state.detach()
        elif isinstance(state, LongformerState):
            state = replace(state, recent=state.recent.fork())
        y, state = super().forward(x, state, keep_state=keep_state)
        if state is not None and not torch.is_grad_enabled():
            state.recent = state.recent.trim()
        return y, state

    def step(
        self, x_t: Tensor, state: LongformerState | LongformerStream
    ) -> tuple[Tensor, LongformerState | LongformerStream]:
        self.check_step(x_t)
        key = step_key(self, x_t)
        if key is not None:
            if not (isinstance(state, LongformerStream) and state.live.key == key):
                state = self._enter(key, x_t, state)
            if isinstance(state, LongformerStream):
                state.seen += 1
                return state.live.run(x_t), state
        if isinstance(state, LongformerStream):
            state = state.detach()
        return super().forward(x_t, state)

    def _enter(
        self, key: Hashable, x_t: Tensor, state: LongformerState | LongformerStream
    ) -> LongformerState | LongformerStream:
        """The state as one that graphs step, if they can: not before all globals have passed."""
        if isinstance(state, LongformerStream):
            state = state.detach()
        shape = (state.first.shape[0], 1, self.d_model)
        if state.first.shape[1] < self.num_global_tokens or x_t.shape != shape:
            return state
        recent = state.recent
        kv = recent.buffer[:, recent.end - recent.alive : recent.end].flatten(2)
        live = self._decoder.enter(key, step_weights(self), kv=kv, first=state.first.flatten(2))
        if live is None:
            return state
        return LongformerStream(live=live, seen=state.seen, first=state.first, reach=recent.reach)

    def mix(self, u: Tensor, state: LongformerState | None, keep_state: bool) -> tuple[Tensor, LongformerState | None]:
        # Without autograd a long causal sequence comes in slabs, and each carries the next on.
        whole = not self.causal or (state is None and not keep_state)
        mixed = (self._mix_whole(u), None) if whole else self._mix_causal(u, state, keep_state)
        return self.out_proj(mixed[0].flatten(2)), mixed[1]

    def _mix_causal(
        self, u: Tensor, state: LongformerState | None, keep_state: bool
    ) -> tuple[Tensor, LongformerState | None]:
        state = self.init_state(u.shape[0]) if state is None else state
        check_batch(state.first.shape[0], u.shape[0])
        if self._goes_in_place(u, state):
            return self._mix_slab(u, state, keep_state)
        seen, first = state.seen, state.first
        q, kv = self._project(self.qkv_proj, u)
        head = min(max(self.num_global_tokens - seen, 0), u.shape[1])
        parts = []
        if head:
            # Global rows see each other alone, through their own projection.
            global_q, rows = self._project(self.qkv_global_proj, u[:, :head])
            first = _join(first, kv[:, :head])
            rows = _join(state.first_rows, rows)
            state.first_rows = rows if seen + head < self.num_global_tokens else None
            parts.append(self._attend(global_q, rows, window_size=rows.shape[1], dilation=1))
        if head < u.shape[1]:
            q, kv = q[:, head:], state.recent.append(kv[:, head:])
            parts.append(self._attend_window(q, kv, first, state))
        state.seen, state.first = seen + u.shape[1], first
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), state if keep_state else None

    def _goes_in_place(self, u: Tensor, state: LongformerState) -> bool:
        """Whether to write a projection behind the keys carried on: not for a few tokens, which would move more than
        they are, nor where the globals come in pieces."""
        followed = torch.is_grad_enabled() or autocasts(u.device.type)
        apart = state.seen == 0 or state.seen >= self.num_global_tokens
        return not followed and not torch.compiler.is_compiling() and apart and u.shape[1] >= state.recent.reach

    def _mix_slab(self, u: Tensor, state: LongformerState, keep_state: bool) -> tuple[Tensor, LongformerState | None]:
        """A long slab without autograd: its projection becomes the buffer of keys and values, into which nothing has
        to be moved but the last of those before it."""
        recent, seen, heads = state.recent, state.seen, self.n_heads
        kept = min(recent.alive, recent.reach)
        rows = u.new_empty(u.shape[0], kept + u.shape[1], heads + 2 * self.num_kv_heads, self.head_dim)
        project_into(u, self.qkv_proj.weight, out=rows.flatten(2)[:, kept:])
        kv = rows[:, :, heads:].unflatten(2, (2, -1))
        if kept:
            kv[:, :kept] = recent.buffer[:, recent.end - kept : recent.end]
        head = 0
        if seen:
            mixed = self._attend(rows[:, kept:, :heads], kv, first=state.first if self.num_global_tokens else None)
        else:
            head = min(self.num_global_tokens, u.shape[1])
            state.first = kv[:, :head].clone()
            of_first = self.qkv_global_proj(u[:, :head]) if head else None
            state.first_rows = None
            if 0 < head < self.num_global_tokens:
                state.first_rows = self._split(of_first)[1].clone()
            mixed = self._mix_rows(u, rows, of_first)
        state.seen = seen + u.shape[1]
        if keep_state:
            last = kv[:, max(head, kv.shape[1] - recent.reach) :].clone()
            count = last.shape[1]
            state.recent = replace(recent, buffer=last, end=count, alive=count, shared=True)
        return mixed, state if keep_state else None

    def _attend_window(self, q: Tensor, kv: Tensor, first: Tensor, state: LongformerState) -> Tensor:
        if not self.num_global_tokens:
            return self._attend(q, kv)
        if q.shape[1] == 1 and self.dilation == 1 and not state.recent.shared:
            # A single token sees every row there is: with the globals in front of the window, one call does.
            return self._attend(q, state.recent.with_lead(first), window_size=kv.shape[1] + first.shape[1])
        return self._attend(q, kv, first=first)

    def _attend(
        self,
        q: Tensor,
        kv: Tensor,
        *,
        first: Tensor | None = None,
        window_size: int | None = None,
        dilation: int | None = None,
    ) -> Tensor:
        k, v = kv.unbind(2)
        global_k, global_v = (None, None) if first is None else first.unbind(2)
        return window_attention(
            q,
            k,
            v,
            window=window_size or self.window_size,
            dilation=dilation or self.dilation,
            causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            global_k=global_k,
            global_v=global_v,
            key_offset=self.num_global_tokens,
        )

    def _mix_whole(self, u: Tensor) -> Tensor:
        """Attention of a whole sequence, nothing carried: u `[B, T, D]` -> `[B, T, H, K]`."""
        head = min(self.num_global_tokens, u.shape[1])
        weight, of_first = self.qkv_proj.weight, None
        if head and self.causal:
            qkv, of_first = project_beside(u, weight, self.qkv_global_proj.weight, head)
        else:
            qkv = F.linear(u, weight)
        return self._mix_rows(u, qkv.unflatten(-1, (-1, self.head_dim)), of_first)

    def _mix_rows(self, u: Tensor, qkv: Tensor, of_first: Tensor | None) -> Tensor:
        """The same from the projection qkv `[B, T, H + 2G, K]` and the globals' own `[B, g, D + 2GK]`, if causal."""
        dropout_p = self.dropout if self.training else 0.0
        head = min(self.num_global_tokens, u.shape[1])
        rows = None
        if of_first is not None and head == 1 and not dropout_p:
            # A token that sees itself alone gets its own value.
            value = of_first.unflatten(-1, (-1, self.head_dim))[:, :, -self.num_kv_heads :]
            group = self.n_heads // self.num_kv_heads
            rows = value if group == 1 else value.repeat_interleave(group, dim=2)
        elif of_first is not None:
            # Global rows see each other alone, through their own projection.
            rows = self._attend(*self._split(of_first), window_size=head, dilation=1)
        elif head:
            weights = self.qkv_global_proj.weight
            global_q = F.linear(u[:, :head], weights[: self.d_model]).unflatten(-1, (self.n_heads, self.head_dim))
            kv = F.linear(u, weights[self.d_model :]).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
            rows = dense_attention(global_q, *kv.unbind(2), causal=False, dropout_p=dropout_p)
        return packed_window_attention(
            qkv,
            n_heads=self.n_heads,
            window=self.window_size,
            dilation=self.dilation,
            causal=self.causal,
            dropout_p=dropout_p,
            global_rows=rows,
        )

    def _project(self, projection: nn.Linear, u: Tensor) -> tuple[Tensor, Tensor]:
        """u `[B, t, D]` -> q `[B, t, H, K]`, keys and values `[B, t, 2, G, K]`: views of one product."""
        return self._split(projection(u))

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """qkv `[B, t, D + 2GK]` -> q `[B, t, H, K]`, keys and values `[B, t, 2, G, K]`."""
        q, kv = qkv.split([self.d_model, 2 * self.num_kv_heads * self.head_dim], dim=-1)
        return (
            q.unflatten(-1, (self.n_heads, self.head_dim)),
            kv.unflatten(-1, (2, self.num_kv_heads, self.head_dim)),
        )


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    """Both behind each other in memory of their own: a view would keep a whole slab alive."""
    return new.clone() if old is None or not old.shape[1] else torch.cat([old.to(new.dtype), new], dim=1)


def reference(block: LongformerBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, None]:
    """x `[B, T, D]` -> (y `[B, T, D]`, None) by dense masks."""
    u = block.attn_norm(x)
    position = torch.arange(x.shape[1], device=x.device)
    distance = position[:, None] - position[None, :]
    within = (distance % block.dilation == 0) & (distance.abs() <= _reach(block))
    is_global = position < block.num_global_tokens
    allowed = distance >= 0 if block.causal else torch.ones_like(distance, dtype=torch.bool)
    mixed = _dense(block, block.qkv_proj(u), (within | is_global[None, :]) & allowed)
    if block.num_global_tokens:
        of_globals = _dense(block, block.qkv_global_proj(u), allowed)
        mixed = torch.where(is_global[:, None], of_globals, mixed)
    x = x + block.out_proj(mixed)
    return x + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(x)))), None


def _reach(block: LongformerBlock) -> int:
    return (block.window_size - 1 if block.causal else block.window_size // 2) * block.dilation


def _dense(block: LongformerBlock, qkv: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in block.split_qkv(qkv))
    k, v = (t.repeat_interleave(block.n_heads // block.num_kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / block.head_dim**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def visible_pairs(length: int, options: Mapping[str, Any], *, last_only: bool = False) -> int:
    """(query, key) pairs that see each other among `length` tokens; of the last token alone if `last_only`."""
    window, dilation, head = options["window_size"], options["dilation"], options["num_global_tokens"]
    if not options["causal"]:
        head, behind = min(head, length), max(length - head, 0)
        near = behind + 2 * _ramp(behind, window // 2, dilation)
        return head * length + behind * head + near
    if last_only:
        behind = length - 1 - head
        return length if behind < 0 else head + min(window, behind // dilation + 1)
    head, behind = min(head, length), max(length - head, 0)
    return head * (head + 1) // 2 + behind * head + behind + _ramp(behind, window - 1, dilation)


def _ramp(count: int, most: int, dilation: int) -> int:
    """Sum over x < count of min(most, x // dilation)."""
    rising = min(count, most * dilation)
    whole, rest = divmod(rising, dilation)
    return dilation * whole * (whole - 1) // 2 + rest * whole + (count - rising) * most


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """The shell, every visible pair, and the globals' own projection: of the keys of all tokens if not causal."""
    length, head = cell.length, min(options["num_global_tokens"], cell.length)
    heads_kv = cell.num_kv_heads or cell.n_heads
    token = 2 * heads_kv * (cell.d_model // cell.n_heads)
    decode = cell.mode == "decode"
    pairs = visible_pairs(length, options, last_only=decode)
    queries = head if not decode else int(length <= head)
    readers = length if head and not options["causal"] else queries
    reach = (options["window_size"] - 1) * options["dilation"]
    carried = head + min(max(length - head, 0), reach)
    if length < options["num_global_tokens"]:
        carried += length
    shell = shell_cost(
        cell,
        pairs=pairs,
        other_flops=2.0 * cell.d_model * (cell.d_model * queries + token * readers),
        state_elements=carried * token if options["causal"] else 0,
        read_elements=(pairs - 1) * token,
    )
    if not readers:
        return shell
    weights = cell.d_model * (cell.d_model + token) * ELEMENT_BYTES[cell.dtype]
    return replace(shell, bytes=shell.bytes + weights * (3 if cell.mode == "train" else 1))


SPEC = BlockSpec(label="Longformer", build=LongformerBlock, reference=reference, cost=cost)
