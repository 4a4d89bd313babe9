"""Training from the input alone: forward keeps x and the states between slabs, backward runs each slab once more.

A block is a function of (slab, state) -> (slab, state), and gradients flow through the state. So the sequence is taken
from left to right without a graph, and from right to left with the graph of one slab at a time: the same gradients as
in one piece, in the memory of one slab (Chen et al. 2016, arXiv 1604.06174, along the sequence instead of the depth).

Letters: B batch, T sequence length, t tokens of a slab, D d_model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longctx.blocks._states import tensors_of, with_tensors
from longctx.ops.operators import first_order
from longctx.ops.precision import autocasts, wide_dtype

if TYPE_CHECKING:
    from longctx.blocks._shell import PreNormBlock

# Tokens of a slab: an eighth of the sequence, within these bounds.
CPU_LEAST, CPU_MOST = 1024, 4096
GPU_LEAST, GPU_MOST = 8192, 65536


@torch.compiler.disable
def recomputed(block: PreNormBlock, x: Tensor, state: Any, keep_state: bool) -> tuple[Tensor, Any]:
    """`block._differentiable(x, state, keep_state)`, in slabs if the block can, x `[B, T, D]`."""
    call = _Call(block, x, state, keep_state)
    y, *tensors = _Recomputed.apply(call, x, *tensors_of(state), *call.parameters)
    return y, with_tensors(call.last, tensors) if keep_state else None


class _Call:
    """One call: how its sequence is cut, and what backward needs besides x."""

    def __init__(self, block: PreNormBlock, x: Tensor, state: Any, keep_state: bool) -> None:
        self.block, self.keep_state, self.device = block, keep_state, x.device
        # As they are in this call: backward may find others in their place (torch.func.functional_call), or the block
        # in another mode.
        self.named, self.training = dict(block.named_parameters()), block.training
        self.parameters = [parameter for parameter in self.named.values() if parameter.requires_grad]
        self.slabs = list(_slabs(block, x))
        self.starts: list[Any] = [None if state is None else state.detach()]
        self.last: Any = None
        self.random: list[tuple[Tensor, Tensor | None]] = []
        self.draws = self.training and block.dropout > 0.0
        kind = "cpu" if x.is_meta else x.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), autocasts(kind))

    def run(self, index: int, x: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Any]:
        """Slab number `index`, x `[B, t, D]`, with the graph of it, from its starting state with these tensors."""
        start = self.starts[index]
        # A copy, since a block may write into the state that it is given.
        state = None if start is None else with_tensors(start, tensors)
        kind, dtype, enabled = self.autocast
        # A cast that was cached would belong to the graph of another slab.
        cast = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
        with torch.enable_grad(), cast:
            return self._differentiable(x, state, self.keep_state or index + 1 < len(self.slabs))

    def _differentiable(self, *arguments: Any) -> tuple[Tensor, Any]:
        """`block._differentiable` with the parameters and in the mode of the call."""
        block, mode = self.block, self.block.training
        block.training = self.training
        try:
            if all(p is self.named.get(name) for name, p in block.named_parameters()):
                return block._differentiable(*arguments)
            named = {f"block.{name}": parameter for name, parameter in self.named.items()}
            return torch.func.functional_call(_Differentiable(block), named, arguments)
        finally:
            block.training = mode

    def remember_random(self) -> None:
        if self.draws:
            on_gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            self.random.append((torch.get_rng_state(), on_gpu))

    @contextlib.contextmanager
    def same_random(self, index: int) -> Iterator[None]:
        """Inside it dropout draws what it drew in forward."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus, enabled=self.draws):
            if self.draws:
                on_cpu, on_gpu = self.random[index]
                torch.set_rng_state(on_cpu)
                if on_gpu is not None:
                    torch.cuda.set_rng_state(on_gpu, self.device)
            yield


class _Differentiable(nn.Module):
    """The function of a block that autograd follows, as a module's forward."""

    def __init__(self, block: PreNormBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> tuple[Tensor, Any]:
        return self.block._differentiable(*arguments)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y: Tensor | None = None
        state = None
        for index, slab in enumerate(call.slabs):
            call.remember_random()
            part, state = call.run(index, x[:, slab].detach(), tensors_of(call.starts[index]))
            # As an autocast block may give another format than it was given.
            y = part.new_empty(*x.shape[:2], part.shape[2]) if y is None else y
            y[:, slab] = part.detach()
            del part
            state = None if state is None else state.detach()
            if index + 1 < len(call.slabs):
                call.starts.append(state)
        call.last = state
        ctx.call, ctx.states = call, len(tensors) - len(call.parameters)
        # The parameters too, as autograd then refuses those that were changed in place.
        ctx.save_for_backward(x, *call.named.values())
        ctx.set_materialize_grads(False)
        # Copies: what autograd gives out must not be what the caller may write into later.
        return y, *(tensor.clone() for tensor in tensors_of(state))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *later: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, *_ = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        sums: list[Tensor | None] = [None] * len(call.parameters)
        behind: list[Tensor | None] = list(later)
        for index in reversed(range(len(call.slabs))):
            slab = call.slabs[index]
            part = x[:, slab].detach().requires_grad_(dx is not None)
            leaves = [tensor.detach().requires_grad_() for tensor in tensors_of(call.starts[index])]
            with call.same_random(index):
                y, state = call.run(index, part, leaves)
            with torch.enable_grad():
                outputs = [y, *tensors_of(state)]
            above = [None if grad is None else grad[:, slab], *behind]
            wanted = [(o, g) for o, g in zip(outputs, above, strict=True) if g is not None and o.requires_grad]
            inputs = [*([part] if dx is not None else []), *leaves, *call.parameters]
            if wanted and inputs:
                sources, grads = zip(*wanted, strict=True)
                found = list(torch.autograd.grad(sources, inputs, grads, allow_unused=True))
                del sources, grads
            else:
                found = [None] * len(inputs)
            del y, state, outputs, wanted
            if dx is not None:
                first = found.pop(0)
                dx[:, slab] = 0 if first is None else first
            behind = found[: len(leaves)]
            for place, one in enumerate(found[len(leaves) :]):
                if one is not None:
                    sums[place] = _added(sums[place], one)
        found = [None if s is None else s.to(p.dtype) for s, p in zip(sums, call.parameters, strict=True)]
        # With no state given the first slab began with none, and there is nothing to hand on.
        return None, dx, *(behind if ctx.states else []), *found


def _added(total: Tensor | None, one: Tensor) -> Tensor:
    """The sum over slabs, in fp32 at least: half precision would lose what a late slab adds."""
    one = one.to(wide_dtype(one.dtype))
    return one if total is None else total + one


def _slabs(block: PreNormBlock, x: Tensor) -> Iterator[slice]:
    batch, length = x.shape[:2]
    step = length
    if block.restarts and block.causal:
        least, most = (CPU_LEAST, CPU_MOST) if x.device.type == "cpu" else (GPU_LEAST, GPU_MOST)
        step = max(1, max(least, min(most, batch * length // 8)) // batch)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
