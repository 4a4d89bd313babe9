"""A block as it is measured: ours by label, or a user's own `nn.Module` by file or package.

A user's class or factory is called with those of `d_model, n_heads, num_kv_heads, device, dtype` that its signature
names, and with the options of the request; a signature of nothing but `**kwargs` gets all of them. One that takes no
`device` or `dtype` is moved there afterwards. The module maps x `[B, T, D]` to y `[B, T, D]`, or to a tuple that begins
with y. It may offer, as attributes of the module, its class or its factory:

    causal = True                      it claims that no output sees a later token
    reference(module, x) -> y          an oracle, run in fp64 on an fp64 copy of the module; (y, state) is fine too
    cost(cell, options) -> Cost        or a dict of flops, bytes, state_bytes; on a class a staticmethod
    init_state(batch_size), step(x_t, state) -> (y_t, state)      one token; then a forward gives (y, state)

Letters: B batch, T sequence length, D d_model.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longctx import blocks
from longctx.blocks._spec import TOLERANCES, BlockSpec, Cost
from longctx.config import MODES, BlockRequest, Cell
from longctx.engine.importing import import_target, in_words
from longctx.errors import LongctxError, UsageError, did_you_mean

_SHARED = ("d_model", "n_heads", "num_kv_heads", "device", "dtype")


class WrongOutputError(ValueError):
    """A module's output is not a tensor of the input's shape and dtype."""


@dataclass(kw_only=True, eq=False)
class LoadedBlock:
    """A block built for one cell, in eval mode, with what it offers."""

    name: str
    module: nn.Module
    options: dict[str, Any]
    source_hash: str
    causal: bool
    modes: tuple[str, ...]
    reference: Callable[[nn.Module, Tensor], Any] | None
    cost: Cost | None
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))
    rebuild: Callable[[torch.dtype], nn.Module] | None = None
    """Builds the same module again in another dtype, on the same device, with weights of its own."""
    takes_keep_state: bool = False
    seed: int = 0
    ours: bool = False

    @property
    def path(self) -> str | None:
        """The implementation that runs, in words, if the module tells (`path`). Read it after a call."""
        path = getattr(self.module, "path", None)
        return path if isinstance(path, str) else None

    def no_gradients(self) -> contextlib.AbstractContextManager[Any]:
        """In which it is called outside of training: inference mode for blocks of ours. A user's may keep what it makes
        in its first call (a mask, rotary tables), which training then could not use; or need gradients of its own."""
        return torch.inference_mode() if self.ours else torch.no_grad()

    def call(self, x: Tensor) -> Tensor:
        """y `[B, T, D]` for x `[B, T, D]`: what mode forward times. No state is kept."""
        y = self.module(x, keep_state=False) if self.takes_keep_state else self.module(x)
        return y[0] if isinstance(y, tuple | list) and y else y

    def checked_call(self, x: Tensor) -> Tensor:
        """`call`, and a look at what came back. Raises WrongOutputError."""
        y = self.call(x)
        if not isinstance(y, Tensor):
            raise WrongOutputError(
                f"{self.name} returned {type(y).__name__}, not a tensor or a tuple that begins with one: "
                "wrap it in a module whose forward returns its tensor"
            )
        if y.shape != x.shape:
            raise WrongOutputError(f"{self.name} returned shape {list(y.shape)} for an input of shape {list(x.shape)}")
        if y.dtype != x.dtype or y.device != x.device:
            raise WrongOutputError(
                f"{self.name} returned {y.dtype} on {y.device} for an input of {x.dtype} on {x.device}"
            )
        return y

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """(y, state) for x `[B, T, D]`: a forward that keeps its state. Raises NotImplementedError without one."""
        y = self.module(x)
        if not isinstance(y, tuple | list) or len(y) < 2 or y[1] is None:
            raise NotImplementedError(f"{self.name} returns no state from a forward, so it has no prefill")
        return y[0], y[1]

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token, x_t `[B, 1, D]`. Raises NotImplementedError if the module has no `step`."""
        step = getattr(self.module, "step", None)
        if not callable(step):
            raise NotImplementedError(f"{self.name} has no step, so it cannot decode")
        return step(x_t, state)

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the module in another dtype with the same, already rounded, weights; in eval mode."""
        if self.rebuild is not None:
            twin = self.rebuild(dtype)
            twin.load_state_dict(self.module.state_dict())
        else:
            twin = _moved(copy.deepcopy(self.module), None, dtype)
        return twin.eval()


def describe_block(request: BlockRequest, *, d_model: int, n_heads: int, num_kv_heads: int | None) -> dict[str, Any]:
    """What a request stands for, before anything is measured: it is built once, so bad options show here.

    Returns {name, target, options (every default filled in), source_hash, causal, modes, has_reference, has_cost,
    user}. Raises UsageError for a block, file, name or option that does not exist, and for what cannot be built.
    """
    cell = Cell(block=request, length=1, d_model=d_model, n_heads=n_heads, num_kv_heads=num_kv_heads)
    loaded = load_block(request, cell, _where_shapes_are_enough(request), torch.float32, 0)
    return {
        "name": request.name,
        "target": request.target if request.is_user else blocks.resolve(request.target),
        "options": loaded.options,
        "source_hash": loaded.source_hash,
        "causal": loaded.causal,
        "modes": list(loaded.modes),
        "has_reference": loaded.reference is not None,
        "has_cost": loaded.cost is not None,
        "user": request.is_user,
    }


def _where_shapes_are_enough(request: BlockRequest) -> torch.device:
    """Of ours only the shapes are needed; a user's code may look at values while it builds."""
    return torch.device("cpu" if request.is_user else "meta")


