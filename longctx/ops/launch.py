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
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

EARLY = True
"""Whether kernels that can do so may begin while the one before them ends (programmatic dependent launch)."""

MOST_VARIANTS = 4096
_variants: dict[tuple[Any, ...], CompiledKernel] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], constants: Mapping[str, Any], **options: int
) -> None:
    """Run `kernel` over `grid` on (values, constants), the order of its parameters, on the device of the first value.

    values: tensors, numbers, None, tensor descriptors. constants: its `tl.constexpr` parameters. options: num_warps,
    num_stages, launch_pdl. Under Triton's interpreter the tensors may lie on a CPU.
    """
    first = values[0]
    if torch.compiler.is_compiling():
        with torch.cuda.device(first.device) if first.is_cuda else _alone:
            kernel[grid](*values, **constants, **options)
        return
    device = first.get_device()
    fixed = tuple(constants.values())
    # A kernel lives as long as its module, so its id is its name. Whole numbers stand for themselves: to ask of each
    # what Triton would takes longer than to find a variant again for every other length.
    name = id(kernel)
    kinds = [v if v.__class__ in _PLAIN else _kind(v) for v in values]
    places = _unspecialized.get(name)
    for place in _find_unspecialized(kernel) if places is None else places:
        kinds[place] = -0x8000_0000 <= values[place] < 0x8000_0000
    key = (name, device, fixed, *options.values(), *kinds)
    variant = _variants.get(key)
    # On a CPU under Triton's interpreter, which tests use; where there is one GPU, entering it is for nothing.
    with _alone if device < 0 or _gpus() == 1 else torch.cuda.device(device):
        if variant is not None:
            _run(variant, (*grid, 1, 1), torch._C._cuda_getCurrentRawStream(device), *values, *fixed)
            return
        variant = kernel[grid](*values, **constants, **options)
    if isinstance(variant, CompiledKernel):
        if len(_variants) >= MOST_VARIANTS:
            _variants.clear()
        _variants[key] = variant


def _run(variant: CompiledKernel, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
    if _KNOWN and not _hooked():
        # What `variant[grid]` comes to where nobody listens.
        x, y, z, *_ = grid
        variant.run(x, y, z, stream, variant.function, variant.packed_metadata, None, None, None, *arguments)
    else:
        variant[grid[:3]](*arguments, stream=stream)


_PLAIN = {int, type(None)}
_unspecialized: dict[int, tuple[int, ...]] = {}
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
_KNOWN = (3, 4) <= _TRITON <= (3, 6)


def _find_unspecialized(kernel: Any) -> tuple[int, ...]:
    """Places of the numbers on whose values no variant depends, but for their width."""
    parameters = enumerate(getattr(kernel, "params", ()))
    places = tuple(place for place, parameter in parameters if getattr(parameter, "do_not_specialize", False))
    _unspecialized[id(kernel)] = places
    return places


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to hear of launches."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def launches_early(device: torch.device) -> bool:
    """Whether `launch_pdl` works on this device: Hopper or later, and a Triton that knows how.

    A kernel launched so calls `tl.extra.cuda.gdc_wait()` before it reads or overwrites anything of the kernels before.
    """
    if not EARLY or device.type != "cuda" or capability(device) < (9, 0):
        return False
    # Earlier ones have the instructions, but not all of them the launch.
    return _TRITON >= (3, 5) and hasattr(tl.extra.cuda, "gdc_wait")


def power_of_2(least: int) -> int:
    """The smallest that is not below `least`. Triton's own asks more of the host than a launch may."""
    return 1 << (least - 1).bit_length()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    # torch.compile knows torch's function, and cannot look through the cache.
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else _known_capability(device)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a GPU; 0 where torch does not know."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


_alone = contextlib.nullcontext()
_gpus = functools.cache(torch.cuda.device_count)
_known_capability = functools.cache(torch.cuda.get_device_capability)


def _kind(value: Any) -> Any:
    """All that a compiled variant depends on in an argument that is no whole number: what Triton distinguishes."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, *value.block_shape, getattr(value, "padding", None)
    # 1, 1.0 and True are one key of a dictionary, and three types of an argument.
    return float if type(value) is float else (type(value), value)
