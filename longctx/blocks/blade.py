"""BLADE: attention inside chunks, and a small recurrent state that each chunk hands to the next.

For each chunk of C tokens in order, with s the state (zeros at the start) and g the learned global tokens:

    h = attn_norm(x_chunk) + state_inject(s)
    a = causal attention over [g; h], rows of h only
    y = x_chunk + out_proj(a);  y = y + ffn(ffn_norm(y))
    s = state_proj(mean over tokens of y)

The recurrence runs over chunks and cannot be parallelised; what is not on it is taken off it (ops/blade_chain.py, and
ops/blade_training.py with gradients).

Letters: B batch, T sequence length, n tokens of a chunk, D d_model, H n_heads, G num_kv_heads, K head width,
C chunk_size, N state_dim, m num_global_tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.blocks import _shell
from longctx.blocks._blade_reference import cost, reference
from longctx.blocks._blade_state import BLADEState, BLADEStream
from longctx.blocks._shell import PreNormBlock, check_batch, check_counts
from longctx.blocks._spec import BlockSpec
from longctx.blocks._states import Tape, append, usable
from longctx.errors import UsageError
from longctx.ops.blade_chain import (
    ChainWeights,
    chain,
    chain_chunk,
    chunk_attention,
    chunk_attention_path,
)
from longctx.ops.blade_graph import ChainGraphs, kernels_fit
from longctx.ops.blade_training import whole_chunks
from longctx.ops.blade_training_graph import MOST_CHUNK_TOKENS, TrainingGraphs
from longctx.ops.decode import Decoder, decode_path, step_key, step_weights
from longctx.ops.layer_norm import normalize
from longctx.ops.precision import autocasts, wide_dtype

# Tokens of whole chunks that a GPU takes between two products off the chain: the products are then at full speed, and
# the hidden rows kept for the second of them stay small.
GPU_CHAIN_TOKENS = 32768
# Where a chunk is longer than a slab it is taken in parts, of not fewer tokens than this.
LEAST_PART = 128


class BLADEBlock(PreNormBlock):
    """Causal attention inside chunks of `chunk_size` tokens, joined by a recurrent state of `state_dim` channels.

    num_global_tokens: learned tokens that every query sees. Parameters besides the shared: state_inject (N -> D),
    state_proj (D -> N), both with bias; global_tokens `[m, D]` if m > 0.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        chunk_size: int = 512,
        state_dim: int = 64,
        num_global_tokens: int = 0,
        dropout: float = 0.0,
        recompute: str = "norms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(chunk_size=chunk_size, state_dim=state_dim)
        check_counts(least=0, num_global_tokens=num_global_tokens)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = {"d_model": d_model, "n_heads": n_heads, "num_kv_heads": num_kv_heads}
        super().__init__(**shape, dropout=dropout, recompute=recompute, **factory)
        self.chunk_size, self.state_dim, self.num_global_tokens = chunk_size, state_dim, num_global_tokens
        self.state_inject = nn.Linear(state_dim, d_model, **factory)
        self.state_proj = nn.Linear(d_model, state_dim, **factory)
        self._graphs = ChainGraphs()
        self._decoder = Decoder(chunk_size, 1, num_global_tokens)
        self._training_graphs = TrainingGraphs()
        if num_global_tokens:
            tokens = torch.empty(num_global_tokens, d_model, **factory)
            self.global_tokens = nn.Parameter(nn.init.normal_(tokens, 0.0, 0.02))

    # The chain has norms and GELU of its own.
    shell_path = ""

    def init_state(self, batch_size: int, s: Tensor | None = None) -> BLADEState:
        """The state at the start of a sequence; s `[B, N]`: the recurrent state to begin from, zeros if None.

        Raises UsageError for an s of another shape.
        """
        check_counts(batch_size=batch_size)
        weight = self.qkv_proj.weight
        dtype = wide_dtype(weight.dtype)
        if s is None:
            s = torch.zeros(batch_size, self.state_dim, device=weight.device, dtype=dtype)
        elif s.shape != (batch_size, self.state_dim):
            raise UsageError(f"the state s must be {[batch_size, self.state_dim]}, not {list(s.shape)}")
        return self._fresh(s.to(device=weight.device, dtype=dtype))

    def forward(self, x: Tensor, state: BLADEState | None = None, *, keep_state: bool = True) -> tuple[Tensor, Any]:
        """x `[B, T, D]` -> (y `[B, T, D]`, state or None). Any split of a sequence over calls gives the same.

        Raises UsageError for an input or a state of the wrong shape.
        """
        self.check_input(x, state)
        if isinstance(state, BLADEStream):
            state = state.detach()
        if state is None:
            state = self.init_state(x.shape[0])
        check_batch(state.s.shape[0], x.shape[0])
        state = usable(state)
        drops = self.training and self.dropout > 0.0
        if torch.compiler.is_exporting():
            return self._exported(x, state, keep_state)
        followed = torch.is_grad_enabled() or autocasts(x.device.type)
        # A compiler follows no products into buffers, and takes the operator of training as one step.
        if drops or followed or torch.compiler.is_compiling():
            return self._with_gradients(x, state, keep_state)
        return self._infer(x, state, keep_state)

    def step(self, x_t: Tensor, state: BLADEState | BLADEStream) -> tuple[Tensor, BLADEState | BLADEStream]:
        self.check_step(x_t)
        key = step_key(self, x_t)
        if key is not None:
            if not (isinstance(state, BLADEStream) and state.live.key == key):
                state = self._enter(key, x_t, state)
            if isinstance(state, BLADEStream):
                y_t = state.live.run(x_t)
                if state.live.count == self.chunk_size:
                    state.start = state.s
                    state.live.begin(**self._injection(state.start))
                return y_t, state
        return self.forward(x_t, state)

    def _enter(self, key: Hashable, x_t: Tensor, state: BLADEState | BLADEStream) -> BLADEState | BLADEStream:
        """The state as one that graphs step, if they can."""
        if isinstance(state, BLADEStream):
            state = state.detach()
        if x_t.shape != (state.s.shape[0], 1, self.d_model):
            return state  # which `forward` then refuses
        live = self._decoder.enter(key, step_weights(self, injects=True), kv=state.kv)
        if live is None:
            return state
        live.begin(**self._injection(state.start), total=state.total)
        return BLADEStream(block=self, live=live, start=state.start)

    def _injection(self, s: Tensor) -> dict[str, Tensor | None]:
        """What a chunk that begins with s `[B, N]` adds to queries and to what is attended, and its globals' keys."""
        weights = self._chain_weights()
        for_q, for_kv, for_attended = weights.injection(s)
        global_kv = weights.global_kv()
        first = None if global_kv is None else global_kv - for_kv[:, None]
        return {"for_q": for_q, "for_attended": for_attended, "first": first}

    @property
    def mixer_path(self) -> str:
        weight = self.qkv_proj.weight
        attention = chunk_attention_path(weight.device, weight.dtype, self.head_dim)
        kernels = "fused Triton chain" if kernels_fit(self._chain_weights()) else attention
        if self.training:
            if self.dropout:
                return f"{attention}, chunk by chunk as autograd follows"
            most = MOST_CHUNK_TOKENS // self.chunk_size
            if kernels is attention or not most:
                return f"one operator, {attention}"
            return f"one operator, {kernels} up to batch {most}"
        if not weight.is_cuda:
            return f"{attention}, chunk by chunk"
        chunks = max(1, GPU_CHAIN_TOKENS // self.chunk_size)
        path = f"{kernels}, CUDA graphs of up to {1 << (chunks.bit_length() - 1)} chunks"
        return path + decode_path(weight)

    # -- with autograd, autocast or dropout ---------------------------------------------------------------------------

    def _differentiable(self, x: Tensor, state: BLADEState, keep_state: bool) -> tuple[Tensor, BLADEState | None]:
        """With gradients: whole chunks in one operator where it can do them, parts of chunks as autograd follows."""
        filled = state.kv.shape[1]
        head = min(self.chunk_size - filled, x.shape[1]) if filled else 0
        whole = (x.shape[1] - head) // self.chunk_size * self.chunk_size
        plain = not (self.training and self.dropout > 0.0) and not autocasts(x.device.type)
        if not whole or not plain or any(parameter.dtype != x.dtype for parameter in self.parameters()):
            return self._by_parts(x, state, keep_state)
        attn_norm = (self.attn_norm.weight, self.attn_norm.bias, self.attn_norm.eps)
        weights, tail = self._chain_weights(), x.shape[1] - head - whole
        # Where nothing is split off nothing is joined: in backward that would be a copy of all of dx.
        first, middle, last = x.split([head, whole, tail], dim=1) if head or tail else (None, x, None)
        pieces = []
        if head:
            y, state = self._by_parts(first, state, True)
            pieces.append(y)
        y, s = whole_chunks(middle, state.s, attn_norm, weights, self.chunk_size, self._training_graphs)
        pieces.append(y)
        state = self._fresh(s) if tail or keep_state else None
        if tail:
            y, state = self._by_parts(last, state, keep_state)
            pieces.append(y)
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else y, state if keep_state else None

    def _by_parts(self, x: Tensor, state: BLADEState, keep_state: bool) -> tuple[Tensor, BLADEState | None]:
        """The chain as autograd can follow it. With dropout y is random, and the whole of it stays on the chain."""
        drops = self.training and self.dropout > 0.0
        sizes = self._sizes(x.shape[1], state.kv.shape[1])
        projected = self.qkv_proj(self.attn_norm(x))
        # split, not slices: the gradient of a slice is as long as the whole sequence.
        pieces = list(zip(x.split(sizes, dim=1), projected.split(sizes, dim=1), strict=True))
        global_kv = self._chain_weights().global_kv()
        rows, wide = [], []
        for index, (x_piece, qkv) in enumerate(pieces):
            residual, kv = self._attend(x_piece, qkv, state, global_kv)
            hidden = F.gelu(self.ffn_up(self.ffn_norm(residual)))
            needed = keep_state or index + 1 < len(pieces)
            if drops:
                y = residual + F.dropout(self.ffn_down(hidden), self.dropout, True)
                rows.append(y)
                mean = y.mean(1, dtype=state.s.dtype)
            else:
                rows.append(residual)
                wide.append(hidden)
                if needed:
                    mean = residual.mean(1, dtype=state.s.dtype)
                    mean = mean + self.ffn_down(hidden.mean(1, dtype=state.s.dtype).to(hidden.dtype))
            state = self._advance(state, mean, kv, x_piece.shape[1]) if needed else None
        y = torch.cat(rows, dim=1)
        return (y if drops else y + self.ffn_down(torch.cat(wide, dim=1))), state

    def _attend(self, x: Tensor, qkv: Tensor, state: BLADEState, global_kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `[B, n, D]` and its projection -> (x + mixer `[B, n, D]`, keys and values of the chunk up to its end)."""
        inject = self.state_inject(state.start.to(self.state_inject.weight.dtype))
        added = F.linear(inject, self.qkv_proj.weight)[:, None]
        q, kv = qkv.split([self.d_model, self._kv_width], dim=-1)
        dq, dkv = added.split([self.d_model, self._kv_width], dim=-1)
        if state.kv.shape[1]:
            kv = torch.cat([state.kv.to(kv.dtype), kv], dim=1)
        seen = kv if global_kv is None else torch.cat([(global_kv - dkv).to(kv.dtype), kv], dim=1)
        k, v = seen.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        q = (q + dq).unflatten(-1, (self.n_heads, self.head_dim))
        attended = chunk_attention(q, k, v, self.dropout if self.training else 0.0)
        dv = dkv[..., self._kv_width // 2 :].unflatten(-1, (self.num_kv_heads, self.head_dim))
        attended = attended + dv.repeat_interleave(self.n_heads // self.num_kv_heads, dim=2)
        mixed = self.out_proj(attended.flatten(2))
        return x + F.dropout(mixed, self.dropout, self.training), kv

    # -- without ------------------------------------------------------------------------------------------------------

    def _infer(self, x: Tensor, state: BLADEState, keep_state: bool) -> tuple[Tensor, BLADEState | None]:
        """Slab by slab: products over the whole slab before and after the chain, in buffers that are reused."""
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        weights = self._chain_weights()
        slabs = list(self._slabs(x, state.kv.shape[1]))
        graphs = None
        if x.is_cuda and any(whole for *_, whole in slabs):
            graphs = self._graphs.prepare(weights)
        in_buffers = [count * size for _, count, size, whole in slabs if graphs is None or not whole]
        rows, width = max(in_buffers, default=0) * x.shape[0], self.d_model
        buffers = tuple(x.new_empty(rows, n) for n in (width, width + self._kv_width, 4 * width))

        def by_chunks(start: int, count: int, size: int) -> tuple[Tensor, Tensor]:
            # Chunk-major, `[count, B, n, D]`: each chunk of the batch is then one matrix.
            span = slice(start, start + count * size)
            return tuple(t[:, span].unflatten(1, (count, size)).transpose(0, 1) for t in (x, y))

        for in_graphs, group in itertools.groupby(slabs, lambda slab: slab[3] and graphs is not None):
            if in_graphs:
                pairs = [by_chunks(*place) for *place, _ in group]
                state = self._fresh(graphs.run(pairs, state.start, self._project))
                continue
            for start, count, size, whole in group:
                x_slab, y_slab = by_chunks(start, count, size)
                x_slab = x_slab.contiguous()
                residual, qkv, hidden = (buffer[: x_slab.numel() // width] for buffer in buffers)
                residual, qkv = (flat.view(*x_slab.shape[:-1], -1) for flat in (residual, qkv))
                hidden = hidden.view(count, -1, 4 * width)
                scratch = self._project(x_slab, qkv)
                needed = keep_state or start + count * size < x.shape[1]
                if whole:
                    s = chain(weights, x_slab, qkv, state.start, residual=residual, hidden=hidden, want_state=needed)
                    state = self._fresh(s)
                else:
                    state = self._part(weights, x_slab[0], qkv[0], state, residual[0], hidden[0], needed)
                self._contract(residual, hidden, scratch, out=y_slab)
        return y, state if keep_state else None

    def _project(self, x: Tensor, qkv: Tensor, scratch: Tensor | None = None) -> Tensor:
        """What comes before the chain, for a slab: x `[count, B, n, D]` -> qkv. Returns a buffer of the shape of x."""
        normed = normalize(x, self.attn_norm.weight, self.attn_norm.bias, self.attn_norm.eps, out=scratch)
        torch.mm(normed.view(-1, self.d_model), self.qkv_proj.weight.t(), out=qkv.view(-1, qkv.shape[-1]))
        return normed

    def _contract(self, residual: Tensor, hidden: Tensor, scratch: Tensor, *, out: Tensor) -> None:
        """What comes after it: out = residual + ffn_down(hidden)."""
        flat = scratch.view(-1, self.d_model)
        torch.addmm(self.ffn_down.bias, hidden.flatten(0, 1), self.ffn_down.weight.t(), out=flat)
        torch.add(residual, scratch, out=out)

    def _part(
        self,
        weights: ChainWeights,
        x: Tensor,
        qkv: Tensor,
        state: BLADEState,
        residual: Tensor,
        hidden: Tensor,
        needed: bool,
    ) -> BLADEState | None:
        """Part of a chunk: x `[B, n, D]` and its projection -> the state after it, None if it is not needed."""
        q, kv = qkv.split([self.d_model, self._kv_width], dim=-1)
        filled = state.kv.shape[1]
        room = min(self.chunk_size, max(2 * (filled + x.shape[1]), 64))
        kv, tape = append(state.tape, filled, state.kv, kv, room)
        parts = (weights, weights.global_kv(), x, q, kv, state.start)
        mean = chain_chunk(*parts, residual=residual, hidden=hidden, want_mean=needed)
        return None if mean is None else self._advance(state, mean, kv, x.shape[1], tape)

    def _chain_weights(self) -> ChainWeights:
        def both(linear: nn.Linear) -> tuple[Tensor, Tensor]:
            return linear.weight, linear.bias

        return ChainWeights(
            n_heads=self.n_heads,
            num_kv_heads=self.num_kv_heads,
            inject=both(self.state_inject),
            qkv=self.qkv_proj.weight,
            out=both(self.out_proj),
            norm=(self.ffn_norm.weight, self.ffn_norm.bias, self.ffn_norm.eps),
            up=both(self.ffn_up),
            down=both(self.ffn_down),
            state=both(self.state_proj),
            global_tokens=self.global_tokens if self.num_global_tokens else None,
        )

    # -- both ---------------------------------------------------------------------------------------------------------

    def _advance(
        self, state: BLADEState, mean: Tensor, kv: Tensor, tokens: int, tape: Tape | None = None
    ) -> BLADEState:
        """The state after `tokens` more tokens of a chunk, whose y have the given mean `[B, D]`."""
        filled = state.kv.shape[1] + tokens
        total = state.total + mean * tokens if state.kv.shape[1] else mean * tokens
        s = self.project_state(total / filled)
        if filled == self.chunk_size:
            return self._fresh(s)
        return BLADEState(s=s, start=state.start, total=total, kv=kv, tape=tape)

    def project_state(self, mean: Tensor) -> Tensor:
        """s `[B, N]` of the mean of y over a chunk's tokens `[B, D]`, in the dtype of that mean."""
        return self.state_proj(mean.to(self.state_proj.weight.dtype)).to(mean.dtype)

    def _fresh(self, s: Tensor) -> BLADEState:
        """The state at the start of a chunk."""
        weight = self.qkv_proj.weight
        total = torch.zeros(s.shape[0], self.d_model, device=s.device, dtype=s.dtype)
        return BLADEState(s=s, start=s, total=total, kv=weight.new_empty(s.shape[0], 0, self._kv_width))

    def _sizes(self, length: int, filled: int) -> list[int]:
        """Tokens of each chunk, or part of one, in a call of `length` tokens after `filled` ones of a chunk."""
        head = min(self.chunk_size - filled, length) if filled else 0
        whole, tail = (length - head) // self.chunk_size, (length - head) % self.chunk_size
        return [size for size in (head, *[self.chunk_size] * whole, tail) if size]

    def _slabs(self, x: Tensor, filled: int) -> Iterator[tuple[int, int, int, bool]]:
        """(start, count, n, whole): whole chunks, `count` of n tokens, or one part of a chunk; none above a slab."""
        on_cpu = x.device.type == "cpu"
        slab = (_shell.CPU_SLAB_TOKENS if on_cpu else GPU_CHAIN_TOKENS) // x.shape[0]
        # The kernels count the numbers of a chunk's hidden rows in 32 bits.
        part = slab if on_cpu else min(_shell.GPU_SLAB_TOKENS // x.shape[0], (2**31 - 1) // (4 * self.d_model))
        part = max(LEAST_PART, part)
        start, length = 0, x.shape[1]
        while start < length:
            left = self.chunk_size - filled
            if filled or left > min(part, length - start):
                size = min(left, part, length - start)
                yield start, 1, size, False
                start, filled = start + size, (filled + size) % self.chunk_size
            else:
                most = min(max(1, slab // self.chunk_size), (length - start) // self.chunk_size)
                # Powers of two: few graphs then serve every length.
                count = 1 << (most.bit_length() - 1)
                yield start, count, self.chunk_size, True
                start += count * self.chunk_size

    @property
    def _kv_width(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


SPEC = BlockSpec(label="BLADE", build=BLADEBlock, reference=reference, cost=cost)
