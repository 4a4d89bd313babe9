"""Is the block right? Checked before it is timed, because a wrong answer can be as fast as one likes.

At a short length: against the reference in fp64 on the same weights. At the cell's own shape: finite, the same twice,
blind to later tokens if it claims to be, and answering to its input. Shapes: B batch, T length, D d_model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.config import Cell
from longctx.engine.loading import LoadedBlock, WrongOutputError
from longctx.ops.precision import wide_dtype

MIN_SHORT, MAX_SHORT, ODD_REST = 192, 2304, 37
"""The reference check takes two windows or chunks and an odd rest, within these bounds."""

QUIET = 0.1
"""Scale of the short check's input: beside a smaller residual an error of the mixer shows more."""

LEAK = {"fp64": 1e-11, "fp32": 1e-5, "bf16": 2e-3, "fp16": 5e-4}
"""Change of an earlier token, relative to its size, from which a later token is taken to have been seen."""

STREAMED = ("decode", "prefill")
"""The modes in which a block's state is checked too."""

COLUMNS = 16
SLAB_TOKENS = 1 << 14
SLOW_S = 2.0


class _Wrong(Exception):
    """A check failed; the text is the reason, for the user."""


def check_block(
    loaded: LoadedBlock,
    cell: Cell,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    x: Tensor,
    cache: dict[Any, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Check `loaded` for `cell`; x `[B, T, D]` is the input that will be timed, and is left as it was.

    Returns {error, tolerance, passed, reason, mixes_batch} and, of the calls at the cell's shape, {first_call_s,
    call_s, calls}. error is the largest of ||y - reference|| / ||reference|| at the short length, None without a
    reference; reason says what failed, or None. cache: kept by the caller between cells, so that the reference check is
    made once for a block, its options, dtype and device. What the block raises passes through.
    """
    found: dict[str, Any] = {"error": None, "tolerance": None, "passed": True, "reason": None}
    found |= {"mixes_batch": False, "first_call_s": None, "call_s": None, "calls": 0}
    cache = {} if cache is None else cache
    # The hash is that of a file, which may hold many blocks.
    key = (cell.block.target, loaded.source_hash, repr(sorted(loaded.options.items())))
    key += (cell.d_model, cell.n_heads, cell.num_kv_heads)
    key += (cell.layers, cell.dtype, str(device), cell.batch_size > 1, cell.mode if cell.mode in STREAMED else None)
    with loaded.no_gradients():
        try:
            # The call at the cell's shape comes first: it is the first call that a user would see.
            _check_at_shape(loaded, cell, seed, x, found)
            if key not in cache:
                cache[key] = _check_short(loaded, cell, device, dtype, seed)
            found |= cache[key]
        except _Wrong as wrong:
            found |= {"passed": False, "reason": str(wrong)}
    return found


# -- at a short length ---------------------------------------------------------------------------------------------


def short_length(options: Mapping[str, Any]) -> int:
    """Tokens of the reference check: two of the block's windows or chunks and an odd rest, never very long."""

    def number(name: str, default: int) -> int:
        value = options.get(name, default)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default

    window = number("window_size", 0) * number("dilation", 1)
    blocks = number("block_size", 0) * (number("num_window_blocks", 3) + number("num_global_blocks", 2) + 2)
    reach = max(2 * window, 2 * number("chunk_size", 0), blocks, MIN_SHORT)
    return min(reach, MAX_SHORT) + ODD_REST


def _check_short(
    loaded: LoadedBlock, cell: Cell, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """The reference check, or what can be checked without a reference."""
    x, y = _short_call(loaded, cell, device, dtype, seed)
    length = x.shape[1]
    if not _digest(y).finite:
        raise _Wrong(f"gives NaN or infinity at {length} tokens")
    if torch.equal(loaded.checked_call(x.flip(0, 1).neg()), y):
        raise _Wrong("gives the same output for another input")
    if cell.mode in STREAMED:
        _carries_on(loaded, x, y, cell)
    mixes = not loaded.ours and _mixes_batch(loaded, x, cell.dtype)
    if loaded.reference is None:
        _keeps_nothing(loaded, x, y, cell.dtype)
        if loaded.causal:
            for position in {1, length // 2, max(1, length - ODD_REST // 2)} - {length, 0}:
                _blind_to_later(loaded, x, y, position, cell.dtype)
        return {"error": None, "tolerance": None, "passed": True, "reason": None, "mixes_batch": mixes}
    tolerance = loaded.tolerances[cell.dtype]
    twin = loaded.twin(torch.float64)
    expected = loaded.reference(twin, x.double())
    expected = expected[0] if isinstance(expected, tuple | list) else expected
    if not isinstance(expected, Tensor) or expected.shape != y.shape:
        raise ValueError(f"the reference of {loaded.name} returned no tensor of shape {list(y.shape)}")
    expected = expected.double()
    # Per token, so that a few wrong tokens among many right ones count in full; the whole for the figure.
    difference = y.double() - expected
    error = float(difference.norm() / expected.norm().clamp_min(1e-300))
    worst = float((difference.norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-300)).max())
    passed = error <= tolerance and worst <= 10 * tolerance
    reason = None
    if not passed:
        figure = f"{error:.2g}" if not error <= tolerance else f"{worst:.2g} at its worst token"
        reason = f"differs from its reference by {figure} at {length} tokens (allowed: {tolerance:.2g})"
    return {
        "error": error if math.isfinite(error) else None,
        "tolerance": tolerance,
        "passed": passed,
        "reason": reason,
        "mixes_batch": mixes,
    }


def _short_call(
    loaded: LoadedBlock, cell: Cell, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """A quiet input of few tokens and the output: of an odd length, or of one that the block can do."""
    odd = short_length(loaded.options)
    # A block may want multiples of something, or no more than so many.
    lengths = [odd, *(n for n in (256, 64) if n < cell.length), *([cell.length] if cell.length <= MAX_SHORT else [])]
    refused: Exception | None = None
    for length in lengths:
        shape = (min(cell.batch_size, 2), length, cell.d_model)
        generator = torch.Generator("cpu").manual_seed(seed + 1)
        x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).mul_(QUIET).to(device, dtype)
        try:
            # A copy: a block may give its own buffer away, and write into it at the next call.
            return x, loaded.checked_call(x).clone()
        except (torch.OutOfMemoryError, WrongOutputError):
            raise
        except Exception as error:
            refused = refused or error
    raise refused


def _carries_on(loaded: LoadedBlock, x: Tensor, y: Tensor, cell: Cell) -> None:
    """A forward that keeps its state, or a step after one, gives the output `y` of the forward that keeps none."""
    if cell.mode == "prefill":
        (given, _), expected, what = loaded.prefill(x), y, "a forward that keeps its state"
    else:
        _, state = loaded.prefill(x[:, :-1])
        (given, _), expected, what = loaded.step(x[:, -1:], state), y[:, -1:], "a step"
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        raise _Wrong(f"{what} returned no tensor of shape {list(expected.shape)}")
    expected = expected.double()
    errors = (given.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-300)
    if not (worst := float(errors.max())) <= 10 * loaded.tolerances[cell.dtype]:
        raise _Wrong(f"{what} gives another output than its forward at {x.shape[1]} tokens, by {worst:.2g}")


def _keeps_nothing(loaded: LoadedBlock, x: Tensor, y: Tensor, dtype: str) -> None:
    """New values in the same tensor give a new output, and the old ones the old output again."""
    x.neg_()
    stale = torch.equal(loaded.checked_call(x), y)
    x.neg_()
    if stale:
        raise _Wrong("gives the same output when the values in its input tensor have changed: it keeps old results")
    if not _digest(loaded.checked_call(x)).close_to(_digest(y), loaded.tolerances[dtype]):
        raise _Wrong("gives another output for the same input after others came in between")


def _mixes_batch(loaded: LoadedBlock, x: Tensor, dtype: str) -> bool:
    """Whether a sequence changes what another one of its batch gives, as with nn.MultiheadAttention without
    batch_first, which attends over the batch. No error: experts of a fixed capacity do so too."""
    one, other = x[:1], x[:1].flip(1)
    try:
        first, second = (loaded.checked_call(torch.cat([one, each]))[:1].clone() for each in (other, other.neg()))
    except Exception:
        # It may take no batch of two.
        return False
    return _digest(second).difference(_digest(first)) > LEAK[dtype]


def _blind_to_later(loaded: LoadedBlock, x: Tensor, y: Tensor, position: int, dtype: str) -> None:
    changed = x.clone()
    changed[:, position:] = changed[:, position:].flip(1).neg()
    seen = _digest(loaded.checked_call(changed)).difference(_digest(y), until=position)
    if seen > LEAK[dtype]:
        raise _Wrong(f"claims to be causal, but tokens from {position} on change what comes before them")


# -- at the cell's own shape -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Digest:
    """What is kept of an output: its full copy would change which lengths fit.

    columns `[B, T, <= 16]`: some columns, in fp32 (fp64 of fp64). finite: whether the whole was.
    """

    columns: Tensor
    finite: bool

    def difference(self, other: _Digest, *, until: int | None = None) -> float:
        """Largest difference of a token, relative to the size of tokens as a whole, over the first `until` tokens."""
        if not (self.finite and other.finite):
            return math.inf
        mine, others = self.columns[:, :until], other.columns[:, :until]
        if mine.numel() == 0:
            return 0.0
        worst = 0.0
        for a, b in zip(mine.split(SLAB_TOKENS, 1), others.split(SLAB_TOKENS, 1), strict=True):
            worst = max(worst, float((a - b).norm(dim=-1).max()))
        # One number of size 1e-300 must not divide: an output of zeros is as good a scale as any.
        scale = float(others.norm()) / math.sqrt(max(1, others[..., 0].numel()))
        return worst / scale if scale > 0 else worst

    def close_to(self, other: _Digest, tolerance: float) -> bool:
        return self.difference(other) <= tolerance


def _digest(y: Tensor) -> _Digest:
    d = y.shape[-1]
    columns = torch.arange(min(COLUMNS, d), device=y.device) * d // min(COLUMNS, d)
    kind = wide_dtype(y.dtype)
    # Slab by slab: a mask of the whole output would be as large as the output. A sum is finite only if all of it is.
    finite = all(bool(part.sum(dim=-1, dtype=kind).isfinite().all()) for part in y.split(SLAB_TOKENS, dim=1))
    return _Digest(y.index_select(-1, columns).to(kind), finite)


def _check_at_shape(loaded: LoadedBlock, cell: Cell, seed: int, x: Tensor, found: dict[str, Any]) -> None:
    """Three calls, and a fourth where they are cheap. Fills in first_call_s, call_s and calls."""

    def digest() -> _Digest:
        _synchronize(x.device)
        start = time.perf_counter_ns()
        y = loaded.checked_call(x)
        _synchronize(x.device)
        found["call_s"] = (time.perf_counter_ns() - start) * 1e-9
        found["calls"] += 1
        if found["first_call_s"] is None:
            found["first_call_s"] = found["call_s"]
        return _digest(y)

    length = x.shape[1]
    given = _digest(x)
    first = digest()
    if not torch.equal(_digest(x).columns, given.columns):
        raise _Wrong("writes into its input tensor")
    del given
    if not first.finite:
        raise _Wrong(f"gives NaN or infinity at {length:,} tokens")
    again = digest()
    tolerance = loaded.tolerances[cell.dtype]
    if not again.close_to(first, tolerance):
        raise _Wrong("gives two outputs for one input in eval mode (dropout left on, or a state kept between calls?)")
    noise = again.difference(first)
    del again
    # One late token, in the middle of a chunk of any usual size, changed in place.
    late = min(length - 1, length * 3 // 4 + 5)
    token = x[:, late].clone()
    x[:, late] = token.flip(-1).neg()
    try:
        changed = digest()
        seen = changed.difference(first, until=late)
        answered = not torch.equal(changed.columns, first.columns)
    finally:
        x[:, late] = token
    if loaded.causal and seen > max(LEAK[cell.dtype], 4 * noise):
        raise _Wrong(f"claims to be causal, but token {late:,} changes what comes before it")
    if not answered:
        raise _Wrong(f"gives the same output when token {late:,} of its input tensor has changed: it keeps old results")
    del changed
    if found["call_s"] < SLOW_S and not digest().close_to(first, tolerance):
        raise _Wrong("gives another output for the same input after another came in between")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
