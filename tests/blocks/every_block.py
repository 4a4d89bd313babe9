"""Every block there is in a small shape, and how far its tensors are from those of its reference."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from longctx import blocks

# Options are made small by name, so that short sequences span many windows, chunks and blocks.
SMALL = {"window_size": 16, "chunk_size": 16, "block_size": 8, "state_dim": 6}
# And again with those that are off or trivial by default.
OTHER = {**SMALL, "num_global_tokens": 3, "dilation": 2, "num_random_blocks": 1, "num_global_blocks": 1}

NAMES = blocks.names()
# Identity takes the option with the rest of the shell, but has nothing that could look ahead.
WITH_CAUSAL = [name for name in NAMES if name != "Identity" and "causal" in blocks.load(name).defaults]
every_block = pytest.mark.parametrize("name", NAMES)


def make(name: str, options=SMALL, *, d_model=32, n_heads=4, device=None, dtype=torch.float64, **more):
    """A block with weights that leave nothing neutral: no norm at one, no bias at zero."""
    defaults = blocks.load(name).defaults
    options = {key: value for key, value in options.items() if key in defaults}
    block = blocks.build(name, d_model=d_model, n_heads=n_heads, device=device, dtype=dtype, **{**options, **more})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def tokens(length: int, *, batch=2, d_model=32, device=None, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, d_model, device=device, dtype=dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def reference(block, x: torch.Tensor) -> torch.Tensor:
    """The reference of `block` in fp64, on the same weights."""
    with torch.no_grad():
        return blocks.load(type(block).__name__.removesuffix("Block")).reference(
            copy.deepcopy(block).double().eval(), x.double()
        )[0]


def gradients(block, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    wanted = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), wanted.values(), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


class MadeTensors(TorchDispatchMode):
    """Knows which of the memory that operations made is still there, also where only C++ holds on to it."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}
        self.makers: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.storages[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())
                self.makers[t.untyped_storage()._cdata] = f"{func} {list(t.shape)}"
        return out

    def alive(self, *, least: int = 0) -> list[str]:
        """What made them, once no more than `least` are left, or after a second.

        The thread that ran a backward pass may be about to let go of its last steps when the pass has ended.
        """
        last = time.monotonic() + 1
        while True:
            gc.collect()
            left = [self.makers[key] for key, storage in self.storages.items() if not storage.expired()]
            if len(left) <= least or time.monotonic() > last:
                return left
            time.sleep(0.01)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
