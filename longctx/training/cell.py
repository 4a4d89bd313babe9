"""A cell of a sweep as Lightning runs it: the training step of `Trainer.fit`, beside the same step in a bare loop.

Letters: B batch, T sequence length.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from longctx.config import Cell
from longctx.engine.device import DTYPES
from longctx.engine.flags import global_state, pinned_flags
from longctx.engine.measure import fault_of
from longctx.training.data import SyntheticTextDataModule
from longctx.training.model import LongContextLM

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true", "fp16": "16-true", "fp64": "64-true"}
WARMUP_STEPS, STEPS = 5, 20
VOCABULARY = 256


def run_lightning_cell(
    cell: Cell | Mapping[str, Any],
    *,
    device: str = "cpu",
    config: Mapping[str, Any] | None = None,
    warmup_steps: int = WARMUP_STEPS,
    steps: int = STEPS,
    vocab_size: int = VOCABULARY,
    seed: int = 0,
    trainer_kwargs: Mapping[str, Any] | None = None,
    emit: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a `LongContextLM` of `cell.layers` blocks on batches `[B, T + 1]` of synthetic text, and time its steps.

    cell: a Cell, or its `to_json()`; its mode is not looked at, a training step is measured. device: `cpu` or
    `cuda:N`. config: `BenchmarkConfig.to_json()`, whose flags are pinned; None leaves them as they are. emit gets
    {"event": "phase", "phase": build | bare | lightning} and {"event": "sample", "seconds", "count"}.

    Half of the bare steps come before `Trainer.fit` and half after, all with the same model, optimizer and batches: the
    difference is Lightning's own cost. Returns plain data, None where a number does not exist:

        status, error                    as a sweep's rows have them: ok, oom, unsupported, failed
        samples                          seconds of each training step as Lightning runs it, data included
        step_time_median_s, tokens_per_s
        bare_samples, bare_step_time_median_s
        overhead_s, overhead_share       what Lightning adds to a step, and its share of Lightning's step
        first_loss, last_loss            nats a token, of the first and last step of `Trainer.fit`
        data_share                       share of the time for which the host waited for the next batch
        flops, tflops                    of a step, head included; FLOPs a second over the median
        peak_memory_mb                   CUDA: the allocator's highest level in a step, above the level before training
        parameters, precision, lightning, path
    """
    cell = cell if isinstance(cell, Cell) else Cell.from_json(cell)
    emit = emit or (lambda event: None)
    numbers = ("step_time_median_s", "tokens_per_s", "bare_step_time_median_s", "overhead_s", "overhead_share")
    numbers += ("first_loss", "last_loss", "data_share", "flops", "tflops", "peak_memory_mb", "parameters", "path")
    found: dict[str, Any] = {"status": "ok", "error": None, "samples": [], "bare_samples": []}
    found |= dict.fromkeys(numbers)
    found |= {"precision": PRECISIONS[cell.dtype], "lightning": lightning.__version__}
    with global_state(), torch.enable_grad(), _silence():
        try:
            if config is not None:
                pinned_flags(config)
            _run(cell, torch.device(device), warmup_steps, steps, vocab_size, seed, trainer_kwargs or {}, emit, found)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found |= {name: value for name, value in fault_of(error).items() if name != "samples_round"}
            found |= {"samples": [], "bare_samples": []}
    gc.collect()
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return found


