"""Figures of real training steps."""

from __future__ import annotations

import time

import pytest
import torch

from longctx.training import (
    BenchmarkCallback,
    LongContextLM,
    SyntheticTextDataModule,
    ThroughputCallback,
)
from longctx.training.throughput import tokens_in


class Sleepy(LongContextLM):
    """A training step of a known length."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class SlowData(SyntheticTextDataModule):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = lambda batch: (time.sleep(0.03), torch.stack(batch))[1]
        return loader


def data(kind=SyntheticTextDataModule, **values):
    shape = {"vocab_size": 16, "sequence_length": 10, "batch_size": 3, "train_sequences": 60, "val_sequences": 3}
    return kind(**shape | values)


def lm(kind=LongContextLM):
    return kind("Identity", vocab_size=16, d_model=8, n_heads=2, n_layers=1)


def test_known_times_are_found(package, make_trainer):
    callback = ThroughputCallback(4, peak_flops=1e9)
    make_trainer(package, max_steps=8, callbacks=[callback]).fit(lm(Sleepy), data(SlowData))
    first, second = callback.history
    assert (first.step, second.step) == (4, 8)
    # At least what was slept; a busy machine adds to it.
    assert 0.05 <= second.step_time_s < 0.5
    assert second.tokens_per_s == pytest.approx(30 / second.step_time_s)
    assert 0.03 / second.step_time_s * 0.9 <= second.data_share < 1 - 0.02 / second.step_time_s
    assert second.mfu == pytest.approx(second.flops_per_s / 1e9)
    flops = lm().training_flops(3, 10)
    assert second.flops_per_s * second.step_time_s == pytest.approx(flops)
    assert second.memory_bytes > 1 << 20


def test_accumulation_counts_steps_and_benchmarks_are_left_out(make_trainer, config, monkeypatch):
    benchmark = BenchmarkCallback(config, 2, save_results=False)
    monkeypatch.setattr(benchmark, "_measure", lambda *_: time.sleep(0.5) or [])
    for order in (0, 1):
        callback = ThroughputCallback(2)
        callbacks = [benchmark, callback] if order else [callback, benchmark]
        trainer = make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=callbacks, val_check_interval=4)
        trainer.fit(lm(Sleepy), data())
        assert [window.steps for window in callback.history] == [2, 2]
        assert all(0.04 <= window.step_time_s < 0.25 for window in callback.history)
        assert all(window.data_share < 0.6 for window in callback.history)
    assert benchmark.seconds >= 1.0


def test_figures_reach_loggers_and_bar(package, tmp_path):
    trainer = package.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=package.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[ThroughputCallback(2)],
    )
    trainer.fit(lm(), data())
    assert trainer.progress_bar_metrics["tok/s"] > 0
    assert "throughput/step_time_s" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_tokens_of_a_batch():
    tokens = torch.zeros(2, 9, dtype=torch.long)
    assert tokens_in(tokens) == 16
    assert tokens_in((tokens, tokens)) == 18
    assert tokens_in({"x": torch.zeros(2, 5, 7)}) == 10
    assert tokens_in((torch.zeros(4), torch.zeros(4))) == 4
    assert tokens_in("nothing") == 0
