"""Trainers that benchmark as they train, and the configuration that suits them."""

from __future__ import annotations

from typing import Any

from longctx.config import BenchmarkConfig
from longctx.results import BenchmarkResult
from longctx.training.callback import BenchmarkCallback
from longctx.training.packages import package_in_use, packages


def create_lightning_trainer_with_benchmark(
    benchmark_config: BenchmarkConfig | None = None,
    benchmark_frequency: int = 100,
    *,
    trainer_class: type | None = None,
    **trainer_kwargs: Any,
) -> Any:
    """A Trainer with a `BenchmarkCallback`, and with cuDNN's search for the fastest algorithm on (`benchmark=True`).

    trainer_kwargs: as for the Trainer; none of them is changed, and a BenchmarkCallback among the callbacks is used
    as it is. trainer_class: the Trainer of `lightning` or `pytorch_lightning`; by default of the package that the
    objects in trainer_kwargs are from, else of the one whose LightningModule has been subclassed.
    """
    callbacks = trainer_kwargs.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    if trainer_class is None:
        others = [each for each in callbacks if not isinstance(each, BenchmarkCallback)]
        trainer_class = package_in_use([*_objects(trainer_kwargs), *others]).Trainer
    if not any(isinstance(each, BenchmarkCallback) for each in callbacks):
        callbacks.append(BenchmarkCallback(benchmark_config, benchmark_frequency))
    defaults: dict[str, Any] = {"benchmark": True}
    return trainer_class(**{**defaults, **trainer_kwargs, "callbacks": callbacks})


def benchmark_during_training(
    model: Any,
    datamodule: Any,
    benchmark_config: BenchmarkConfig | None = None,
    benchmark_frequency: int = 100,
    *,
    ckpt_path: str | None = None,
    **trainer_kwargs: Any,
) -> list[BenchmarkResult]:
    """Train `model` and return the rows that were measured meanwhile.

    datamodule: a LightningDataModule, or dataloaders. Further arguments go to the Trainer, which is of the package
    that the model is from.
    """
    if "trainer_class" not in trainer_kwargs:
        both = all(isinstance(model, package.LightningModule) for package in packages())
        objects = [*_objects(trainer_kwargs), *([] if both else [model])]
        trainer_kwargs["trainer_class"] = package_in_use(objects).Trainer
    trainer = create_lightning_trainer_with_benchmark(benchmark_config, benchmark_frequency, **trainer_kwargs)
    trainer.fit(model, datamodule, ckpt_path=ckpt_path)
    return next(each for each in trainer.callbacks if isinstance(each, BenchmarkCallback)).benchmark_results


def create_benchmark_config_for_lightning(
    d_model: int = 512,
    n_heads: int = 8,
    batch_size: int = 1,
    sequence_lengths: list[int] | None = None,
    device: str = "auto",
    **kwargs: Any,
) -> BenchmarkConfig:
    """A configuration for the middle of training: 2 warm-up calls and 5 samples a cell, no progress shown.

    kwargs: any other field of BenchmarkConfig, these too.
    """
    values: dict[str, Any] = {"warmup_runs": 2, "benchmark_runs": 5, "verbose": False} | kwargs
    if sequence_lengths is not None:
        values["sequence_lengths"] = sequence_lengths
    return BenchmarkConfig(d_model=d_model, n_heads=n_heads, batch_size=batch_size, device=device, **values)


def _objects(trainer_kwargs: dict[str, Any]) -> list[Any]:
    found = []
    for name in ("logger", "strategy", "plugins", "profiler", "accelerator"):
        value = trainer_kwargs.get(name)
        found += list(value) if isinstance(value, list | tuple) else [value]
    return found