def _run(
    cell: Cell,
    device: torch.device,
    warmup_steps: int,
    steps: int,
    vocab_size: int,
    seed: int,
    trainer_kwargs: Mapping[str, Any],
    emit: Callable[[dict[str, Any]], None],
    found: dict[str, Any],
) -> None:
    emit({"event": "phase", "phase": "build"})
    torch.manual_seed(seed)
    model = LongContextLM(
        str(cell.block),
        vocab_size=vocab_size,
        d_model=cell.d_model,
        n_layers=cell.layers,
        n_heads=cell.n_heads,
        num_kv_heads=cell.num_kv_heads,
    )
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["flops"] = model.training_flops(cell.batch_size, cell.length)
    bare, half = _Bare(cell, device, vocab_size, seed), -(-steps // 2)
    emit({"event": "phase", "phase": "bare"})
    samples = bare.run(model, warmup_steps, half)

    emit({"event": "phase", "phase": "lightning"})
    # Lightning places and formats the module itself, so it is given the one that a user would give.
    clock = _StepClock(device, warmup_steps, emit)
    data = SyntheticTextDataModule(**_data(cell, vocab_size, seed, warmup_steps + steps + 1))
    trainer = lightning.Trainer(
        **{
            "max_steps": warmup_steps + steps + 1,
            "max_epochs": -1,
            "accelerator": "gpu" if device.type == "cuda" else "cpu",
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "precision": PRECISIONS[cell.dtype],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "benchmark": torch.backends.cudnn.benchmark,
            **trainer_kwargs,
            "callbacks": [*(trainer_kwargs.get("callbacks") or []), clock],
        }
    )
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    trainer.fit(model, datamodule=data)
    found["samples"], found["data_share"] = clock.read(), clock.data_share
    found["first_loss"], found["last_loss"] = (float(clock.losses[i]) for i in (0, -1))
    if device.type == "cuda":
        found["peak_memory_mb"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    found["path"] = getattr(model.blocks[0], "path", None)

    emit({"event": "phase", "phase": "bare"})
    found["bare_samples"] = samples + bare.run(model, warmup_steps, steps - half)
    found["step_time_median_s"] = step_s = statistics.median(found["samples"])
    found["bare_step_time_median_s"] = bare_s = statistics.median(found["bare_samples"])
    # Noise can make the bare loop the slower one; that is shown, not hidden.
    found |= {"overhead_s": step_s - bare_s, "overhead_share": (step_s - bare_s) / step_s}
    found["tokens_per_s"] = cell.batch_size * cell.length / step_s
    if found["flops"]:
        found["tflops"] = found["flops"] / step_s / 1e12


class _Bare:
    """The same training step in a plain loop: data, move, loss, backward, AdamW."""

    def __init__(self, cell: Cell, device: torch.device, vocab_size: int, seed: int) -> None:
        self.cell, self.device, self.vocab_size, self.seed = cell, device, vocab_size, seed

    def run(self, model: LongContextLM, warmup_steps: int, steps: int) -> list[float]:
        """Seconds of each step. The weights of `model` are put back afterwards."""
        if steps < 1:
            return []
        kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        format_before = model.embedding.weight.dtype
        model.to(device=self.device, dtype=DTYPES[self.cell.dtype]).train()
        optimizer = model.configure_optimizers()
        count = warmup_steps + steps + 1
        loader = SyntheticTextDataModule(**_data(self.cell, self.vocab_size, self.seed, count)).train_dataloader()
        stamps = _Stamps(self.device)
        for batch in loader:
            stamps.take()
            optimizer.zero_grad()
            model.loss(batch.to(self.device)).backward()
            optimizer.step()
        samples = stamps.read()[warmup_steps:]
        optimizer.zero_grad()
        model.to(device="cpu", dtype=format_before).load_state_dict(kept)
        return samples


class _Stamps:
    """Moments between steps: the clock on a CPU, events of the stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, []

    def take(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds from each moment to the next."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [first.elapsed_time(last) * 1e-3 for first, last in pairs]
        return [last - first for first, last in pairs]


class _StepClock(lightning.Callback):
    """A moment at the start of every batch: from one to the next is a whole step of Lightning's loop."""

    def __init__(self, device: torch.device, warmup_steps: int, emit: Callable[[dict[str, Any]], None]) -> None:
        self.stamps, self.warmup_steps, self.emit = _Stamps(device), warmup_steps, emit
        self.losses: list[Tensor] = []
        self.waited_s, self.elapsed_s = 0.0, 0.0
        self.began = self.ended = self.last = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.stamps.take()
        if batch_idx <= self.warmup_steps:
            self.began = now
        else:
            self.waited_s += now - self.ended
            self.elapsed_s = now - self.began
            # On CUDA the host is ahead of the device: then this is a sign of life, not a sample.
            self.emit({"event": "sample", "seconds": now - self.last, "count": batch_idx - self.warmup_steps})
        self.last = now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.ended = time.perf_counter()

    @property
    def data_share(self) -> float | None:
        return self.waited_s / self.elapsed_s if self.elapsed_s else None

    def read(self) -> list[float]:
        return self.stamps.read()[self.warmup_steps :]


def _data(cell: Cell, vocab_size: int, seed: int, batches: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "sequence_length": cell.length,
        "batch_size": cell.batch_size,
        "train_sequences": batches * cell.batch_size,
        "val_sequences": 0,
        "seed": seed,
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Lightning tells on stderr what it finds and what it would advise; a measurement is no place for either."""
    # Where both packages are loaded either may be the one that speaks.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
