"""Which modules of a model are its sequence-mixing blocks, and what each of them takes.

What a selector of the user's says first; then by type (our blocks and what stands beside them in a list, torch's
attention and transformer layers), then by the names that such attributes and classes go by.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from longctx import blocks as own_blocks
from longctx.blocks._shell import PreNormBlock
from longctx.blocks._spec import BlockSpec
from longctx.errors import LongctxError

TORCH_TYPES = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
KINDS = ("blade", "dpassm", "longformer", "bigbird")
NAMES = ("attention_block", "attention", "block", "model")
"""The attributes in which the published benchmark looks for a block, `model` last."""
MORE_NAMES = ("attn", "self_attn", "self_attention", "mixer", "token_mixer", "transformer_block", "encoder_layer")
LIST_NAMES = ("blocks", "layers", "h", "attention_blocks", "attention_layers", "transformer_blocks")
CLASS_WORDS = (("attention", "attn", "mixer"), ("block",))
"""What names of classes contain, the surest first."""
WIDTHS = ("d_model", "embed_dim", "hidden_size", "n_embd", "dim", "embedding_dim")
HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "nhead", "heads")

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, FSDP and activation checkpointing keep the module that they wrap."""

_PLACE = re.compile(r"_?((layer|block)_?(idx|index|id|num|number|name)|idx|index|name|prefix)")
"""Attributes by which a layer knows its place."""

BlockSelector = Callable[[str, nn.Module], bool]
"""(path of a module, the module) -> whether it is a block."""


@dataclass(kw_only=True, eq=False)
class FoundBlock:
    """A module that maps `[B, T, D]` to `[B, T, D]`, and where it was found."""

    path: str
    module: nn.Module
    also: list[str] = field(default_factory=list)
    """Paths of the other modules that have the same shape: a measurement of this one is theirs too."""
    compiled: bool = False
    """Whether torch.compile was applied to it, to something in it, or to the whole model."""

    @property
    def inner(self) -> nn.Module:
        return unwrapped(self.module)

    @property
    def spec(self) -> BlockSpec | None:
        """Ours, or None for a stranger's block."""
        return _specs().get(class_of(self.inner))

    @property
    def options(self) -> dict[str, Any]:
        if self.spec is None:
            return {}
        return {name: getattr(self.inner, name) for name in self.spec.defaults if hasattr(self.inner, name)}

    def d_model(self, default: int) -> int:
        """Width of the block's input: as it says, else that of its first layer, else `default`."""
        if width := _first_int(self.inner, WIDTHS):
            return width
        for module in self.module.modules():
            if isinstance(module, nn.Linear):
                return module.in_features
            if isinstance(module, nn.LayerNorm):
                return module.normalized_shape[-1]
            if width := _first_int(module, WIDTHS):
                return width
        return default

    def n_heads(self, default: int) -> int:
        counts = (_first_int(module, HEADS) for module in self.module.modules())
        return next((count for count in counts if count), default)


def find_blocks(model: nn.Module, selector: BlockSelector | None = None) -> list[FoundBlock]:
    """The blocks of `model`, each distinct shape once, in the model's order. Raises LongctxError if it has none.

    A block inside a block is a part of it; one inside a wrapper (torch.compile, FSDP) has the wrapper measured with it.
    selector(path, module) -> bool is asked first; where it finds none, blocks are looked for as without it.
    """
    whole = _is_compiled(model)
    model = unwrapped(model)
    for is_block in _ways(model, selector):
        found = _distinct(_outermost(model, is_block))
        if found:
            for block in found:
                block.compiled = whole or any(map(_is_compiled, block.module.modules()))
            return found
    listed = [f"{path} ({type(module).__name__})" for path, module in model.named_modules() if path]
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    raise LongctxError(
        f"{type(model).__name__} has no block that could be benchmarked; its modules are {shown or 'none'}",
        "say which: block_selector=lambda path, module: path.endswith('.mixer')",
    )


def _ways(model: nn.Module, selector: BlockSelector | None) -> Iterator[BlockSelector]:
    if selector is not None:
        yield selector
    lists = _lists_of_ours(model)

    def beside_ours(path: str, module: nn.Module) -> bool:
        mere_layer = type(module).__module__.startswith("torch.nn.") and not isinstance(module, TORCH_TYPES)
        return path.rpartition(".")[0] in lists and not mere_layer

    yield lambda path, module: isinstance(module, PreNormBlock) or beside_ours(path, module)
    yield lambda path, module: isinstance(module, TORCH_TYPES)
    yield _named_as_one_of_many
    for name in (*NAMES[:-1], *MORE_NAMES):
        yield lambda path, module, name=name: path.rpartition(".")[2] == name and not _is_container(module)
    yield lambda path, module: any(kind in path.rpartition(".")[2].lower() for kind in KINDS)
    for words in CLASS_WORDS:
        yield lambda path, module, words=words: any(word in type(module).__name__.lower() for word in words)
    yield lambda path, module: path == NAMES[-1] and not _is_container(module)


def _lists_of_ours(model: nn.Module) -> set[str]:
    """Paths of the lists in which a block of ours is: what else is in one takes its place, and is a block too."""
    lists = ((path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList))
    return {
        _without_wrappers(path) for path, each in lists if any(isinstance(unwrapped(m), PreNormBlock) for m in each)
    }


def _named_as_one_of_many(path: str, module: nn.Module) -> bool:
    parts = path.split(".")
    return len(parts) > 1 and parts[-1].isdigit() and parts[-2] in LIST_NAMES and not isinstance(module, nn.Linear)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Identity)


def _outermost(model: nn.Module, is_block: BlockSelector) -> Iterable[FoundBlock]:
    inside: str | None = None
    for path, module in model.named_modules():
        if not path or (inside is not None and path.startswith(inside)):
            continue
        name = _without_wrappers(path)
        if is_block(name, unwrapped(module)):
            inside = f"{path}."
            yield FoundBlock(path=name, module=module)


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _distinct(found: Iterable[FoundBlock]) -> list[FoundBlock]:
    by_shape: dict[str, FoundBlock] = {}
    for block in found:
        first = by_shape.setdefault(signature(block.module), block)
        if first is not block:
            first.also.append(block.path)
    return list(by_shape.values())


def signature(module: nn.Module) -> str:
    """Equal for two modules that do the same work: classes, plain attributes, shapes and formats of all tensors.

    A number or name that says which layer of a stack a module is makes no difference.
    """
    digest = hashlib.sha256()
    for path, each in module.named_modules():
        plain = {
            name: value
            for name, value in vars(each).items()
            if name != "training" and isinstance(value, bool | int | float | str | tuple) and not _PLACE.fullmatch(name)
        }
        tensors = {
            name: (tuple(value.shape), str(value.dtype))
            for name, value in {**each._parameters, **each._buffers}.items()
            if value is not None
        }
        place = f"{type(each).__module__}.{type(each).__qualname__}"
        digest.update(repr((path, place, sorted(plain.items()), sorted(tensors.items()))).encode())
    return digest.hexdigest()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that somebody wrote, out of what has been put around it."""
    while (inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None)) is not None:
        module = inner
    return module


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to the module itself: around it, in its place, or by Lightning for a whole."""
    around = "_orig_mod" in module._modules
    return around or module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


def class_of(module: nn.Module) -> type:
    """The class that somebody wrote: `fully_shard` puts one of its own in its place."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def _first_int(module: nn.Module, names: Iterable[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


@functools.cache
def _specs() -> dict[Any, BlockSpec]:
    return {spec.build: spec for spec in map(own_blocks.load, own_blocks.names())}
