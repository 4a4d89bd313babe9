"""Two processes on one machine (gloo): who measures, and that weights stay what they would have been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_script.py")


def run(package, folder, mode):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), package, str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]


def test_rank_zero_measures_while_the_other_waits(tmp_path):
    first, second = run("lightning.pytorch", tmp_path, "with")
    assert first["world_size"] == 2
    assert first["rows"] == [["blocks.0", 2, "ok"], ["blocks.0", 4, "ok"]]
    assert second["rows"] == []
    assert first["weights"] == second["weights"]
    assert len(json.loads((tmp_path / "ddp.json").read_text())) == 2
    plain, _ = run("lightning.pytorch", tmp_path, "without")
    assert plain["weights"] == first["weights"]


def test_every_rank_measures_into_a_file_of_its_own(tmp_path):
    pytest.importorskip("pytorch_lightning")
    first, second = run("pytorch_lightning", tmp_path, "per_rank")
    assert first["rows"] == second["rows"] == [["blocks.0", 2, "ok"], ["blocks.0", 4, "ok"]]
    assert first["weights"] == second["weights"]
    assert {path.name for path in tmp_path.glob("ddp*.json")} == {"ddp.json", "ddp-rank1.json"}
