"""Two processes on one machine: who measures, and that weights stay what they would have been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_script.py")
MEASURED = [["blocks.0", 2, "ok"], ["blocks.0", 4, "ok"]]

two_gpus = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def run(folder, mode, *, package="lightning.pytorch", strategy="ddp", accelerator="cpu"):
    """What each of the two processes saw."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if accelerator == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(SCRIPT), package, str(folder), mode, strategy, accelerator]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("strategy", "accelerator"),
    [
        ("ddp", "cpu"),
        ("model_parallel", "cpu"),
        pytest.param("ddp", "gpu", marks=two_gpus),
        pytest.param("fsdp", "gpu", marks=two_gpus),
        pytest.param("model_parallel", "gpu", marks=two_gpus),
    ],
)
def test_rank_zero_measures_while_the_other_waits(tmp_path, strategy, accelerator):
    first, second = run(tmp_path / "with", "with", strategy=strategy, accelerator=accelerator)
    assert first["world_size"] == 2
    assert first["rows"] == MEASURED, first["errors"]
    assert second["rows"] == []
    assert len(json.loads((tmp_path / "with" / "run.json").read_text())) == 2
    # Two sequences of 16 tokens on each of two processes.
    assert first["tokens_per_step"] == pytest.approx([64, 64])
    plain = run(tmp_path / "without", "without", strategy=strategy, accelerator=accelerator)
    for seen, expected in zip((first, second), plain, strict=True):
        assert seen["losses"] == expected["losses"]
        assert seen["weights"] == expected["weights"]


def test_every_rank_measures_into_a_file_of_its_own(tmp_path):
    pytest.importorskip("pytorch_lightning")
    first, second = run(tmp_path, "per_rank", package="pytorch_lightning")
    assert first["rows"] == second["rows"] == MEASURED
    assert first["weights"] == second["weights"]
    assert {path.name for path in tmp_path.glob("run*.json")} == {"run.json", "run-rank1.json"}
