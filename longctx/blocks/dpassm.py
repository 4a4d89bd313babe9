"""DPASSM: a dual path of windowed attention and a diagonal state-space model, mixed by a learned gate.

With u = attn_norm(x) and W the window:

    a_t = out_proj(causal attention of token t over the last W tokens, itself included)
    s_t = tanh(ssm_decay) * s_{t-1} + ssm_in(u_t)
    g_t = sigmoid(gate_proj(u_t));  mixer = g_t * a_t + (1 - g_t) * ssm_out(s_t)

Letters: B batch, T sequence length, t tokens of one call, D d_model, H n_heads, G num_kv_heads, K head width,
W window_size, N state_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.blocks._shell import PreNormBlock, check_batch, check_counts
from longctx.blocks._spec import ELEMENT_BYTES, BlockSpec, Cost, shell_cost
from longctx.blocks._states import Tape, append
from longctx.config import Cell
from longctx.errors import UsageError
from longctx.ops.decode import Decoder, Live, Stream, decode_path, step_key, step_weights
from longctx.ops.diagonal_scan import diagonal_scan, diagonal_scan_path
from longctx.ops.gated_mix import gated_mix
from longctx.ops.precision import autocasts, wide_dtype
from longctx.ops.projections import joined, lay_together, project_into
from longctx.ops.window_attention import packed_window_attention, window_attention, window_attention_path

try:
    from longctx.ops import dual_path as dual
    from longctx.ops import gated_mix_kernel as fused
    from longctx.ops.diagonal_scan_kernel import scan_kernel
except ImportError:  # a torch without Triton
    dual = fused = None


@dataclass(kw_only=True, eq=False)
class DPASSMState:
    """What a stream carries on.

    s: the recurrent state `[B, N]`, in fp32, or fp64 in an fp64 block.
    kv: keys and values of the last W - 1 tokens, or of all if there were fewer, oldest first, `[B, n, 2GK]`.
    tape, end: the tape that kv lies on and where on it kv ends, if it does.
    """

    s: Tensor
    kv: Tensor
    tape: Tape | None = None
    end: int = 0

    def detach(self) -> DPASSMState:
        """The same state, cut off from the graph of what came before."""
        # A copy: in training the keys are rows of a larger tensor, which would be kept alive.
        return DPASSMState(s=self.s.detach(), kv=self.kv.detach().clone())


@dataclass(kw_only=True, eq=False)
class DPASSMStream(Stream):
    """What a stream carries on where steps are replays of a CUDA graph."""

    live: Live

    @property
    def s(self) -> Tensor:
        return self.live.s()

    @property
    def kv(self) -> Tensor:
        return self.live.recent()

    def detach(self) -> DPASSMState:
        return DPASSMState(s=self.s, kv=self.kv)


class DPASSMBlock(PreNormBlock):
    """Windowed attention and a diagonal recurrence side by side, under one gate.

    window_size: tokens that the attention sees, the present one included. state_dim: channels of the
    recurrence. Parameters besides the shared: ssm_in (D -> N, bias), ssm_decay `[N]` (before tanh), ssm_out
    (N -> D, no bias), gate_proj (D -> D, bias).
    """

    # Its two paths and their gate keep a row more than other mixers.
    ffn_slabs = 4

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        num_kv_heads: int | None = None,
        window_size: int = 256,
        state_dim: int = 64,
        dropout: float = 0.0,
        recompute: str = "norms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(window_size=window_size, state_dim=state_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = {"d_model": d_model, "n_heads": n_heads, "num_kv_heads": num_kv_heads}
        super().__init__(**shape, dropout=dropout, recompute=recompute, **factory)
        self.window_size, self.state_dim = window_size, state_dim
        self.ssm_in = nn.Linear(d_model, state_dim, **factory)
        self.ssm_decay = nn.Parameter(nn.init.uniform_(torch.empty(state_dim, **factory), -0.1, 0.1))
        self.ssm_out = nn.Linear(state_dim, d_model, bias=False, **factory)
        self.gate_proj = nn.Linear(d_model, d_model, **factory)
        self._decoder = Decoder(window_size, 1, 0)
        lay_together(*self._entering)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DPASSMBlock:
        before = [None if weight is None else weight.data for weight in self._entering]
        super()._apply(fn, recurse)
        # A move or a conversion gives each a memory of its own. What stays where it was may be there for others.
        if all(map(_moved, before, self._entering)):
            lay_together(*self._entering)
        return self

    @property
    def _entering(self) -> list[nn.Parameter | None]:
        """The weights of what is read from the norm, which one product does in inference; None where another module,
        a parametrization or a wrapper has them."""
        layers = (self.qkv_proj, self.gate_proj, self.ssm_in)
        return [layer._parameters.get("weight") for layer in layers]

    def init_state(self, batch_size: int, s: Tensor | None = None) -> DPASSMState:
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
        s = s.to(device=weight.device, dtype=dtype)
        return DPASSMState(s=s, kv=weight.new_zeros(batch_size, 0, self._kv_width))

    def step(self, x_t: Tensor, state: DPASSMState | DPASSMStream) -> tuple[Tensor, DPASSMState | DPASSMStream]:
        self.check_step(x_t)
        key = step_key(self, x_t)
        if key is not None:
            if not (isinstance(state, DPASSMStream) and state.live.key == key):
                state = self._enter(key, x_t, state)
            if isinstance(state, DPASSMStream):
                return state.live.run(x_t), state
        return self.forward(x_t, state)

    def _enter(self, key: Hashable, x_t: Tensor, state: DPASSMState | DPASSMStream) -> DPASSMState | DPASSMStream:
        """The state as one that graphs step, if they can."""
        if isinstance(state, DPASSMStream):
            state = state.detach()
        if x_t.shape != (state.s.shape[0], 1, self.d_model):
            return state  # which `forward` then refuses
        gate, enter = ((linear.weight, linear.bias) for linear in (self.gate_proj, self.ssm_in))
        weights = step_weights(self, recurrence=(gate, enter, self.ssm_decay, self.ssm_out.weight))
        live = self._decoder.enter(key, weights, kv=state.kv, s=state.s)
        return state if live is None else DPASSMStream(live=live)

    def mix(self, u: Tensor, state: DPASSMState | None, keep_state: bool) -> tuple[Tensor, DPASSMState | None]:
        batch = u.shape[0]
        if isinstance(state, DPASSMStream):
            state = state.detach()
        if state is not None:
            check_batch(state.s.shape[0], batch)
        grads = torch.is_grad_enabled() or autocasts(u.device.type)
        if not grads and self._fuses(u, state):
            return self._mix_fused(u, state, keep_state)
        if grads and dual is not None and not autocasts(u.device.type):
            kv, s = (None, None) if state is None else (state.kv if state.kv.shape[1] else None, state.s)
            weights = self._mixer_weights
            if dual.fits(u, weights, self.n_heads, kv):
                how = {"kv": kv, "s": s, "dropout_p": self.dropout if self.training else 0.0, "carry": keep_state}
                mixed, s, kv = dual.dual_path(u, weights, self.n_heads, self.window_size, **how)
                return mixed, DPASSMState(s=s, kv=kv) if keep_state else None
        if state is None:
            state = self.init_state(batch)
        decay = torch.tanh(self.ssm_decay.to(wide_dtype(self.ssm_decay.dtype)))
        s, s_end = diagonal_scan(self.ssm_in(u), decay, state.s, dtype=self.ssm_out.weight.dtype)
        recurrent = self.ssm_out(s)
        if grads:
            attended, state = self._attend(u, state, s_end, keep_state)
            return gated_mix(self.out_proj(attended), recurrent, self.gate_proj(u)), state
        attended, state = self._attend_in_place(u, state, s_end, keep_state)
        gate = self.gate_proj(u).sigmoid_()
        return torch.lerp(recurrent, self.out_proj(attended), gate, out=gate), state

    @property
    def _mixer_weights(self) -> tuple[Tensor, ...]:
        """What `dual_path` takes."""
        gate, enter, out = self.gate_proj, self.ssm_in, self.out_proj
        pairs = (gate.weight, gate.bias, enter.weight, enter.bias)
        return self.qkv_proj.weight, *pairs, self.ssm_decay, self.ssm_out.weight, out.weight, out.bias

    def _fuses(self, u: Tensor, state: DPASSMState | None) -> bool:
        """Whether kernels that read all projections out of one product do this slab: not for a few tokens behind
        keys that would have to be moved."""
        return (
            fused is not None
            and fused.fits(u, self.ssm_out.weight)
            and not torch.compiler.is_compiling()
            and self.state_dim <= fused.MOST_STATES
            and self.state_dim % 8 == self._kv_width % 8 == self.d_model % 8 == 0
            and (state is None or u.shape[1] >= self.window_size or not state.kv.shape[1])
        )

    def _mix_fused(self, u: Tensor, state: DPASSMState | None, keep_state: bool) -> tuple[Tensor, DPASSMState | None]:
        """The same without autograd. One product makes queries, keys, values, gate and what enters the recurrence,
        behind the keys carried on; biases, sigmoid, tanh and the narrow ssm_out ride on the kernels that follow."""
        batch, tokens, width = u.shape
        halo, start = (0, None) if state is None else (state.kv.shape[1], state.s)
        weight = joined(self.qkv_proj.weight, self.gate_proj.weight, self.ssm_in.weight)
        parts = [width, self._kv_width, width, self.state_dim]
        rows = u.new_empty(batch, halo + tokens, weight.shape[0])
        project_into(u, weight, out=rows[:, halo:])
        q, _, gate, entering = rows[:, halo:].split(parts, dim=-1)
        kv = rows[..., width : width + self._kv_width]
        if halo:
            kv[:, :halo] = state.kv
        s, s_end = scan_kernel(entering, self.ssm_decay, start, dtype=u.dtype, bias=self.ssm_in.bias, tanh=True)
        attended = self.out_proj(self._window(q, kv))
        fused.project_and_mix(attended, gate, self.gate_proj.bias, s, self.ssm_out.weight, out=attended)
        return attended, DPASSMState(s=s_end, kv=self._last(kv).clone()) if keep_state else None

    def _attend(
        self, u: Tensor, state: DPASSMState, s_end: Tensor, keep_state: bool
    ) -> tuple[Tensor, DPASSMState | None]:
        """Attention as autograd can follow it: u `[B, t, D]` -> (attended `[B, t, D]`, state)."""
        qkv = self.qkv_proj(u)
        if not state.kv.shape[1] and not keep_state:
            qkv = qkv.unflatten(-1, (-1, self.head_dim))
            how = {"window": self.window_size, "dropout_p": self.dropout if self.training else 0.0}
            return packed_window_attention(qkv, n_heads=self.n_heads, **how).flatten(2), None
        q, kv = qkv.split([self.d_model, self._kv_width], dim=-1)
        if state.kv.shape[1]:
            kv = torch.cat([state.kv.to(kv.dtype), kv], dim=1)
        attended = self._window(q, kv)
        kept = DPASSMState(s=s_end, kv=self._last(kv)) if keep_state else None
        return attended, kept

    def _attend_in_place(
        self, u: Tensor, state: DPASSMState, s_end: Tensor, keep_state: bool
    ) -> tuple[Tensor, DPASSMState | None]:
        """The same without autograd. A long slab's projection is written behind the keys carried on, a short
        one's keys onto the tape: neither moves more than W - 1 old rows, and a single token usually none."""
        tokens, halo = u.shape[1], state.kv.shape[1]
        if tokens < self.window_size:
            q, new = self.qkv_proj(u).split([self.d_model, self._kv_width], dim=-1)
            # Twice what there is, as the window may be longer than the stream will ever be.
            room = min(2 * self.window_size, max(2 * (halo + tokens), 64))
            kv, tape = append(state.tape, state.end, state.kv, new, halo + tokens + room)
            kept = DPASSMState(s=s_end, kv=self._last(kv), tape=tape, end=tape.used) if keep_state else None
            return self._window(q, kv), kept
        weight = self.qkv_proj.weight
        rows = u.new_empty(u.shape[0], halo + tokens, weight.shape[0])
        q, kv = rows[:, halo:, : self.d_model], rows[..., self.d_model :]
        kv[:, :halo] = state.kv
        project_into(u, weight, out=rows[:, halo:])
        kept = DPASSMState(s=s_end, kv=self._last(kv).clone()) if keep_state else None
        return self._window(q, kv), kept

    def _last(self, kv: Tensor) -> Tensor:
        return kv[:, max(0, kv.shape[1] - (self.window_size - 1)) :]

    def _window(self, q: Tensor, kv: Tensor) -> Tensor:
        """q `[B, t, D]`, keys and values `[B, n + t, 2GK]` -> attended `[B, t, D]`."""
        k, v = kv.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        dropout_p = self.dropout if self.training else 0.0
        return window_attention(q, k, v, window=self.window_size, dropout_p=dropout_p).flatten(2)

    @property
    def mixer_path(self) -> str:
        """Which implementations run on this block's device and dtype, in words."""
        weight = self.qkv_proj.weight
        attention = window_attention_path(weight.device, weight.dtype, self.head_dim)
        scan = diagonal_scan_path(weight.device, weight.dtype)
        gate = ", fused gate" if fused is not None and fused.fits(weight) else ""
        return f"{attention}, {scan}{gate}{decode_path(weight)}"

    @property
    def _kv_width(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


def _moved(old: Tensor | None, new: Tensor | None) -> bool:
    return old is not None and type(new) is nn.Parameter and new.data_ptr() != old.data_ptr()


def reference(block: DPASSMBlock, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, s `[B, N]` or None -> (y `[B, T, D]`, s): a dense mask and a loop over tokens."""
    batch, length, _ = x.shape
    heads, groups, width = block.n_heads, block.num_kv_heads, block.head_dim
    u = block.attn_norm(x)
    q, k, v = block.qkv_proj(u).split([heads * width, groups * width, groups * width], dim=-1)
    q = q.view(batch, length, heads, width).transpose(1, 2)
    k, v = (
        rows.view(batch, length, groups, width).transpose(1, 2).repeat_interleave(heads // groups, dim=1)
        for rows in (k, v)
    )
    behind = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
    seen = (behind >= 0) & (behind < block.window_size)
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~seen, float("-inf"))
    a = block.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))

    decay = torch.tanh(block.ssm_decay)
    inputs = block.ssm_in(u)
    s = x.new_zeros(batch, block.state_dim) if s is None else s
    states = []
    for t in range(length):
        s = decay * s + inputs[:, t]
        states.append(s)
    g = torch.sigmoid(block.gate_proj(u))
    x = x + g * a + (1 - g) * block.ssm_out(torch.stack(states, dim=1))
    return x + block.ffn_down(F.gelu(block.ffn_up(block.ffn_norm(x)))), s


def cost(cell: Cell, options: Mapping[str, Any]) -> Cost:
    """The shell, the pairs of a window that grows to W, two narrow matrices, a gate and a recurrence."""
    window, states, width = options["window_size"], options["state_dim"], cell.d_model
    visible = min(cell.length, window)
    decode = cell.mode == "decode"
    queries = 1 if decode else cell.length
    kv_row = 2 * (cell.num_kv_heads or cell.n_heads) * (width // cell.n_heads)
    kept = min(cell.length, window - 1)
    # s is kept in fp32 where keys and values are in half precision: counted in elements of the cell's dtype.
    s_elements = states * max(4, ELEMENT_BYTES[cell.dtype]) / ELEMENT_BYTES[cell.dtype]
    return shell_cost(
        cell,
        pairs=visible if decode else visible * cell.length - visible * (visible - 1) / 2,
        weight_elements=2 * width * states + width * width,
        other_flops=2.0 * states * queries,
        state_elements=kept * kv_row + s_elements,
        read_elements=(visible - 1) * kv_row + s_elements,
    )


SPEC = BlockSpec(label="DPASSM", build=DPASSMBlock, reference=reference, cost=cost)