def cost_of(cell: Cell) -> Cost | None:
    """What the cost model of a cell's block says, None for a block without one. Raises UsageError as `load_block`."""
    return load_block(cell.block, cell, _where_shapes_are_enough(cell.block), torch.float32, 0).cost


def load_block(request: BlockRequest, cell: Cell, device: torch.device, dtype: torch.dtype, seed: int) -> LoadedBlock:
    """Build the block of `request` for `cell`, or `cell.layers` of them in a row, weights drawn from `seed`. Raises
    UsageError.

    It leaves the folder of a user's file on sys.path, for imports made while the block runs, and takes random
    numbers: call it inside `flags.global_state()`.
    """
    torch.manual_seed(seed)
    load = _load_user if request.is_user else _load_own
    loaded = load(request, cell, device, dtype)
    if cell.layers > 1:
        from longctx.engine.stack import stacked

        loaded = stacked([loaded, *(load(request, cell, device, dtype) for _ in range(cell.layers - 1))], cell)
    loaded.seed = seed
    loaded.module.eval()
    return loaded


# -- our own blocks --------------------------------------------------------------------------------------------------


def _load_own(request: BlockRequest, cell: Cell, device: torch.device, dtype: torch.dtype) -> LoadedBlock:
    spec = blocks.load(request.target)
    options = spec.check_options(dict(request.options))

    def build(kind: torch.dtype) -> nn.Module:
        return spec.build(
            d_model=cell.d_model,
            n_heads=cell.n_heads,
            num_kv_heads=cell.num_kv_heads,
            device=device,
            dtype=kind,
            **options,
        )

    module = build(dtype)
    causal = bool(getattr(module, "causal", True))
    return LoadedBlock(
        name=request.name,
        module=module,
        options=options,
        source_hash=_own_source_hash(spec),
        causal=causal,
        modes=tuple(mode for mode in spec.modes if causal or mode in ("forward", "train")),
        reference=spec.reference,
        cost=spec.cost(cell, options),
        tolerances=spec.tolerances,
        rebuild=build,
        takes_keep_state=True,
        ours=True,
    )


def _own_source_hash(spec: BlockSpec) -> str:
    """sha256 over the block's file, the shell, and every file of blocks/ and ops/ that they import."""
    package = Path(blocks.__file__).parent.parent
    todo = [Path(inspect.getfile(spec.build)), package / "blocks/_shell.py"]
    seen: dict[str, bytes] = {}
    while todo:
        path = todo.pop()
        name = path.relative_to(package).as_posix()
        if name in seen:
            continue
        seen[name] = path.read_bytes()
        todo += _imported_files(seen[name], package, path.parent.name)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + b"\0" + seen[name] + b"\0")
    return digest.hexdigest()


@functools.cache
def _imported_files(code: bytes, package: Path, inside: str) -> list[Path]:
    """Files of longctx/blocks and longctx/ops that code in the folder `inside` imports, wherever in it it does."""
    # Parsing takes a tenth of a second for a block, and every cell loads its own.
    found = []
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, ["longctx", inside, base]))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if len(parts) > 2 and parts[0] == "longctx" and parts[1] in ("blocks", "ops"):
                path = package.joinpath(*parts[1:]).with_suffix(".py")
                if path.is_file():
                    found.append(path)
    return found


# -- blocks of the user's own ----------------------------------------------------------------------------------------


def _load_user(request: BlockRequest, cell: Cell, device: torch.device, dtype: torch.dtype) -> LoadedBlock:
    target, source = import_target(request.target)
    options = dict(request.options)
    shared = {
        "d_model": cell.d_model,
        "n_heads": cell.n_heads,
        "num_kv_heads": cell.num_kv_heads or cell.n_heads,
        "device": device,
        "dtype": dtype,
    }
    arguments, resolved = _arguments(target, request, shared, options)

    module = _build_user(target, request, arguments, device, dtype)
    own_step = callable(getattr(module, "step", None)) and callable(getattr(module, "init_state", None))
    causal = _offered(module, target, "causal") is True
    return LoadedBlock(
        name=request.name,
        module=module,
        options=resolved,
        source_hash=hashlib.sha256(source).hexdigest(),
        causal=causal,
        modes=MODES if own_step else ("forward", "train"),
        reference=_reference_of(module, target),
        cost=_cost_of(module, target, request, cell, resolved),
        takes_keep_state=_accepts(module.forward, "keep_state"),
    )


