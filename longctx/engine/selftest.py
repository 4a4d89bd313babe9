"""Are the blocks and the instruments right on this machine? The heavy half of `longctx test`.

Run as `python -m longctx.engine.selftest`, it takes parts by name (`block:BLADE`, `timer`, `memory`) and writes one
JSON line a check to the descriptor that it is given; the command draws them. Shapes: B batch, T length, D d_model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from longctx.config import BlockRequest, Cell
from longctx.errors import LongctxError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from longctx.engine.loading import LoadedBlock

D_MODEL, N_HEADS = 64, 4
LENGTH = 1061
"""Two chunks or windows of 512 and an odd rest."""
GRADIENT_LENGTH = 549
"""One chunk or window and an odd rest: references that loop over tokens are slow to differentiate."""
SPLITS = (1, 510, 519, 31)
STEPS = 24
GRADIENT_TOLERANCES = {"fp64": 1e-7, "fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
DELAYS_S = (0.050, 0.100, 0.200, 0.400)
TIMER_LIMIT = 0.01
ALLOCATIONS_MIB = ((1, 16), (1, 256), (12, 5))
"""So many blocks of so many MiB, held together."""
MEMORY_LIMIT_MIB = 2.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table: a figure and its limit, in `unit`; note says what a number cannot."""

    part: str
    name: str
    passed: bool
    figure: float | None = None
    limit: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _TimerPlan:
    """Five samples, exactly."""

    warmup_runs: int = 1
    runs: int = 5
    exact: bool = True
    budget_s: float = 3.0


def run_part(part: str, *, device: torch.device, dtype: str) -> Iterator[Check]:
    """The checks of one part, as they finish. A part that raises ends in a failed check with the error as its note."""
    kind, _, name = part.partition(":")
    try:
        if kind == "block":
            yield from check_block(name, device=device, dtype=dtype)
        elif kind == "timer":
            yield from check_timer(device)
        else:
            yield from check_memory(device)
    except Exception as error:
        lines = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        yield Check(part=part, name="runs", passed=False, note=note)


def check_block(text: str, *, device: torch.device, dtype: str) -> Iterator[Check]:
    """Forward, gradients, causality, streaming and step of a block against its reference in fp64.

    text: a block as `--blocks` takes it. A user's block without a reference is held against itself in fp64, and to
    streaming and steps only as far as it has them.
    """
    import torch

    from longctx.engine.device import DTYPES
    from longctx.engine.flags import global_state
    from longctx.engine.loading import load_block

    request = BlockRequest.parse(text)
    cell = Cell(block=request, length=LENGTH, dtype=dtype, d_model=D_MODEL, n_heads=N_HEADS)

    def check(name: str, figure: float, limit: float, note: str = "") -> Check:
        return Check(part=f"block:{text}", name=name, passed=figure <= limit, figure=figure, limit=limit, note=note)

    with global_state():
        block = load_block(request, cell, device, DTYPES[dtype], 0)
        oracle = block.twin(torch.float64)
        limit = block.tolerances[dtype]
        # Small, so that the residual, which is right for free, does not hide an error of the mixer.
        x = 0.1 * torch.randn(1, LENGTH, D_MODEL, device=device, dtype=DTYPES[dtype])
        with torch.no_grad():
            want = _oracle_output(block, oracle, x.double())
            y = block.checked_call(x)
            note = block.path or ""
            yield check("forward", _error(y, want), limit, note if block.reference else "against itself in fp64")
        figure = _gradient_error(block, oracle, x[:, :GRADIENT_LENGTH])
        yield check("gradients", figure, GRADIENT_TOLERANCES[dtype])
        if not block.causal:
            return
        with torch.no_grad():
            cut = LENGTH // 2
            changed = x.clone()
            changed[:, cut:] = 0.1 * torch.randn_like(changed[:, cut:])
            # The same kernels at the same shape: any difference is a leak, so the limit is far below rounding.
            leak = _error(block.call(changed)[:, :cut], y[:, :cut].double())
            yield check("causality", leak, limit / 10)
            if not request.is_user:
                yield check("streaming", _error(_streamed(block, x), want), limit)
            if "decode" in block.modes:
                yield check("step", _error(_stepped(block, x), want), limit)


