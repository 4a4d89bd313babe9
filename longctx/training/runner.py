"""Benchmarks of a LightningModule outside of training: its blocks, and the model whole."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from torch import nn

from longctx.config import BenchmarkConfig
from longctx.engine.device import DTYPES, resolve_device
from longctx.engine.runner import results_path
from longctx.errors import UsageError
from longctx.results import BenchmarkResult
from longctx.training.calls import Circumstances, InputGenerator, example_shape
from longctx.training.isolation import untouched
from longctx.training.measuring import append_rows, measure_blocks, measure_model
from longctx.training.packages import is_lightning_module


class LightningBenchmarkRunner:
    """Benchmarks LightningModules as `config` says: its lengths, batch size, mode, runs, device and dtype.

    With device `auto` the module is measured where it is, with dtype `auto` in the format that its weights have.
    """

    def __init__(self, config: BenchmarkConfig | None = None) -> None:
        self.config = config or BenchmarkConfig()
        self.results: list[BenchmarkResult] = []
        self._run = uuid.uuid4().hex

    def benchmark_lightning_model(
        self,
        model: nn.Module,
        model_name: str,
        input_generator: InputGenerator | None = None,
        *,
        block_selector: Callable[[str, nn.Module], bool] | None = None,
    ) -> list[BenchmarkResult]:
        """Rows of each distinct block (`<model_name>.<path>`), then of the model whole (`<model_name>`).

        input_generator(sequence_length, batch_size, d_model) gives a tensor or a list of them: the model's inputs,
        and the blocks' too where it is `[B, T, D]`. Without it a model that has but its `example_input_array` has
        one row, at the batch and length of that. The model itself is not changed, nor is anything process-wide.
        Raises LongctxError for a model without blocks, and lists what it has.
        """
        if not (is_lightning_module(model) or isinstance(model, nn.Module)):
            raise UsageError(f"{type(model).__name__} is no LightningModule", "give the module, not its Trainer")
        config = self.config
        circumstances = Circumstances(
            device=None if config.device == "auto" else resolve_device(config.device),
            dtype=None if config.dtype == "auto" else DTYPES[config.dtype],
            input_generator=input_generator,
            run=self._run,
            deadline=None if config.max_time is None else time.monotonic() + config.max_time,
        )
        with untouched():
            rows = measure_blocks(model, config, circumstances, selector=block_selector, prefix=f"{model_name}.")
            lengths: list[Any] = sorted(config.sequence_lengths)
            if shape := example_shape(model, input_generator):
                # An example is of one size: its row says which, whatever was asked for.
                config, lengths = dataclasses.replace(config, batch_size=shape[0]), [shape[1]]
            rows += [measure_model(model, model_name, length, config, circumstances) for length in lengths]
        self.results += rows
        if config.save_results:
            append_rows(results_path(self.config, kind="lightning"), rows)
        return rows
