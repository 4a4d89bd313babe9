"""On a GPU: the training does not notice the callback, faults are rows, and nobody waits for the device."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from longctx.config import BlockRequest, Cell
from longctx.engine.measure import Plan
from longctx.training import (
    BenchmarkCallback,
    LightningBenchmarkRunner,
    LongContextLM,
    SyntheticTextDataModule,
    ThroughputCallback,
    run_lightning_cell,
)

pytestmark = pytest.mark.cuda

BLOCKS = ["BLADE", "DPASSM"]
OPTIONS = {"chunk_size": 32, "window_size": 32, "block_size": 16, "num_random_blocks": 1}


def model(blocks=tuple(BLOCKS), **values):
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "d_model": 64, "n_heads": 4, "n_layers": len(blocks), "block_options": OPTIONS}
    return LongContextLM(blocks, **shape | values)


def data():
    shape = {"vocab_size": 64, "sequence_length": 150, "batch_size": 4}
    return SyntheticTextDataModule(**shape, train_sequences=64, val_sequences=0)


@pytest.fixture
def make_gpu_trainer(make_trainer):
    return lambda **values: make_trainer(**{"accelerator": "gpu", **values})


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_training_is_the_same_to_the_bit(make_gpu_trainer, config, precision, mode):
    config.mode, config.sequence_lengths = mode, [200]
    # Attention's own backward adds in any order otherwise: two runs without the callback would differ too.
    torch.use_deterministic_algorithms(True, warn_only=True)
    ends, held = [], []
    for benchmarked in (False, False, True):
        lm, callback = model(block_options=OPTIONS | {"dropout": 0.1}), BenchmarkCallback(config, 2, at_start=True)
        random.seed(5), torch.manual_seed(5), torch.cuda.manual_seed_all(5)
        trainer = make_gpu_trainer(max_steps=5, precision=precision, callbacks=[callback] if benchmarked else [])
        trainer.fit(lm, data())
        drawn = torch.rand(3, device="cuda").tolist()
        ends.append((drawn, [p.detach().cpu() for p in lm.parameters()]))
        del trainer
        held.append(torch.cuda.memory_allocated())
    (drawn, once), (_, twice), (drawn_with, with_it) = ends
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True)), "the training itself does not repeat"
    assert drawn == drawn_with
    assert all(torch.equal(a, b) for a, b in zip(once, with_it, strict=True))
    # Tables of index numbers that our operators keep for a length are all that may be left.
    assert held[2] - held[1] < 1 << 20, "the callback left memory behind"
    rows = callback.benchmark_results
    assert [row.status for row in rows] == ["ok"] * 6, [row.error for row in rows]
    assert {row.dtype for row in rows} == {"bf16" if precision == "bf16-mixed" else "fp16"}
    assert all(row.peak_memory_mb > 0 for row in rows)


def test_out_of_memory_is_a_row_and_training_goes_on(make_gpu_trainer, config):
    config.sequence_lengths, config.batch_size = [64, 1 << 24], 256
    benchmark, throughput = BenchmarkCallback(config, 2), ThroughputCallback(2)
    trainer = make_gpu_trainer(max_steps=4, precision="bf16-mixed", callbacks=[benchmark, throughput])
    trainer.fit(model(["DPASSM"]), data())
    assert trainer.global_step == 4
    assert [row.status for row in benchmark.benchmark_results] == ["ok", "oom"] * 2
    assert "memory" in benchmark.benchmark_results[1].error["message"]
    # The benchmark's own level is not the training's.
    assert 0 < throughput.history[-1].memory_bytes < 1 << 30
    assert torch.cuda.memory_reserved() < 1 << 31


def synchronizations(fit) -> int:
    """How often the host waits for the device while `fit` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fit()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def test_throughput_is_measured_without_a_wait(make_gpu_trainer):
    counts = []
    for callbacks in ([], [], [ThroughputCallback(3)]):
        lm, text = model(["Identity"]), data()
        trainer = make_gpu_trainer(max_steps=12, precision="bf16-mixed", callbacks=callbacks)
        counts.append(synchronizations(lambda trainer=trainer, lm=lm, text=text: trainer.fit(lm, text)))
    assert counts[1] == counts[2]
    history = callbacks[0].history
    assert [(window.step, window.steps) for window in history] == [(3, 3), (6, 3), (9, 3), (12, 3)]
    assert all(0 < window.step_time_s < 1 and window.tokens_per_s > 0 for window in history)
    assert callbacks[0].peak_flops is None or 0 < history[-1].mfu < 1


def test_the_runner_measures_where_the_module_is(config):
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(model(["DPASSM"]).cuda().bfloat16(), "lm")
    assert [(row.block_name, row.status, row.dtype) for row in rows] == [
        ("lm.blocks.0", "ok", "bf16"),
        ("lm", "ok", "bf16"),
    ], [row.error for row in rows]
    assert all(row.peak_memory_mb > 0 and row.environment["gpu"] for row in rows)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cell_as_lightning_runs_it(config, dtype):
    cell = Cell(block=BlockRequest.parse("DPASSM"), length=300, batch_size=2, d_model=64, n_heads=4, dtype=dtype)
    plan = Plan(warmup_runs=2, runs=6, exact=True)
    found = run_lightning_cell(cell, plan, device="cuda:0", config=config.to_json())
    assert found["status"] == "ok", found["error"]
    assert len(found["samples_round"]) == len(found["bare_samples_round"]) == 6
    assert all(0 < seconds < 1 for seconds in found["samples_round"] + found["bare_samples_round"])
    assert 0 < found["peak_memory_mb"] < found["reserved_memory_mb"]
    # Weights, gradients and two moments of each.
    weights = found["lightning"]["parameters"] * 2 / 2**20
    assert 4 * weights < found["allocated_memory_mb"] < 5 * weights + 1
    # In fp16 alone AdamW divides by zero.
    if dtype == "bf16":
        assert found["lightning"]["last_loss"] < found["lightning"]["first_loss"]


def test_a_cell_that_does_not_fit_is_told(config):
    cell = Cell(block=BlockRequest.parse("Identity"), length=1 << 18, batch_size=64, d_model=2048, n_heads=16)
    plan = Plan(warmup_runs=0, runs=2, exact=True, gate=False)
    found = run_lightning_cell(cell, plan, device="cuda:0", config=config.to_json())
    assert found["status"] == "oom", found["error"]
    assert torch.cuda.memory_reserved() < 1 << 31
