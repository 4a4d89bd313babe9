"""The callback that benchmarks the blocks of a model while it is being trained, and changes nothing in the training."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longctx.config import BenchmarkConfig
from longctx.engine.runner import results_path
from longctx.errors import LongctxError, UsageError
from longctx.results import BenchmarkResult, prove_writable, read_results
from longctx.training.calls import Circumstances
from longctx.training.finding import find_blocks
from longctx.training.isolation import untouched
from longctx.training.measuring import append_rows, measure_blocks
from longctx.training.packages import Callback

LOGGED = {
    "time_s": lambda row: row.time_s,
    "tokens_per_s": lambda row: row.throughput_tokens_per_sec,
    "peak_memory_mb": lambda row: row.peak_memory_mb,
    "tflops": lambda row: row.tflops,
}
"""Figures of a row that go to the trainer's loggers, as `benchmark/<block>/<length>/<figure>`."""


class BenchmarkCallback(Callback):
    """Benchmarks the blocks of the module in training every `benchmark_frequency` optimizer steps.

    What is measured is a copy of each block of a distinct shape, on the training's device, in its precision and under
    its flags, at the lengths and batch size of `benchmark_config`. Rows are `BenchmarkResult` objects with the step in
    `training_step`; all are kept in `benchmark_results`, and appended to one file when `save_results` here and in the
    configuration say so. A fault, out of memory too, is a row. Losses, weights and random numbers of the training are
    the same with and without it, to the bit.

    at_start: also before the first step. per_rank: every process measures, all at the same time, and those after the
    first write to files of their own; otherwise rank zero measures and the others wait. block_selector: (path, module)
    -> bool, where neither types nor names tell what a block is.
    """

    def __init__(
        self,
        benchmark_config: BenchmarkConfig | None = None,
        benchmark_frequency: int = 100,
        save_results: bool = True,
        *,
        at_start: bool = False,
        per_rank: bool = False,
        block_selector: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        super().__init__()
        frequency = benchmark_frequency
        if not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1:
            raise UsageError(f"benchmark_frequency must be a whole number of at least 1, not {frequency!r}")
        self.benchmark_config = benchmark_config or BenchmarkConfig()
        self.benchmark_frequency = frequency
        self.save_results = save_results
        self.at_start, self.per_rank, self.block_selector = at_start, per_rank, block_selector
        self.benchmark_results: list[BenchmarkResult] = []
        self.results_path: Path | None = None
        """Where rows are saved; known once training has begun."""
        self.seconds = 0.0
        """How long the training has waited for benchmarks, this process's saving and waiting included."""
        self.peak_allocated_bytes = 0
        """Highest level of the CUDA allocator in the training so far: a benchmark resets torch's own counter."""
        self._run = uuid.uuid4().hex
        self._last_step: int | None = None
        self._resumed_path: Path | None = None

    # -- when -----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # What cannot work is told now, and not after a day of training.
        find_blocks(pl_module, self.block_selector)
        if not self._measures_here(trainer):
            return
        self._take_up(trainer)
        if self._saves:
            self.results_path = self.results_path or self._new_path(trainer)
            prove_writable(self.results_path.parent)
            if self.results_path.exists():
                read_results(self.results_path)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._last_step is None or self._last_step > trainer.global_step:
            self._last_step = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._benchmark(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, last = trainer.global_step, self._last_step or 0
        # Batches that only accumulate leave the step where it was; several optimizers move it by more than one.
        if step // self.benchmark_frequency > last // self.benchmark_frequency:
            self._last_step = step
            self._benchmark(trainer, pl_module)

    @property
    def state_key(self) -> str:
        # One callback for each mode may stand in a trainer, which tells their states apart by this.
        return self._generate_state_key(mode=self.benchmark_config.mode)

    def state_dict(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "last_step": self._last_step,
            "results_path": None if self.results_path is None else str(self.results_path),
            "seconds": self.seconds,
            "peak_allocated_bytes": self.peak_allocated_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was made: in its results file too, if that is still there."""
        self._run, self._last_step = state_dict.get("run", self._run), state_dict["last_step"]
        self.seconds, self.peak_allocated_bytes = state_dict["seconds"], state_dict["peak_allocated_bytes"]
        path = state_dict["results_path"]
        self._resumed_path = None if path is None else Path(path)

    def _take_up(self, trainer: Any) -> None:
        """Take up the results file of the run that is resumed, and the rows up to the step of its checkpoint."""
        path, self._resumed_path = self._resumed_path, None
        if path is None or not self._saves:
            return
        path = _of_rank(path, trainer)
        if not path.exists():
            return
        self.results_path = path
        upto = self._last_step or 0
        rows = [row for row in read_results(path) if row.training_step is not None]
        rows = [row for row in rows if row.config.get("run") in (None, self._run)]
        self.benchmark_results = [row for row in rows if row.training_step <= upto]

    # -- what -----------------------------------------------------------------------------------------------------

    def _benchmark(self, trainer: Any, pl_module: Any) -> None:
        began = time.perf_counter()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.peak_allocated_bytes = max(self.peak_allocated_bytes, peak)
        try:
            if self._measures_here(trainer):
                rows = self._measure(trainer, pl_module)
                self.benchmark_results += rows
                self._save(trainer, rows)
                self._log(trainer, rows)
        finally:
            # An error on the one rank must not leave the others waiting for ever.
            trainer.strategy.barrier("longctx benchmark")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self.seconds += time.perf_counter() - began

    def _measure(self, trainer: Any, pl_module: Any) -> list[BenchmarkResult]:
        config = self.benchmark_config
        strategy = type(trainer.strategy).__name__
        # What is compiled for other lengths would take the place of the training's own graphs, and change its numbers.
        with untouched(), torch.compiler.set_stance("force_eager"):
            circumstances = Circumstances(
                autocast=trainer.precision_plugin.forward_context,
                precision=str(trainer.precision),
                training_step=trainer.global_step,
                run=self._run,
                deadline=None if config.max_time is None else time.monotonic() + config.max_time,
                eager=True,
                sharded=any(name in strategy for name in ("FSDP", "ModelParallel", "DeepSpeed")),
            )
            return measure_blocks(pl_module, config, circumstances, selector=self.block_selector)

    def _save(self, trainer: Any, rows: list[BenchmarkResult]) -> None:
        if not self._saves:
            return
        self.results_path = self.results_path or self._new_path(trainer)
        try:
            append_rows(self.results_path, rows)
        except LongctxError as error:
            # A full disk spoils the benchmark's file, and must not spoil the training.
            text = f"{error.message} ({error.hint})" if error.hint else error.message
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _log(self, trainer: Any, rows: list[BenchmarkResult]) -> None:
        metrics = {
            f"benchmark/{row.block_name}/{row.sequence_length}/{name}": value
            for row in rows
            for name, figure in LOGGED.items()
            if row.ok and (value := figure(row)) is not None
        }
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics(metrics, step=trainer.global_step)

    @property
    def _saves(self) -> bool:
        return self.save_results and self.benchmark_config.save_results

    def _measures_here(self, trainer: Any) -> bool:
        return self.per_rank or trainer.is_global_zero

    def _new_path(self, trainer: Any) -> Path:
        return _of_rank(results_path(self.benchmark_config, kind="training"), trainer)


def _of_rank(path: Path, trainer: Any) -> Path:
    return path if trainer.global_rank == 0 else path.with_stem(f"{path.stem}-rank{trainer.global_rank}")
