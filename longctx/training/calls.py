"""What is called when a part of a model is measured: copies of blocks and of the model, and inputs for them.

Letters: B batch, T sequence length, D d_model.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config import Cell
from longctx.engine.device import DTYPES
from longctx.engine.loading import LoadedBlock
from longctx.training.finding import FoundBlock, class_of
from longctx.training.isolation import is_sharded, twin_of

NAMES_OF = {dtype: name for name, dtype in DTYPES.items()}
InputGenerator = Callable[..., Any]
"""(sequence_length, batch_size, d_model) -> a tensor, or a list of them: the published form."""


@dataclass(kw_only=True)
class Circumstances:
    """What a measurement depends on beside the block and the configuration.

    device, dtype: where and in which format; None: those of the block. autocast: makes the context of the training's
    precision, or None. precision: the trainer's word for it.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    precision: str | None = None
    training_step: int | None = None
    run: str | None = None
    """Of which training or runner: rows of one do not take the place of another's."""
    input_generator: InputGenerator | None = None
    deadline: float | None = None
    """time.monotonic() after which cells are skipped."""
    sharded: bool = False
    eager: bool = False
    """Whether what torch.compile has compiled runs as it was written."""

    def place_of(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Where and in which format `module` is measured: as its first parameter is, unless something else is said."""
        first = next(iter(module.parameters()), None)
        device = self.device or (first.device if first is not None else torch.device("cpu"))
        kept = first.dtype if first is not None and first.dtype in NAMES_OF else torch.float32
        return device, self.dtype or kept


@dataclass(kw_only=True, eq=False)
class AsTrained(LoadedBlock):
    """A block that is called under the training's autocast. Backward runs outside of it, as in training."""

    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def call(self, x: Tensor) -> Tensor:
        with self.autocast():
            return super().call(x)

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        with self.autocast():
            return super().prefill(x)

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        with self.autocast():
            return super().step(x_t, state)


def loaded_block(
    block: FoundBlock, cell: Cell, device: torch.device, dtype: torch.dtype, circumstances: Circumstances
) -> LoadedBlock:
    """The block as the engine runs it: a copy, or where its weights are sharded a new one with weights of its own."""
    spec, module, inner = block.spec, block.module, block.inner
    if missing := _required_besides_x(inner):
        raise NotImplementedError(
            f"its forward needs {', '.join(missing)} besides x, which nothing here can give it; "
            "block_selector can name a module that takes x alone"
        )
    if circumstances.sharded or is_sharded(module):
        if spec is None:
            raise NotImplementedError("its weights are sharded over processes, one alone cannot run it")
        shape = {"d_model": cell.d_model, "n_heads": cell.n_heads, "num_kv_heads": cell.num_kv_heads}
        twin = spec.build(**shape, device=device, dtype=dtype, **block.options)
    else:
        twin = twin_of(module).to(device=device)
        if circumstances.dtype is not None:
            twin = twin.to(dtype)
    twin, causal = twin.eval(), bool(getattr(inner, "causal", False))
    streams = causal and callable(getattr(inner, "step", None)) and callable(getattr(inner, "init_state", None))
    modes = ("forward", "train", "decode", "prefill") if streams else ("forward", "train")
    if cell.mode not in modes:
        raise NotImplementedError(f"{block.path} has no mode {cell.mode}: it has {', '.join(modes)}")
    return AsTrained(
        autocast=circumstances.autocast or contextlib.nullcontext,
        name=block.path,
        module=_AsBlock(twin) if isinstance(twin, nn.MultiheadAttention) else twin,
        options=block.options,
        source_hash=source_hash(inner),
        causal=causal,
        modes=modes,
        reference=None,
        cost=None if spec is None else spec.cost(cell, block.options),
        takes_keep_state="keep_state" in inspect.signature(inner.forward).parameters,
    )


def _required_besides_x(module: nn.Module) -> list[str]:
    """Names of what `forward` cannot do without, after its first argument."""
    if isinstance(module, nn.MultiheadAttention):
        return []
    kinds = inspect.Parameter
    parameters = list(inspect.signature(module.forward).parameters.values())
    plain = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    return [each.name for each in parameters[1:] if each.kind in plain and each.default is each.empty]


class _AsBlock(nn.Module):
    """Torch's attention with one input for queries, keys and values: x `[B, T, D]` -> y `[B, T, D]`."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        rows = x if self.attention.batch_first else x.transpose(0, 1)
        y, _ = self.attention(rows, rows, rows, need_weights=False)
        return y if self.attention.batch_first else y.transpose(0, 1)


def block_input(
    cell: Cell, device: torch.device, dtype: torch.dtype, seed: int, input_generator: InputGenerator | None
) -> Tensor:
    """x `[B, T, D]`: the user's where it is of that shape, else standard normal from `seed`."""
    if input_generator is not None:
        x = next(tensors_in(input_generator(cell.length, cell.batch_size, cell.d_model)), None)
        if x is not None and x.is_floating_point() and x.dim() == 3 and x.shape[-1] == cell.d_model:
            return x.detach().to(device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (cell.batch_size, cell.length, cell.d_model)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def model_inputs(model: nn.Module, cell: Cell, input_generator: InputGenerator | None) -> list[Any]:
    """What the model's forward is called with. Raises NotImplementedError where there is nothing to call it with."""
    if input_generator is not None:
        made = input_generator(cell.length, cell.batch_size, cell.d_model)
        return list(made) if isinstance(made, tuple | list) else [made]
    if _reads_tokens(model):
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(model.vocab_size, (cell.batch_size, cell.length), generator=generator)]
    if (example := _example(model)) is not None:
        return example
    raise NotImplementedError(
        "there is no example input to call it with: give input_generator(sequence_length, batch_size, d_model), "
        "or set the module's example_input_array"
    )


def _reads_tokens(model: nn.Module) -> bool:
    vocabulary = getattr(model, "vocab_size", None)
    return isinstance(vocabulary, int) and isinstance(getattr(model, "embedding", None), nn.Embedding)


def _example(model: nn.Module) -> list[Any] | None:
    """The model's own `example_input_array`, None where it has none."""
    example = getattr(model, "example_input_array", None)
    return example if example is None else list(example) if isinstance(example, tuple | list) else [example]


def example_shape(model: nn.Module, input_generator: InputGenerator | None) -> tuple[int, int] | None:
    """(B, T) of the one input that a model can be called with, None where it takes any: the first two dimensions of its
    example's first tensor, T = 1 of a tensor that has but one."""
    if input_generator is not None or _reads_tokens(model):
        return None
    first = next(tensors_in(_example(model) or []), None)
    if first is None or not first.dim():
        return None
    return first.shape[0], first.shape[1] if first.dim() > 1 else 1


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


def computed_in(dtype: torch.dtype, device: torch.device, circumstances: Circumstances) -> str:
    """The number format of the products: that of autocast where the training uses it."""
    if circumstances.autocast is not None:
        with circumstances.autocast():
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
    return NAMES_OF.get(dtype, "fp32")


def source_hash(module: nn.Module) -> str:
    try:
        source = inspect.getsource(class_of(module))
    except (OSError, TypeError):
        source = class_of(module).__qualname__
    return hashlib.sha256(source.encode()).hexdigest()


class ModelRun:
    """A whole model's call, in the shape of the engine's run of a block."""

    def __init__(self, cell: Cell, model: nn.Module, inputs: list[Any]) -> None:
        self.cell, self.model, self.x = cell, model, inputs
        self.inputs, self.most_calls = [inputs], None
        if cell.mode == "train":
            model.train()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.cell.mode == "train" else torch.no_grad()

    def prepare(self) -> None:
        if self.cell.mode == "train":
            for parameter in self.model.parameters():
                parameter.grad = None

    def call_prepared(self) -> Any:
        if self.cell.mode != "train":
            return self.model(*self.x)
        self.prepare()
        y = self.model(*self.x)
        total = sum(t.float().sum() for t in tensors_in(y) if t.requires_grad)
        # As in the run of a block.
        del y
        total.backward()
        return total.detach()
