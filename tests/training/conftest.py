"""Trainers that write nothing and say nothing, and measurements that take milliseconds."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from longctx.engine import timing
from longctx.training import BenchmarkConfig


@pytest.fixture(autouse=True)
def brief_measurements(monkeypatch):
    monkeypatch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(timing, "MAX_WARM_S", {"cpu": 0.01, "cuda": 0.01})
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", {"cpu": 1e-5, "cuda": 10e-6})
    # Threads that wait for each other on a busy machine take longer than all of the work.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def config(tmp_path):
    return BenchmarkConfig(
        d_model=16,
        n_heads=2,
        threads=1,
        sequence_lengths=[24],
        warmup_runs=1,
        benchmark_runs=2,
        fixed_runs=True,
        results_dir=str(tmp_path / "reports"),
        output_file="training.json",
    )


@pytest.fixture
def make_trainer(tmp_path):
    def make(package="lightning.pytorch", **values):
        package = importlib.import_module(package) if isinstance(package, str) else package
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        more = {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path}
        return package.Trainer(**{**silent, **more, **values})

    return make
