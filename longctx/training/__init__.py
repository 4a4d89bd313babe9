"""Inside Lightning: benchmark what is being trained, and train what was benchmarked.

    from longctx.training import BenchmarkConfig, create_lightning_trainer_with_benchmark

Works with Trainers and modules of `lightning` and of `pytorch_lightning`.
"""

from __future__ import annotations

from longctx.config import BenchmarkConfig
from longctx.results import BenchmarkResult
from longctx.training.callback import BenchmarkCallback
from longctx.training.cell import run_lightning_cell
from longctx.training.data import SyntheticTextDataModule
from longctx.training.factory import (
    benchmark_during_training,
    create_benchmark_config_for_lightning,
    create_lightning_trainer_with_benchmark,
)
from longctx.training.model import LongContextLM
from longctx.training.runner import LightningBenchmarkRunner
from longctx.training.throughput import Throughput, ThroughputCallback

__all__ = [
    "BenchmarkCallback",
    "BenchmarkConfig",
    "BenchmarkResult",
    "LightningBenchmarkRunner",
    "LongContextLM",
    "SyntheticTextDataModule",
    "Throughput",
    "ThroughputCallback",
    "benchmark_during_training",
    "create_benchmark_config_for_lightning",
    "create_lightning_trainer_with_benchmark",
    "run_lightning_cell",
]
