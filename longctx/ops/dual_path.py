"""DPASSM's mixer as one function with one gradient: window attention, the recurrence and the gate between them.

One product makes queries, keys, values, gate and what enters the recurrence; in backward the gradients of all five are
written side by side, so that two products make those of u and of all the weights. That takes a third of the launches
that the parts take one by one, and no pass over memory to add up the gradients of u. Of all its products the cheapest
to make again, out_proj's, does not wait for backward.

Letters: B batch, T tokens, D width, H heads, G key-value heads, K head width, N states, n keys carried on,
E = 2D + 2GK + N columns of the one product: queries, keys, values, gate, what enters the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops import diagonal_scan_kernel as scan
from longctx.ops import gated_mix_kernel as gate_kernel
from longctx.ops import window_attention_kernel as window_kernel
from longctx.ops.operators import differentiable
from longctx.ops.projections import project_into
from longctx.ops.weight_gradient import in_formats_of
from longctx.ops.window_attention_gradients import run_backward


def fits(u: Tensor, weights: tuple[Tensor, ...], heads: int, kv: Tensor | None) -> bool:
    """Whether the function takes u `[B, T, D]`: half precision, and a shape for all of its kernels."""
    qkv, _, _, enter, _, decay, leave, *_ = weights
    width, states = u.shape[-1], enter.shape[0]
    return (
        u.dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == u.dtype for t in weights)
        and (kv is None or kv.dtype == u.dtype)
        and gate_kernel.fits(u, leave)
        and scan.fits(u, decay)
        and states <= gate_kernel.MOST_STATES
        and states % 8 == qkv.shape[0] % 8 == width % 8 == 0
        and window_kernel.fits(*(u.unflatten(-1, (heads, -1)),) * 3)
        and (qkv.shape[0] + width + states) < window_kernel.MOST_STRIDE
    )


def dual_path(
    u: Tensor,
    weights: tuple[Tensor, ...],
    heads: int,
    window: int,
    *,
    kv: Tensor | None = None,
    s: Tensor | None = None,
    dropout_p: float = 0.0,
    carry: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """u `[B, T, D]` -> (mixed `[B, T, D]`, s after the last token `[B, N]` in fp32, the last keys and values).

    weights: qkv `[D + 2GK, D]`; gate `[D, D]`, its bias; ssm_in `[N, D]`, its bias; the decay before tanh `[N]`;
    ssm_out `[D, N]`; out_proj `[D, D]`, its bias. kv `[B, n, 2GK]`: keys and values carried on, n below the window,
    none if None. s `[B, N]`: the state, zeros if None. dropout_p: of the attention weights, drawn from torch's
    generator of the device. carry: whether to return keys and values of the last window - 1 tokens, or of none.
    """
    seed = torch.randint(1 << 62, (1,), device=u.device) if dropout_p else None
    return _dual_path(u, kv, s, *weights, heads, window, dropout_p, seed, carry)[:3]


def _attention_parts(rows: Tensor, halo: int, width: int, keys: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q `[B, T, H, K]`, k and v `[B, n + T, G, K]` of rows `[B, n + T, E]`."""
    head = width // heads
    q, kv = rows[:, halo:, :width] if halo else rows[..., :width], rows[..., width : width + keys]
    k, v = kv.unflatten(-1, (2, keys // (2 * head), head)).unbind(2)
    return q.unflatten(-1, (heads, head)), k, v


def _forward(
    u: Tensor,
    kv: Tensor | None,
    s: Tensor | None,
    qkv: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    enter: Tensor,
    enter_bias: Tensor,
    decay: Tensor,
    leave: Tensor,
    out: Tensor,
    out_bias: Tensor,
    heads: int,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
    carry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mixed, s_end, last keys and values, and for backward: the joined weight, rows, states, and of attention the
    output and log-sum-exp)."""
    batch, tokens, width = u.shape
    keys, halo = qkv.shape[0] - width, 0 if kv is None else kv.shape[1]
    weight = torch.cat([qkv, gate, enter])
    rows = u.new_empty(batch, halo + tokens, weight.shape[0])
    if halo:
        # All of them, as an operator's outputs are compared in tests.
        rows[:, :halo] = F.pad(kv, (width, rows.shape[2] - width - keys))
    present = rows[:, halo:] if halo else rows
    project_into(u, weight, out=present)
    _, gates, entering = present.split([width + keys, width, enter.shape[0]], dim=-1)
    states, s_end = scan.scan_kernel(entering, decay, s, dtype=u.dtype, bias=enter_bias, tanh=True)
    parts = _attention_parts(rows, halo, width, keys, heads)
    attended, sums = window_kernel.run_forward(*parts, None, None, window - 1, 0, dropout_p, seed)
    mixed = F.linear(attended.view(batch, tokens, width), out, out_bias)
    gate_kernel.project_and_mix(mixed, gates, gate_bias, states, leave, out=mixed)
    first = max(0, halo + tokens - window + 1) if carry else halo + tokens
    last = rows[:, first:, width : width + keys].clone(memory_format=torch.contiguous_format)
    return mixed, s_end, last, weight, rows, states, attended, sums


def _backward(
    grad: Tensor,
    for_s: Tensor | None,
    for_last: Tensor | None,
    u: Tensor,
    s: Tensor | None,
    gate_bias: Tensor,
    decay: Tensor,
    leave: Tensor,
    out: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    rows: Tensor,
    states: Tensor,
    attended: Tensor,
    sums: Tensor,
    heads: int,
    window: int,
    dropout_p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, of the keys carried on (empty if there are none), of s (likewise), of the joined weight, and of
    the biases of gate, ssm_in; of decay, ssm_out, out_proj and its bias."""
    batch, tokens, width = u.shape
    halo, count = rows.shape[1] - tokens, leave.shape[1]
    keys = rows.shape[2] - 2 * width - count
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    target = torch.empty_like(rows)
    present, now = (rows[:, halo:], target[:, halo:]) if halo else (rows, target)
    attention, gates = width + keys, slice(width + keys, 2 * width + keys)
    for_projected = F.linear(attended.view(batch, tokens, width), out, out_bias)
    for_recurrent, totals = gate_kernel.project_and_mix_backward(
        grad, for_projected, present[..., gates], gate_bias, states, leave, for_gate=now[..., gates]
    )

    # The recurrence.
    flat_recurrent = for_recurrent.view(-1, width)
    for_states = torch.mm(flat_recurrent, leave).view(batch, tokens, count)
    for_leave = torch.mm(flat_recurrent.t(), states.view(-1, count))
    entering = now[..., attention + width :]
    _, for_decay, first = scan.backward_kernel(
        for_states, for_s, decay, s, states, dtype=u.dtype, tanh=True, out=entering
    )
    del for_recurrent, flat_recurrent, for_states
    a = torch.tanh(decay.float())
    for_decay = torch.addcmul(for_decay, for_decay * a, a, value=-1.0)

    # Attention.
    flat_projected = for_projected.view(-1, width)
    for_attended = torch.mm(flat_projected, out).view_as(attended)
    for_out = torch.mm(flat_projected.t(), attended.view(-1, width))
    del for_projected, flat_projected
    of = _attention_parts(rows, halo, width, keys, heads)
    grads = list(_attention_parts(target, halo, width, keys, heads))
    run_backward(for_attended, attended, sums, *of, None, None, window - 1, 0, dropout_p, seed, grads=grads)
    del for_attended
    if for_last is not None and for_last.shape[1]:
        target[:, -for_last.shape[1] :, width:attention] += for_last

    # What all of them share: u and the one product.
    flat = now.reshape(-1, weight.shape[0])
    for_u = torch.mm(flat, weight).view(batch, tokens, width)
    for_weight = torch.mm(flat.t(), u.reshape(-1, width))
    for_out_bias, for_gate_bias = totals.unbind()
    biases = (for_gate_bias, entering.sum((0, 1), dtype=torch.float32), for_decay, for_out_bias)
    for_gate_bias, for_enter_bias, for_decay, for_out_bias = in_formats_of((gate_bias, decay, decay, gate_bias), biases)
    # Copies, since an operator's outputs may not share memory.
    for_kv = target[:, :halo, width:attention].contiguous() if halo else u.new_empty(0)
    for_state = first * a if s is not None else u.new_empty(0)
    return [
        for_u, for_kv, for_state, for_weight, for_gate_bias, for_enter_bias, for_decay, for_leave, for_out,
        for_out_bias,
    ]  # fmt: skip


def _shapes(u, kv, s, qkv, gate, gate_bias, enter, enter_bias, decay, leave, out, out_bias, heads, window, *rest):
    batch, tokens, width = u.shape
    keys, count, carry = qkv.shape[0] - width, enter.shape[0], rest[-1]
    whole = tokens + (0 if kv is None else kv.shape[1])
    columns = qkv.shape[0] + width + count
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(batch, count, dtype=torch.float32),
        u.new_empty(batch, min(whole, window - 1) if carry else 0, keys),
        u.new_empty(columns, width),
        u.new_empty(batch, whole, columns),
        u.new_empty(batch, tokens, count),
        u.new_empty(batch, tokens, heads, width // heads),
        u.new_empty(batch, heads, window_kernel.line_of(tokens), dtype=torch.float32),
    )


def _backward_shapes(grad, for_s, for_last, u, s, gate_bias, decay, leave, out, out_bias, weight, rows, *rest):
    batch, tokens, width = u.shape
    halo, count = rows.shape[1] - tokens, leave.shape[1]
    return [
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(batch, halo, weight.shape[0] - 2 * width - count) if halo else u.new_empty(0),
        u.new_empty(0) if s is None else s.new_empty(s.shape),
        torch.empty_like(weight),
        *(torch.empty_like(t) for t in (gate_bias, decay, decay, leave, out, gate_bias)),
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, kv, s, qkv, gate, gate_bias, enter, _, decay, leave, out, out_bias, *ctx.numbers, seed, _ = inputs
    ctx.carried, ctx.parts = kv is not None, [t.shape[0] for t in (qkv, gate, enter)]
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, s, gate_bias, decay, leave, out, out_bias, *output[3:], seed)


def _gradients(
    run: Callable[..., list[Tensor]],
    ctx: Any,
    grad: Tensor | None,
    for_s: Tensor | None,
    for_last: Tensor | None,
    *unused: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    u, s = tensors[:2]
    if grad is None:
        grad = torch.zeros_like(u)
    found = run(grad, for_s, for_last, *tensors, *ctx.numbers, seed)
    for_u, for_kv, for_state, for_weight, for_gate_bias, for_enter_bias, *rest = found
    qkv, gate, enter = for_weight.split(ctx.parts)
    for_kv, for_state = for_kv if ctx.carried else None, None if s is None else for_state
    return for_u, for_kv, for_state, qkv, gate, for_gate_bias, enter, for_enter_bias, *rest, *(None,) * 5


_dual_path = differentiable(
    "dual_path",
    _forward,
    _backward,
    shapes=_shapes,
    backward_shapes=_backward_shapes,
    keep=_keep,
    gradients=_gradients,
)
