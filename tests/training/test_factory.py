"""The published functions."""

from __future__ import annotations

import pytest

from longctx.training import (
    BenchmarkCallback,
    BenchmarkConfig,
    LongContextLM,
    SyntheticTextDataModule,
    benchmark_during_training,
    create_benchmark_config_for_lightning,
    create_lightning_trainer_with_benchmark,
)

SILENT = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def data():
    return SyntheticTextDataModule(vocab_size=16, sequence_length=8, batch_size=2, train_sequences=8, val_sequences=0)


def test_what_is_given_is_not_changed(package, config):
    class Mine(package.Callback):
        pass

    callbacks = [Mine()]
    trainer = create_lightning_trainer_with_benchmark(config, benchmark_frequency=7, callbacks=callbacks, **SILENT)
    assert isinstance(trainer, package.Trainer)
    assert len(callbacks) == 1
    ours = [each for each in trainer.callbacks if isinstance(each, BenchmarkCallback)]
    assert [each.benchmark_frequency for each in ours] == [7]
    assert ours[0].benchmark_config is config


def test_one_callback_alone_and_one_of_ours_are_taken(config):
    mine = BenchmarkCallback(config, 3)
    trainer = create_lightning_trainer_with_benchmark(config, callbacks=mine, **SILENT)
    assert [each for each in trainer.callbacks if isinstance(each, BenchmarkCallback)] == [mine]


@pytest.mark.parametrize("given", [None, False])
def test_benchmark_is_true_unless_said_otherwise(config, given, monkeypatch):
    seen = {}

    class Trainer:
        def __init__(self, **values):
            seen.update(values)

    kwargs = {} if given is None else {"benchmark": given}
    create_lightning_trainer_with_benchmark(config, trainer_class=Trainer, **kwargs)
    assert seen["benchmark"] is (given is None)


def test_training_gives_the_rows(package, config):
    model = LongContextLM("Identity", vocab_size=16, d_model=16, n_heads=2)
    trainer = {"trainer_class": package.Trainer, "max_steps": 4}
    rows = benchmark_during_training(model, data(), config, 2, **trainer, **SILENT)
    assert [(row.block_name, row.training_step, row.status) for row in rows] == [
        ("blocks.0", 2, "ok"),
        ("blocks.0", 4, "ok"),
    ]


def test_a_configuration_for_the_middle_of_training():
    config = create_benchmark_config_for_lightning(d_model=64, n_heads=4, sequence_lengths=[128], mode="train")
    assert isinstance(config, BenchmarkConfig)
    assert (config.d_model, config.sequence_lengths, config.mode) == (64, [128], "train")
    assert (config.warmup_runs, config.benchmark_runs, config.verbose) == (2, 5, False)
    assert create_benchmark_config_for_lightning(benchmark_runs=9).benchmark_runs == 9
