"""A cell of `sweep --lightning-mode`: the training step of `Trainer.fit`, beside the same step in a plain loop.

Letters: B batch, T sequence length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longctx.config import Cell
from longctx.engine.device import DTYPES
from longctx.engine.flags import global_state, pinned_flags
from longctx.engine.machine import contention_sample
from longctx.engine.measure import Plan, fault_of, measure_cell
from longctx.engine.memory import (
    Resting,
    cpu_level_bytes,
    cpu_peak_above,
    requested_bytes,
    resting,
    tensor_bytes,
    why_no_cpu_peak,
)
from longctx.training.data import SyntheticText
from longctx.training.model import LongContextLM

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true", "fp16": "16-true", "fp64": "64-true"}
VOCABULARY = 256
MOST_STEPS = 200
DISTINCT, DISTINCT_BYTES = 8, 64 << 20
"""Batches are made beforehand, at most so many, and taken again and again: making text is no part of a step."""


def run_lightning_cell(
    cell: Cell | Mapping[str, Any],
    plan: Plan | None = None,
    *,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
    gate_cache: dict[Any, dict[str, Any]] | None = None,
    emit: Callable[[dict[str, Any]], None] | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a `LongContextLM` of `cell.layers` blocks on batches `[B, T + 1]` of synthetic text, and time its steps.

    As `engine.measure.measure_cell`, with the same arguments and answer, for a cell of mode lightning. cell: a Cell, or
    its `to_json()`. config: `BenchmarkConfig.to_json()`, whose flags are pinned; None leaves them as they are. The
    blocks pass the gate first. Half of the bare steps come before `Trainer.fit` and half after, all with the same
    model, optimizer and batches: what is left between them is Lightning's own cost. The answer holds, besides:

        samples_round        seconds of each training step as Lightning runs it, waiting for data included
        bare_samples_round   the same in the plain loop
        lightning            first_loss, last_loss (nats a token, None where not finite), data_share (of the time,
                             waiting for the next batch), parameters, precision, version
        peak_memory_mb       highest level in a step above the level just before it: weights and the optimizer's state
                             are no part of it, the gradients of the step before are freed in it
    """
    cell = cell if isinstance(cell, Cell) else Cell.from_json(cell)
    plan, device, emit = plan or Plan(gate=False), torch.device(device), emit or (lambda event: None)
    plain = dataclasses.replace(cell, mode="train", layers=1)
    only_gate = dataclasses.replace(plan, timing=False, memory=False, energy=False)
    pinned = pinned_flags if config is not None else (lambda config: None)
    with global_state():
        pinned(config)
        # Known of a block before it is trained: is it right, what is it made of?
        cache = {} if gate_cache is None else gate_cache
        checked = measure_cell(
            plain, only_gate, device=device, config=config or _flags_now(), gate_cache=cache, emit=emit
        )
    found = checked | {"bare_samples_round": [], "lightning": None, "flops": None, "bytes": None, "state_bytes": None}
    if found["status"] != "ok":
        return found
    with global_state(), torch.enable_grad(), _silence():
        try:
            pinned(config)
            _Training(cell, plan, device, emit, dict(trainer_kwargs or {})).run(found)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found |= fault_of(error) | {"bare_samples_round": [], "lightning": None}
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return found


def _forget_workspaces(device: torch.device) -> None:
    """Let go of cuBLAS's workspaces, as Lightning does when it begins: what rests on the GPU is read before."""
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device.type == "cuda" and forget is not None:
        forget()


def _flags_now() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    flags = {"cudnn_benchmark": cudnn.benchmark, "cudnn_deterministic": cudnn.deterministic}
    return flags | {"threads": torch.get_num_threads()}


