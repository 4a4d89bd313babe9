"""How fast a training really runs: tokens, step time, model FLOP utilisation, memory, waiting for data.

Letters: B batch, T sequence length.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from longctx.errors import UsageError
from longctx.training.callback import BenchmarkCallback
from longctx.training.calls import tensors_in
from longctx.training.packages import Callback

SHOWN = {"tokens_per_s": "tok/s", "mfu": "mfu"}
"""Figures that stand in the progress bar, and their names there."""


@dataclass(kw_only=True)
class Throughput:
    """What a window of optimizer steps showed. None where this machine or module does not tell."""

    step: int
    """Optimizer steps made when the window ended."""
    steps: int
    step_time_s: float
    """Seconds an optimizer step, all batches that it accumulates, data and callbacks included."""
    tokens_per_s: float
    """Over all processes."""
    data_share: float
    """Share of the time for which the host waited for the next batch."""
    flops_per_s: float | None = None
    """FLOPs that the model needs, not those of recomputation, a second and process."""
    mfu: float | None = None
    memory_bytes: int | None = None
    """CUDA: highest level of the allocator since training began. CPU: resident bytes of this process now."""


@dataclass(kw_only=True)
class _Mark:
    """A moment between two steps, and the sums up to it."""

    time_s: float
    event: Any
    step: int
    tokens: int
    flops: float | None
    waited_s: float
    outside_s: float


class ThroughputCallback(Callback):
    """Measures the real training steps, every `every_n_steps` optimizer steps (default: as often as the trainer logs).

    The device is never waited for: on CUDA the ends of a window are events, read once they have passed, so a figure
    appears a few batches after its window. Validation, checkpoints made meanwhile and the time of a BenchmarkCallback
    are left out. peak_flops: what the device can do at most, FLOPs a second; by default the data sheet's figure of an
    NVIDIA GPU, and None elsewhere, where there is no utilisation. tokens_of(batch) -> int and flops_of(batch) -> float
    replace the count of the first integer tensor's elements, and the module's own `training_flops(B, T)` (else 6 FLOPs
    a parameter and token).
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        peak_flops: float | None = None,
        tokens_of: Callable[[Any], int] | None = None,
        flops_of: Callable[[Any], float] | None = None,
        progress_bar: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise UsageError(f"every_n_steps must be a whole number of at least 1, not {every_n_steps!r}")
        self.every_n_steps, self.peak_flops, self.progress_bar = every_n_steps, peak_flops, progress_bar
        self.tokens_of, self.flops_of = tokens_of or tokens_in, flops_of
        self.history: list[Throughput] = []
        self._marks: deque[_Mark] = deque()
        self._tokens, self._flops = 0, 0.0
        self._waited_s, self._outside_s = 0.0, 0.0
        self._paused_at: float | None = None
        self._batch_ended: tuple[float, float] | None = None

    # -- the trainer's hooks --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.peak_flops is None:
            self.peak_flops = _data_sheet_flops(trainer)
        self._marks.clear()
        self._batch_ended = None
        self._marks.append(self._mark(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._batch_ended is not None:
            # What lies between two batches and is neither validation nor benchmark is the wait for data.
            ended, outside = self._batch_ended
            gap = time.perf_counter() - ended - (self._outside(trainer) - outside)
            self._waited_s += max(0.0, gap)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += self.tokens_of(batch)
        flops = self.flops_of(batch) if self.flops_of else _flops_of(pl_module, batch, self.tokens_of)
        self._flops += flops or 0.0
        every = self.every_n_steps or max(1, trainer.log_every_n_steps)
        if trainer.global_step - self._marks[-1].step >= every:
            self._marks.append(self._mark(trainer))
        self._read(trainer, pl_module)
        self._batch_ended = time.perf_counter(), self._outside(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._paused_at is not None:
            self._outside_s += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        if self._marks and trainer.global_step > self._marks[-1].step:
            self._marks.append(self._mark(trainer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The bar is gone and the module may log no more: the loggers still hear of the last window.
        self._read(trainer, None)

    # -- figures --------------------------------------------------------------------------------------------------

    def _mark(self, trainer: Any) -> _Mark:
        event = None
        if trainer.strategy.root_device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(trainer.strategy.root_device))
        return _Mark(
            time_s=time.perf_counter(),
            event=event,
            step=trainer.global_step,
            tokens=self._tokens,
            flops=self._flops,
            waited_s=self._waited_s,
            outside_s=self._outside(trainer),
        )

    def _read(self, trainer: Any, pl_module: Any) -> None:
        """Figures of all windows whose end the device has reached."""
        while len(self._marks) > 1:
            first, last = self._marks[0], self._marks[1]
            if last.event is not None and not last.event.query():
                return
            self._marks.popleft()
            figures = self._figures(trainer, first, last)
            if figures is not None:
                self.history.append(figures)
                self._tell(trainer, pl_module, figures)

    def _figures(self, trainer: Any, first: _Mark, last: _Mark) -> Throughput | None:
        elapsed = last.time_s - first.time_s
        if last.event is not None:
            elapsed = first.event.elapsed_time(last.event) * 1e-3
        # Validation and benchmarks end in a synchronisation, so the host's time of them is the device's.
        elapsed -= last.outside_s - first.outside_s
        steps = last.step - first.step
        if elapsed <= 0 or steps < 1:
            return None
        flops = (last.flops - first.flops) / elapsed if last.flops > first.flops else None
        return Throughput(
            step=last.step,
            steps=steps,
            step_time_s=elapsed / steps,
            tokens_per_s=(last.tokens - first.tokens) * trainer.world_size / elapsed,
            data_share=min(1.0, max(0.0, (last.waited_s - first.waited_s) / elapsed)),
            flops_per_s=flops,
            mfu=flops / self.peak_flops if flops and self.peak_flops else None,
            memory_bytes=self._memory_bytes(trainer),
        )

    def _tell(self, trainer: Any, pl_module: Any, figures: Throughput) -> None:
        values = {
            name: float(value)
            for name, value in vars(figures).items()
            if value is not None and name not in ("step", "steps")
        }
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, step=figures.step)
        if self.progress_bar and pl_module is not None:
            for name, shown in SHOWN.items():
                if name in values:
                    # A plain number would be copied to the GPU, and the host would wait for that.
                    value = torch.tensor(values[name], device="cpu")
                    pl_module.log(shown, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _outside(self, trainer: Any) -> float:
        """Seconds so far that were no training: validation, and benchmarks of the callback beside this one."""
        others = (each.seconds for each in trainer.callbacks if isinstance(each, BenchmarkCallback))
        return self._outside_s + sum(others)

    def _memory_bytes(self, trainer: Any) -> int:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return psutil.Process().memory_info().rss
        kept = [each.peak_allocated_bytes for each in trainer.callbacks if isinstance(each, BenchmarkCallback)]
        return max(torch.cuda.max_memory_allocated(device), *kept, 0)


def tokens_in(batch: Any) -> int:
    """Tokens of a batch: B * T of its first integer tensor, B * T of its first tensor of floats `[B, T, ...]`.

    Batches of our own data hold one token more a sequence, the last target: it is not counted.
    """
    tensors = list(tensors_in(batch))
    integers = [t for t in tensors if t.dim() >= 2 and not t.is_floating_point()]
    for tensor in [*integers, *tensors]:
        if tensor is batch and not tensor.is_floating_point() and tensor.dim() == 2:
            return tensor.shape[0] * max(1, tensor.shape[1] - 1)
        if tensor.dim() >= 1:
            return tensor.shape[0] * (tensor.shape[1] if tensor.dim() >= 2 else 1)
    return 0


def _flops_of(module: Any, batch: Any, tokens_of: Callable[[Any], int]) -> float | None:
    own = getattr(module, "training_flops", None)
    tokens = tokens_of(batch)
    if callable(own):
        sequences = next((t.shape[0] for t in tensors_in(batch) if t.dim() >= 1), 1)
        if (flops := own(sequences, max(1, tokens // sequences))) is not None:
            return flops
    return 6.0 * tokens * sum(p.numel() for p in module.parameters() if p.requires_grad)


def _data_sheet_flops(trainer: Any) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    from lightning.fabric.utilities.throughput import get_available_flops

    precision = str(trainer.precision)
    half = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = next((kind for name, kind in half.items() if precision.startswith(name)), torch.float32)
    return get_available_flops(device, dtype)
