"""What a block's file exports beside its module: label, builder, reference, cost model, tolerances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longctx.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from longctx.config import Cell

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

# Largest ||y - reference|| / ||reference|| that passes, the reference run in fp64 on the same weights.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a cell must do, counted from the definition of the block, not from an implementation.

    flops: a multiply-add counts 2; matrix products, visible query-key pairs and recurrences, no elementwise work.
    bytes: input, output, weights, and state or keys and values that must be read: each once.
    state_bytes: size of the carried state after T tokens.
    """

    flops: float
    bytes: float
    state_bytes: float


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """A block as the rest of the program knows it.

    build: the nn.Module class; called with d_model, n_heads, num_kv_heads, device, dtype and the options.
    reference: (module, x `[B, T, D]`, s=None) -> (y `[B, T, D]`, s): dense masks or loops over tokens, eager, any
        device, fp64-capable. s is the recurrent state `[B, N]` of BLADE and DPASSM, None elsewhere.
    cost: (cell, options with every default filled in) -> Cost.
    """

    label: str
    build: Callable[..., nn.Module]
    reference: Callable[..., tuple[Tensor, Tensor | None]]
    cost: Callable[[Cell, Mapping[str, Any]], Cost]
    modes: tuple[str, ...] = ("forward", "train", "decode", "prefill")
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))

    @property
    def defaults(self) -> dict[str, Any]:
        """The block's own options and their defaults, read off its constructor."""
        shared = {"d_model", "n_heads", "num_kv_heads", "device", "dtype"}
        parameters = inspect.signature(self.build).parameters
        return {name: p.default for name, p in parameters.items() if name not in shared}

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options of the block with `options` put in. Raises UsageError for one that it does not have."""
        defaults = self.defaults
        for name in options:
            if name not in defaults:
                raise UsageError(
                    f"{self.label} has no option {name!r}.{did_you_mean(name, defaults)}",
                    f"its options are {', '.join(f'{key}={value}' for key, value in defaults.items())}",
                )
        return defaults | dict(options)


def shell_cost(
    cell: Cell,
    *,
    pairs: float,
    weight_elements: float = 0.0,
    other_flops: float = 0.0,
    state_elements: float = 0.0,
    read_elements: float = 0.0,
) -> Cost:
    """The cost of the shell that all blocks share, with a mixer's own part added.

    pairs: visible (query, key) pairs of one sequence and one head, for the queries of this cell's mode (in mode
        decode: the keys that the last token sees).
    weight_elements: elements of the mixer's own matrices that every token goes through, beyond qkv_proj and out_proj.
    other_flops: what else one sequence needs forward, beyond matrix products over all tokens.
    state_elements: carried state of one sequence after T tokens. read_elements: what a decode step reads of it.

    Backward counts twice the forward FLOPs: the model's, not those of recomputation.
    """
    heads_kv = cell.num_kv_heads or cell.n_heads
    width = cell.d_model // cell.n_heads
    queries = 1 if cell.mode == "decode" else cell.length
    size = ELEMENT_BYTES[cell.dtype]
    weights = cell.d_model * (cell.d_model + 2 * heads_kv * width) + 9 * cell.d_model**2 + weight_elements
    forward = 2.0 * weights * queries + 4.0 * cell.d_model * pairs + other_flops
    flops = cell.batch_size * forward * (3 if cell.mode == "train" else 1)
    moved = weights + cell.batch_size * 2 * queries * cell.d_model
    if cell.mode == "decode":
        moved += cell.batch_size * read_elements
    elif cell.mode == "train":
        moved = 3 * weights + cell.batch_size * 4 * queries * cell.d_model
    return Cost(flops=flops, bytes=float(moved * size), state_bytes=float(cell.batch_size * state_elements * size))