class _Training:
    """One cell: its model, its batches, both loops."""

    def __init__(
        self,
        cell: Cell,
        plan: Plan,
        device: torch.device,
        emit: Callable[[dict[str, Any]], None],
        trainer_kwargs: dict[str, Any],
    ) -> None:
        self.cell, self.plan, self.device, self.emit, self.trainer_kwargs = cell, plan, device, emit, trainer_kwargs
        # The first step makes the optimizer's state, so it is never a sample.
        self.warmup = max(1, plan.warmup_runs)
        self.batches = _batches(cell, plan.seed)

    def run(self, found: dict[str, Any]) -> None:
        self.emit({"event": "phase", "phase": "build"})
        _forget_workspaces(self.device)
        floor = resting(self.device) if self.plan.memory else Resting()
        torch.manual_seed(self.plan.seed)
        model = LongContextLM(
            str(self.cell.block),
            vocab_size=VOCABULARY,
            d_model=self.cell.d_model,
            n_layers=self.cell.layers,
            n_heads=self.cell.n_heads,
            num_kv_heads=self.cell.num_kv_heads,
        )
        found["flops"] = model.training_flops(self.cell.batch_size, self.cell.length)
        bare: list[float] = []
        if self.plan.timing:
            bare = self._bare(model, None)
        clock = self._fit(model, steps=2 * len(bare), floor=floor)
        found["path"] = getattr(model.blocks[0], "path", None)
        if self.plan.memory:
            found |= clock.memory
        if not self.plan.timing:
            return
        bare += self._bare(model, len(bare))
        found["samples_round"], found["bare_samples_round"] = clock.read(), bare
        found["contention"] = clock.contention
        if clock.contention["contended"] and self.device.type == "cpu":
            found["warnings"] = [*found["warnings"], "contended"]
        found["lightning"] = {
            "first_loss": _finite(clock.losses[0]),
            "last_loss": _finite(clock.losses[-1]),
            "data_share": clock.data_share,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "precision": PRECISIONS[self.cell.dtype],
            "version": lightning.__version__,
        }

    def _fit(self, model: LongContextLM, *, steps: int, floor: Resting) -> _StepClock:
        """The steps as Lightning runs them. One more than asked for, since a step ends where the next begins."""
        self.emit({"event": "phase", "phase": "lightning"})
        clock = _StepClock(self, steps, floor)
        on_gpu = self.device.type == "cuda"
        defaults = {
            "max_steps": self.warmup + steps + 1,
            "max_epochs": -1,
            "accelerator": "gpu" if on_gpu else "cpu",
            "devices": [self.device.index or 0] if on_gpu else 1,
            "precision": PRECISIONS[self.cell.dtype],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "benchmark": torch.backends.cudnn.benchmark,
            # Whatever launched the command (SLURM, torchrun), this is one process.
            "plugins": [LightningEnvironment()],
        }
        callbacks = [*(self.trainer_kwargs.get("callbacks") or []), clock]
        trainer = lightning.Trainer(**{**defaults, **self.trainer_kwargs, "callbacks": callbacks})
        try:
            # Lightning places and formats the module itself, so it is given the one that a user would give.
            trainer.fit(model, train_dataloaders=self.loader())
        except SystemExit as error:
            # What Lightning makes of Ctrl-C.
            raise KeyboardInterrupt from error if clock.interrupted else None
        return clock

    def _bare(self, model: LongContextLM, steps: int | None) -> list[float]:
        """Seconds of each of `steps` plain training steps. None: half of what the plan asks for.

        The weights of `model` are put back afterwards.
        """
        self.emit({"event": "phase", "phase": "bare"})
        kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        format_before = model.embedding.weight.dtype
        model.to(device=self.device, dtype=DTYPES[self.cell.dtype]).train()
        optimizer, batches, stamps = model.configure_optimizers(), iter(self.loader()), _Stamps(self.device)

        def step() -> None:
            batch = next(batches).to(self.device, non_blocking=True)
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()

        for _ in range(self.warmup):
            self._wait()
            began = time.perf_counter()
            step()
            self._wait()
            step_s = time.perf_counter() - began
        for _ in range(self._half(step_s) if steps is None else steps):
            stamps.take()
            step()
        stamps.take()
        samples = stamps.read()
        optimizer.zero_grad()
        model.to(device="cpu", dtype=format_before).load_state_dict(kept)
        return samples

    def _half(self, step_s: float) -> int:
        """Half the steps of a round: the plan's number, or more until its seconds are spent."""
        count = self.plan.runs
        if not self.plan.exact:
            count = max(count, min(MOST_STEPS, int(self.plan.budget_s / max(step_s, 1e-9))))
        return -(-count // 2)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def loader(self) -> DataLoader:
        """Batches `[B, T + 1]` without end."""
        return DataLoader(self.batches, batch_size=None)


class _StepClock(lightning.Callback):
    """A moment at the start of every batch: from one to the next is a whole step of Lightning's loop.

    The last step is no sample, and its memory is read.
    """

    def __init__(self, training: _Training, steps: int, floor: Resting) -> None:
        self.device, self.plan, self.emit = training.device, training.plan, training.emit
        self.warmup, self.last_batch, self.floor = training.warmup, training.warmup + steps, floor
        self.stamps = _Stamps(self.device)
        self.losses: list[Tensor] = []
        self.memory: dict[str, Any] = {}
        self.contention: dict[str, Any] = {"contended": None}
        self.waited_s, self.elapsed_s = 0.0, 0.0
        self.began = self.ended = self.latest = 0.0
        self.level: int | None = None
        self.interrupted = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.stamps.take()
        if batch_idx <= self.warmup:
            self.began, self.host = now, contention_sample()
        else:
            self.waited_s += now - self.ended
            self.elapsed_s = now - self.began
            # On CUDA the host is ahead of the device: then this is a sign of life, not a sample.
            self.emit({"event": "sample", "seconds": now - self.latest, "count": batch_idx - self.warmup})
        self.latest = now
        if batch_idx == self.last_batch:
            threads = torch.get_num_threads() if self.device.type == "cpu" else 1
            self.contention = self.host.until(contention_sample(), threads=threads)
            if self.plan.memory:
                self.emit({"event": "phase", "phase": "memory"})
                self._level()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        if batch_idx == self.last_batch and self.plan.memory:
            self._read_memory(trainer, pl_module, batch)
        self.ended = time.perf_counter()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)

    @property
    def data_share(self) -> float | None:
        return self.waited_s / self.elapsed_s if self.elapsed_s else None

    def read(self) -> list[float]:
        return self.stamps.read()[self.warmup :]

    def _level(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.level = requested_bytes(self.device, "current")
        elif why_no_cpu_peak() is None:
            self.level = cpu_level_bytes()

    def _read_memory(self, trainer: Any, pl_module: Any, batch: Tensor) -> None:
        peak = reserved = None
        if self.device.type == "cuda":
            peak = requested_bytes(self.device, "peak") - self.level
            reserved = torch.cuda.max_memory_reserved(self.device)
            allocated = requested_bytes(self.device, "current") - self.floor.tensor_bytes
        else:
            peak = None if self.level is None else cpu_peak_above(self.level)
            parameters = list(pl_module.parameters())
            states = [dict(each.state) for each in trainer.optimizers]
            allocated = tensor_bytes([*parameters, *(p.grad for p in parameters), *states, batch])
        sizes = {"peak": peak, "allocated": allocated, "reserved": reserved}
        self.memory = {f"{key}_memory_mb": None if size is None else size / 2**20 for key, size in sizes.items()}
        self.memory["peak_bytes_per_token"] = None if peak is None else peak / (batch.numel() - batch.shape[0])


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


def _finite(loss: Tensor) -> float | None:
    # AdamW alone in fp16 soon divides by zero. A step takes its time all the same.
    return float(loss) if bool(loss.isfinite()) else None


class _Repeated(Dataset):
    """A few batches again and again."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index % len(self.batches)]


def _batches(cell: Cell, seed: int) -> _Repeated:
    tokens = cell.batch_size * (cell.length + 1)
    count = max(1, min(DISTINCT, DISTINCT_BYTES // (8 * tokens)))
    shape = {"vocab_size": VOCABULARY, "sequence_length": cell.length, "count": count * cell.batch_size}
    text = SyntheticText(**shape, seed=seed)
    sequences = torch.stack([text[index] for index in range(len(text))])
    return _Repeated(list(sequences.view(count, cell.batch_size, -1)))


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
