"""Launching a Triton kernel at a fraction of what `kernel[grid](...)` asks of the host.

Triton looks at every argument of every launch to find the compiled variant, some 20 to 60 us of Python; short rows
take less than that on the GPU. Here a variant once found is kept under what it depends on, and launched itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_variants: dict[tuple[Any, ...], CompiledKernel] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], constants: Mapping[str, Any], **options: int
) -> None:
    """Run `kernel` over `grid` on (values, constants), the order of its parameters, on the device of the first value.

    values: tensors, numbers, None, tensor descriptors. constants: its `tl.constexpr` parameters. options: num_warps,
    num_stages. Under Triton's interpreter the tensors may lie on a CPU.
    """
    first = values[0]
    if torch.compiler.is_compiling():
        with on_device_of(first):
            kernel[grid](*values, **constants, **options)
        return
    device = first.get_device()
    fixed = tuple(constants.values())
    # A kernel lives as long as its module, so its id is its name.
    key = (id(kernel), device, fixed, *options.values(), *[v if v is None else _kind(v) for v in values])
    variant = _variants.get(key)
    with _alone if device < 0 or _gpus() == 1 else torch.cuda.device(device):
        if variant is not None:
            variant[(*grid, 1, 1)[:3]](*values, *fixed, stream=torch._C._cuda_getCurrentRawStream(device))
            return
        variant = kernel[grid](*values, **constants, **options)
    if isinstance(variant, CompiledKernel):
        _variants[key] = variant


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of x as the current one, on which Triton launches."""
    # On a CPU under Triton's interpreter, which tests use; where there is one GPU, entering it is for nothing.
    if x.is_cuda and (torch.compiler.is_compiling() or _gpus() > 1):
        return torch.cuda.device(x.device)
    return _alone


def power_of_2(least: int) -> int:
    """The smallest that is not below `least`. Triton's own asks more of the host than a launch may."""
    return 1 << (least - 1).bit_length()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    # torch.compile knows torch's function, and cannot look through the cache.
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else _known_capability(device)


_alone = contextlib.nullcontext()
_gpus = functools.cache(torch.cuda.device_count)
_known_capability = functools.cache(torch.cuda.get_device_capability)


def _kind(value: Any) -> Any:
    """All that a compiled variant depends on in an argument: never less than Triton distinguishes."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if type(value) is int:
        return value == 1, value & 15 == 0, -0x8000_0000 <= value < 0x8000_0000
    if type(value) is float:
        return float
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, *value.block_shape, getattr(value, "padding", None)
    return value
