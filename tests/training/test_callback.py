"""The callback: when it runs, what it leaves behind, and that the training does not notice."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy
import pytest
import torch
from torch import nn

from longctx import load
from longctx.errors import LongctxError, UsageError
from longctx.training import BenchmarkCallback, BenchmarkConfig, LongContextLM, SyntheticTextDataModule, measuring

OPTIONS = {"chunk_size": 8, "window_size": 8}


def model(blocks="DPASSM", **values):
    torch.manual_seed(1)
    values = {"vocab_size": 32, "d_model": 16, "n_heads": 2, "block_options": OPTIONS} | values
    return LongContextLM(blocks, **values)


def data():
    return SyntheticTextDataModule(
        vocab_size=32, sequence_length=24, batch_size=2, train_sequences=12, val_sequences=2, shuffle=True
    )


class Watch(nn.Module):
    """Draws a random number after every batch, so that a changed random state shows."""

    def __init__(self, package):
        super().__init__()
        self.losses, self.drawn = [], []
        outer = self

        class Recorder(package.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                outer.losses.append(outputs["loss"].item())
                outer.drawn += [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

        self.callback = Recorder()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_training_is_the_same_to_the_bit(package, make_trainer, config, precision, mode, global_state):
    config.mode = mode
    ends = []
    for benchmarked in (False, True):
        lm, watch = model(["BLADE", "DPASSM"], block_options=OPTIONS | {"dropout": 0.1}), Watch(package)
        callback = BenchmarkCallback(config, 2, at_start=True)
        callbacks = [*([callback] if benchmarked else []), watch.callback]
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        trainer = make_trainer(
            package, max_steps=5, callbacks=callbacks, precision=precision, accumulate_grad_batches=2
        )
        before = global_state()
        trainer.fit(lm, data())
        assert global_state() == before
        assert all(block.training for block in lm.modules())
        ends.append((watch.losses, watch.drawn, {name: p.detach().clone() for name, p in lm.state_dict().items()}))
    (losses, drawn, weights), (losses_with, drawn_with, weights_with) = ends
    assert losses == losses_with
    assert drawn == drawn_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert [row.status for row in callback.benchmark_results] == ["ok"] * 6
    assert {row.dtype for row in callback.benchmark_results} == {"bf16" if precision == "bf16-mixed" else "fp32"}


def test_it_runs_by_optimizer_steps_and_never_at_the_start(make_trainer, config):
    callback = BenchmarkCallback(config, benchmark_frequency=2)
    make_trainer(max_steps=5, accumulate_grad_batches=3, max_epochs=10, callbacks=[callback]).fit(model(), data())
    assert [row.training_step for row in callback.benchmark_results] == [2, 4]


def test_rows_go_to_one_file_under_the_path_of_their_module(make_trainer, config, tmp_path):
    callback = BenchmarkCallback(config, benchmark_frequency=1)
    make_trainer(max_steps=2, callbacks=[callback]).fit(model(["Identity", "DPASSM"], n_layers=4), data())
    path = tmp_path / "reports" / "training.json"
    assert list(path.parent.iterdir()) == [path]
    records = json.loads(path.read_text())
    names = [(r["block_name"], r["training_step"], r["status"]) for r in records]
    assert names == [(f"blocks.{i}", step, "ok") for step in (1, 2) for i in (0, 1)]
    assert records[1]["config"]["same_shape"] == ["blocks.3"]
    assert records[1]["block_options"]["window_size"] == 8
    assert records[1]["forward_time_mean"] > 0
    assert [row.block_name for row in load(path)] == [row.block_name for row in callback.benchmark_results]


def test_nothing_is_saved_when_it_is_not_wanted(make_trainer, config, tmp_path):
    callback = BenchmarkCallback(config, 1, save_results=False)
    make_trainer(max_steps=1, callbacks=[callback]).fit(model(), data())
    assert len(callback.benchmark_results) == 1
    assert not (tmp_path / "reports").exists()


def test_figures_reach_the_loggers(package, make_trainer, config, tmp_path):
    logger = package.loggers.CSVLogger(tmp_path / "logs")
    trainer = package.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BenchmarkCallback(config, 2, save_results=False)],
    )
    trainer.fit(model(), data())
    text = next((tmp_path / "logs").rglob("metrics.csv")).read_text()
    assert "benchmark/blocks.0/24/time_s" in text
    assert "benchmark/blocks.0/24/tokens_per_s" in text


def test_a_fault_is_a_row_and_training_goes_on(make_trainer, config, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "time_call", out_of_memory)
    callback = BenchmarkCallback(config, 1)
    trainer = make_trainer(max_steps=2, callbacks=[callback])
    trainer.fit(model(), data())
    assert trainer.global_step == 2
    assert [row.status for row in callback.benchmark_results] == ["oom", "oom"]
    assert callback.benchmark_results[0].forward_time_mean is None


def test_a_length_that_cannot_fit_is_not_tried(make_trainer, config):
    config.sequence_lengths = [24, 1 << 30]
    config.batch_size = 64
    callback = BenchmarkCallback(config, 1, save_results=False)
    make_trainer(max_steps=1, callbacks=[callback]).fit(model(), data())
    assert [row.status for row in callback.benchmark_results] == ["ok", "skipped"]
    assert "GiB" in callback.benchmark_results[1].error["message"]


def test_steps_of_two_optimizers_are_not_missed(package, make_trainer, config):
    class Two(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.attn = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.other = nn.Linear(16, 16)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.other(self.attn(batch)).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.attn, self.other)]

    callback = BenchmarkCallback(config, 3)
    loader = torch.utils.data.DataLoader(torch.randn(12, 5, 16), batch_size=2)
    make_trainer(package, max_epochs=1, callbacks=[callback]).fit(Two(), loader)
    assert [row.training_step for row in callback.benchmark_results] == [4, 6, 10, 12]
    assert {(row.block_name, row.status) for row in callback.benchmark_results} == {("attn", "ok")}


def test_a_resumed_run_goes_on_counting_in_the_same_file(package, make_trainer, config, tmp_path):
    first = BenchmarkCallback(config, 2)
    trainer = make_trainer(package, max_steps=3, callbacks=[first])
    trainer.fit(model(), data())
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    config.output_file = "other.json"
    second = BenchmarkCallback(config, 2)
    trainer = make_trainer(package, max_steps=6, callbacks=[second])
    trainer.fit(model(), data(), ckpt_path=tmp_path / "at3.ckpt")
    assert [row.training_step for row in second.benchmark_results] == [2, 4, 6]
    assert second.results_path == first.results_path
    assert [r["training_step"] for r in json.loads(first.results_path.read_text())] == [2, 4, 6]


def test_another_run_in_the_same_file_takes_no_rows_away(make_trainer, config):
    for _ in range(2):
        callback = BenchmarkCallback(config, 2)
        make_trainer(max_steps=4, callbacks=[callback]).fit(model(), data())
        assert [row.training_step for row in callback.benchmark_results] == [2, 4]
    assert [r["training_step"] for r in json.loads(callback.results_path.read_text())] == [2, 4, 2, 4]


def test_a_callback_for_each_mode(package, make_trainer, config, tmp_path):
    def callbacks():
        configs = [dataclasses.replace(config, mode=mode, output_file=f"{mode}.json") for mode in ("forward", "train")]
        return [BenchmarkCallback(each, 2) for each in configs]

    trainer = make_trainer(package, max_steps=3, callbacks=callbacks())
    trainer.fit(model(), data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = callbacks()
    trainer = make_trainer(package, max_steps=5, callbacks=again)
    trainer.fit(model(), data(), ckpt_path=tmp_path / "two.ckpt")
    for each in again:
        seen = [(row.training_step, row.mode) for row in each.benchmark_results]
        assert seen == [(step, each.benchmark_config.mode) for step in (2, 4)]


def test_a_model_without_blocks_is_told_so_with_what_it_has(make_trainer, config):
    class Plain(LongContextLM):
        def __init__(self):
            super().__init__("Identity", vocab_size=32, d_model=16, n_heads=2)
            self.blocks = nn.ModuleList()

    with pytest.raises(LongctxError, match="embedding \\(Embedding\\)"):
        make_trainer(max_steps=1, callbacks=[BenchmarkCallback(config, 1)]).fit(Plain(), data())


def test_hooks_of_the_model_are_not_called(make_trainer, config):
    lm, calls = model(n_layers=1), []
    lm.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    make_trainer(max_steps=2, limit_val_batches=0, callbacks=[BenchmarkCallback(config, 1)]).fit(lm, data())
    assert len(calls) == 2


@pytest.mark.parametrize("frequency", [0, -1, 1.5, True])
def test_a_frequency_that_makes_no_sense_is_refused(frequency):
    with pytest.raises(UsageError):
        BenchmarkCallback(BenchmarkConfig(), frequency)