def _error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite where `got` is not finite, so that it fails every limit."""
    error = (got.double() - want).norm() / want.norm()
    return float(error) if error.isfinite() else float("inf")


def _oracle_output(block: LoadedBlock, oracle: nn.Module, x: Tensor) -> Tensor:
    y = block.reference(oracle, x) if block.reference else oracle(x)
    return y[0] if isinstance(y, tuple | list) else y


def _gradient_error(block: LoadedBlock, oracle: nn.Module, x: Tensor) -> float:
    """The error of the gradients of input and parameters, all in one vector, against those of the reference."""
    import torch

    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = block.call(leaf), _oracle_output(block, oracle, exact_leaf)
    direction = torch.randn_like(want)
    pairs = ((y.double(), [leaf, *block.module.parameters()]), (want, [exact_leaf, *oracle.parameters()]))
    flat = []
    for output, inputs in pairs:
        grads = torch.autograd.grad((output * direction).sum(), inputs, materialize_grads=True)
        flat.append(torch.cat([grad.double().flatten() for grad in grads]))
    return _error(*flat)


def _streamed(block: LoadedBlock, x: Tensor) -> Tensor:
    """The outputs of the sequence given in pieces, the state carried from one to the next."""
    import torch

    outputs, state = [], None
    for piece in x.split(SPLITS, dim=1):
        y, state = block.module(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def _stepped(block: LoadedBlock, x: Tensor) -> Tensor:
    """The outputs of the first tokens at once and of the last STEPS tokens one by one."""
    import torch

    y, state = block.prefill(x[:, :-STEPS])
    outputs = [y]
    for token in x[:, -STEPS:].split(1, dim=1):
        y, state = block.step(token, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def check_timer(device: torch.device) -> Iterator[Check]:
    """What the timer reads of known delays, sleeps on a CPU, a kernel that counts clock cycles on a GPU; and of a chip
    that says it is slowed down all the time."""
    from longctx.engine.timing import time_call

    for delay_s in DELAYS_S:
        if device.type == "cuda":
            known_s, wait = _gpu_delay(delay_s, device)
            read_s = time_call(wait, device=device, plan=_TimerPlan()).median
        else:
            slept: list[float] = []
            timing = time_call(partial(_sleep, delay_s, slept), device=device, plan=_TimerPlan())
            read_s, known_s = timing.median, statistics.median(slept[-len(timing.samples) :])
        error = abs(read_s / known_s - 1)
        note = f"read {read_s * 1e3:.2f} ms of {known_s * 1e3:.2f} ms"
        name = f"delay of {delay_s * 1e3:.0f} ms"
        passed = error <= TIMER_LIMIT
        yield Check(
            part="timer", name=name, passed=passed, figure=100 * error, limit=100 * TIMER_LIMIT, unit="%", note=note
        )
    yield _check_throttled(device)


def _check_throttled(device: torch.device) -> Check:
    """A chip that never cools down: the wait for it must end, and the number must be there and marked."""
    from unittest import mock

    from longctx.engine import timing

    paused: list[float] = []
    hot = mock.patch.object(timing, "nvml_snapshot", lambda device: {"throttled": True})
    pause = mock.patch.object(timing, "cool_down", paused.append)
    with hot, pause:
        read = timing.time_call(partial(time.sleep, 0.001), device=device, plan=_TimerPlan())
    note = f"{len(read.samples)} samples, {', '.join(read.warnings)}, after {sum(paused):g} s of waiting"
    passed = bool(read.samples) and "throttled" in read.warnings and 0 < sum(paused) <= 10
    return Check(part="timer", name="throttling is marked", passed=passed, note=note)


def _sleep(delay_s: float, slept: list[float]) -> None:
    """Sleep, and note how long it was by a clock of its own: on a busy machine nobody is woken on time."""
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    time.sleep(delay_s)
    slept.append((time.clock_gettime_ns(time.CLOCK_MONOTONIC) - start) * 1e-9)


def _gpu_delay(delay_s: float, device: torch.device) -> tuple[float, Callable[[], None]]:
    """(seconds, a call that keeps the GPU busy so long), set by the host's clock: the GPU's own clock rate moves."""
    import torch

    def seconds(cycles: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.cuda.device(device):
        cycles = 100_000_000
        for _ in range(3):
            cycles = int(cycles * delay_s / seconds(cycles))
        known_s = sorted(seconds(cycles) for _ in range(5))[2]
    return known_s, lambda: torch.cuda._sleep(cycles)


def check_memory(device: torch.device) -> Iterator[Check]:
    """What the memory reading sees of an allocation of known size, made during a call and freed with it."""
    import torch

    from longctx.engine.memory import measure_memory

    held = torch.ones(1, device=device)

    def call(count: int, mebibytes: int) -> torch.Tensor:
        # Every page is written: memory that is never touched does not exist.
        blocks = [torch.ones(mebibytes << 20, dtype=torch.uint8, device=device) for _ in range(count)]
        return blocks[0][:1].clone()

    for count, mebibytes in ALLOCATIONS_MIB:
        expected = count * mebibytes
        name = f"allocation of {expected} MiB" if count == 1 else f"{count} allocations of {mebibytes} MiB"
        module = torch.nn.Identity()
        reading = measure_memory(partial(call, count, mebibytes), device=device, module=module, inputs=[held])
        if reading.peak_bytes is None:
            yield Check(part="memory", name=name, passed=False, note=reading.reason or "no reading")
            continue
        peak = reading.peak_bytes / 2**20
        error = abs(peak - expected)
        yield Check(
            part="memory",
            name=name,
            passed=error <= MEMORY_LIMIT_MIB,
            figure=error,
            limit=MEMORY_LIMIT_MIB,
            unit="MiB",
            note=f"read {peak:.2f} MiB of {expected} MiB",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts named on the command line and write their checks, a JSON object a line, to --pipe."""
    parser = argparse.ArgumentParser(prog="longctx.engine.selftest")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args(arguments)
    with os.fdopen(options.pipe, "w", encoding="utf-8") as pipe:

        def tell(**event: Any) -> None:
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()

        from longctx.engine.device import resolve_device, resolve_dtype
        from longctx.engine.flags import pinned_flags

        try:
            device = resolve_device(options.device)
            dtype, _ = resolve_dtype(options.dtype, device)
        except LongctxError as error:
            tell(event="error", message=error.message, hint=error.hint, exit_code=error.exit_code)
            return
        pinned_flags({})
        tell(event="ready", device=str(device), dtype=dtype)
        for part in options.parts:
            tell(event="part", part=part)
            for check in run_part(part, device=device, dtype=dtype):
                tell(event="check", **asdict(check))
        tell(event="done")


if __name__ == "__main__":
    main()
