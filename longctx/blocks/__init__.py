"""The blocks, one file each: discovered by file name, listed without being imported, loaded one at a time.

Letters used all over this package: B batch, T sequence length, D d_model, H n_heads, G num_kv_heads, K head width
(D / H), W window_size, C chunk_size, N state_dim.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

    from longctx.blocks._spec import BlockSpec


@functools.cache
def _modules() -> dict[str, str]:
    """Label of each block -> name of its module, from the files alone: reading them costs no import of torch."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        path = Path(__path__[0], f"{module.name}.py")
        label = next(
            (
                keyword.value.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "BlockSpec"
                for keyword in node.keywords
                if keyword.arg == "label" and isinstance(keyword.value, ast.Constant)
            ),
            None,
        )
        if label:
            found[label] = module.name
    # Dense and Identity frame every table: the cost to beat and the cost that no mixer can beat.
    return dict(sorted(found.items(), key=lambda item: (item[0] not in ("Dense", "Identity"), item[0].casefold())))


def names() -> list[str]:
    """Labels of all blocks. Imports none of them."""
    return list(_modules())


def resolve(name: str) -> str:
    """The label that `name` means, whatever its case. Raises UsageError with a suggestion."""
    for label in _modules():
        if label.casefold() == name.casefold():
            return label
    raise UsageError(
        f"unknown block {name!r}.{did_you_mean(name, names())}",
        f"there are {', '.join(names())}; a block of your own is path/to/file.py:Name or package.module:Name",
    )


def load(name: str) -> BlockSpec:
    """The SPEC of a block by label. Imports its file, and so torch. Raises UsageError."""
    return importlib.import_module(f"{__name__}.{_modules()[resolve(name)]}").SPEC


def build(
    name: str,
    *,
    d_model: int,
    n_heads: int,
    num_kv_heads: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """A block by name: `build("BLADE", d_model=512, n_heads=8, chunk_size=256)`.

    The module maps x `[B, T, D]` to (y `[B, T, D]`, state). Raises UsageError for an unknown block, an option that
    the block does not have, or a shape that it cannot take.
    """
    spec = load(name)
    spec.check_options(options)
    return spec.build(
        d_model=d_model, n_heads=n_heads, num_kv_heads=num_kv_heads, device=device, dtype=dtype, **options
    )
