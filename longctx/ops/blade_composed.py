"""Products of BLADE's weights, made once a call: what the fused kernels of its chain read in place of small products.

Letters: D d_model, G num_kv_heads, K head width, N state_dim, E = D + 2GK.
"""

from __future__ import annotations

import torch

from longctx.ops.blade_chain import ChainWeights
from longctx.ops.launch import power_of_2


def fits(weights: ChainWeights) -> bool:
    """Whether the kernels can do a chain with these weights."""
    width = weights.qkv.shape[1]
    return (
        weights.qkv.is_cuda
        and weights.qkv.dtype in (torch.float16, torch.bfloat16)
        and weights.global_tokens is None
        and width % 64 == 0
        and width // weights.n_heads in (16, 32, 64, 128)
        and weights.inject[0].shape[1] <= 128
        and all(tensor.is_contiguous() for tensor in weights.tensors)
        and torch.cuda.get_device_capability(weights.qkv.device) >= (8, 0)
    )


class Composed:
    """Products of weights that the kernels read, in tensors of their own: `compose` puts the present values there.

    inject `[E, N + 1 or more]`: W_qkv [W_inject, b_inject]. values `[D, the same]`: its part of the values, for each
    query head. pass_on `[D, the same]`: W_out applied to that. up `[4D, D]`: W_up with the norm's gain. up_sum and
    up_shift `[4D]`, fp32: its row sums; W_up applied to the norm's bias, and b_up. state `[N, 4D]`: W_state W_down.
    constant `[N]`, fp32: W_state b_down + b_state. weights: what the kernels read as it is.
    """

    def __init__(self, weights: ChainWeights) -> None:
        qkv = weights.qkv
        rows, width = qkv.shape
        states = weights.inject[0].shape[1]
        # Of rows that are multiples of 16, 16 bytes are read at a time.
        columns = (states + 16) // 16 * 16
        self.weights = weights
        self.heads, self.groups, self.eps = weights.n_heads, weights.num_kv_heads, weights.norm[2]
        self.augmented = qkv.new_zeros(width, columns)
        self.inject = qkv.new_empty(rows, columns)
        self.values = qkv.new_empty(width, columns)
        self.pass_on = qkv.new_empty(width, columns)
        self.up = torch.empty_like(weights.up[0])
        self.up_sum, self.up_shift = (torch.empty_like(weights.up[1], dtype=torch.float32) for _ in range(2))
        self.state = qkv.new_empty(states, weights.down[0].shape[1])
        self.constant = qkv.new_empty(states, dtype=torch.float32)

    def compose(self) -> None:
        weights = self.weights
        states = weights.inject[0].shape[1]
        self.augmented[:, :states] = weights.inject[0]
        self.augmented[:, states] = weights.inject[1]
        torch.mm(weights.qkv, self.augmented, out=self.inject)
        width = weights.qkv.shape[1]
        values = self.inject[(width + weights.qkv.shape[0]) // 2 :]
        group = weights.n_heads // weights.num_kv_heads
        if group == 1:
            self.values.copy_(values)
        else:
            heads = values.view(weights.num_kv_heads, 1, -1, values.shape[1]).expand(-1, group, -1, -1)
            self.values.view(heads.shape).copy_(heads)
        torch.mm(weights.out[0], self.values, out=self.pass_on)
        torch.mul(weights.up[0], weights.norm[0], out=self.up)
        # Of the rounded product: the mean of a row then cancels exactly.
        torch.sum(self.up, 1, dtype=torch.float32, out=self.up_sum)
        self.up_shift.copy_(torch.addmv(weights.up[1], weights.up[0], weights.norm[1]))
        torch.mm(weights.state[0], weights.down[0], out=self.state)
        self.constant.copy_(torch.addmv(weights.state[1], weights.state[0], weights.down[1]))


def padded_states(states: int) -> int:
    """Channels of a state as the kernels hold it."""
    return max(16, power_of_2(states))
