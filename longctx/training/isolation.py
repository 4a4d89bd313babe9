"""Measuring in the middle of training without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from longctx.engine.flags import global_state
from longctx.training.packages import is_lightning_module

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Random states of all devices, flags, grad mode and autocast as they were before, whatever happens inside.

    The training's own flags hold inside too: what is measured is the block as it is being trained. Threads and the
    treatment of denormals are never set, because threads that torch starts meanwhile would keep what they inherit.
    """
    with global_state(), torch.enable_grad():
        try:
            yield
        finally:
            # Casts of weights that were made under inference mode must not serve the training.
            torch.clear_autocast_cache()
            if torch.cuda.is_initialized():
                with contextlib.suppress(RuntimeError):
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of `module` lie on several devices, so that calling it would need every process."""
    tensor_class = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    names = {type(each).__name__ for each in module.modules()}
    return (
        any(isinstance(parameter, tensor_class) for parameter in module.parameters())
        or any("FullyShardedDataParallel" in name for name in names)
        # What stage 3 of DeepSpeed marks its parameters with.
        or any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    )


def twin_of(module: nn.Module) -> nn.Module:
    """A copy of `module` with weights of its own, no gradients and no hooks.

    Hooks may write into the training's own objects; gradients and whatever graph hangs on the original stay there.
    """
    memo: dict[int, Any] = {}
    for each in module.modules():
        for value in _inside(list(vars(each).values())):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                # Kept to be looked at, as attention maps are; it cannot be copied, nor may its graph be.
                memo[id(value)] = value.detach().clone()
            elif is_lightning_module(value) and value is not module:
                memo[id(value)] = value
        if (trainer := vars(each).get("_trainer")) is not None:
            memo[id(trainer)] = trainer
    hooks = [(each, {name: getattr(each, name, None) for name in _HOOKS}) for each in module.modules()]
    try:
        for each, values in hooks:
            for name, value in values.items():
                if value:
                    each.__dict__[name] = type(value)()
        twin = copy.deepcopy(module, memo)
    finally:
        for each, values in hooks:
            for name, value in values.items():
                if value is not None:
                    each.__dict__[name] = value
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _inside(values: Iterable[Any], depth: int = 0) -> Iterator[Any]:
    """`values`, and what lies in lists, tuples and dicts among them."""
    for value in values:
        yield value
        if isinstance(value, list | tuple | Mapping) and depth < 3:
            yield from _inside(value.values() if isinstance(value, Mapping) else value, depth + 1)