def _arguments(
    target: Callable[..., Any], request: BlockRequest, shared: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments to build with, the options among them with defaults filled in)."""
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the signature of {request.target} cannot be read: {error}") from error
    if inspect.isclass(target) and target.__init__ is nn.Module.__init__:
        # It takes any keyword to refuse it.
        parameters = {}
    kinds = inspect.Parameter
    named = {name: p for name, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    open_ended = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in named and not open_ended:
            own = [name for name in named if name not in _SHARED]
            raise UsageError(
                f"{request.name.partition(':')[0]} has no option {option!r}.{did_you_mean(option, own)}",
                f"its options are {', '.join(own)}" if own else "its signature takes no options",
            )
    passed = {name: value for name, value in shared.items() if name in named or (open_ended and not named)}
    missing = [n for n, p in named.items() if p.default is p.empty and n not in passed and n not in options]
    missing += [n for n, p in parameters.items() if p.kind is kinds.POSITIONAL_ONLY and p.default is p.empty]
    if missing:
        raise UsageError(
            f"{request.target} needs {', '.join(missing)}, which nothing gives it",
            f"longctx passes {', '.join(_SHARED)}; give others as {request.target}:{missing[0]}=value, or name a "
            "function of yours that takes what longctx passes and returns the module",
        )
    defaults = {n: p.default for n, p in named.items() if p.default is not p.empty and n not in _SHARED}
    return passed | dict(options), {n: _plain(v) for n, v in (defaults | dict(options)).items()}


def _moved(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """The module on `device`, its real numbers in `dtype`: `Module.to` would take the imaginary part of the others."""
    if dtype is None or not any(t.is_complex() for t in (*module.parameters(), *module.buffers())):
        return module.to(device=device, dtype=dtype)

    def move(t: Tensor) -> Tensor:
        wanted = dtype if t.is_floating_point() else t.dtype
        return t.to(device=device, dtype=torch.complex128 if t.is_complex() and dtype == torch.float64 else wanted)

    return module._apply(move)


def _plain(value: Any) -> Any:
    """A value that a file can hold, and that is the same in the next process: no address in a function's name."""
    if isinstance(value, bool | int | float | str | None):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _build_user(
    target: Callable[..., Any],
    request: BlockRequest,
    arguments: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    try:
        module = target(**arguments)
        if isinstance(module, nn.Module):
            # What it was not told it may have made on the default device and in the default dtype. What it was told it
            # may have kept to where it wants to, with a decay in fp32, say.
            told = _accepts(target, "dtype") and any(p.dtype == dtype for p in module.parameters())
            module = _moved(module, device, None if told else dtype)
    except (LongctxError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        given = ", ".join(f"{name}={_plain(value)}" for name, value in arguments.items())
        raise UsageError(
            f"{request.target} cannot be built: {in_words(error)}", f"it was called with {given or 'nothing'}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{request.target} returned {type(module).__name__}, not an nn.Module",
            "name an nn.Module class or a function that returns a module",
        )
    return module


def _offered(module: nn.Module, target: Any, name: str) -> Any:
    """An attribute of the module or its class, else of the function that made it; None if neither has it."""
    return getattr(module, name, getattr(target, name, None))


def _reference_of(module: nn.Module, target: Any) -> Callable[[nn.Module, Tensor], Any] | None:
    # Off the class a method comes unbound, so that it can be run on a copy of the module.
    own = vars(module).get("reference") or getattr(type(module), "reference", None)
    reference = own or getattr(target, "reference", None)
    return reference if callable(reference) else None


def _cost_of(
    module: nn.Module, target: Any, request: BlockRequest, cell: Cell, options: Mapping[str, Any]
) -> Cost | None:
    cost = _offered(module, target, "cost")
    if not callable(cost):
        return None
    try:
        found = cost(cell, options)
        if isinstance(found, Mapping):
            found = Cost(**{name: float(found[name]) for name in ("flops", "bytes", "state_bytes")})
    except Exception as error:
        raise UsageError(
            f"the cost of {request.target} cannot be computed: {in_words(error)}",
            "cost(cell, options) returns flops, bytes and state_bytes, all numbers",
        ) from error
    if not isinstance(found, Cost):
        raise UsageError(
            f"the cost of {request.target} is {type(found).__name__}, not a dict of flops, bytes, state_bytes"
        )
    return found


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
