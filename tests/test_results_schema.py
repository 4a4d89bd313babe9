"""What a sweep saves is as the JSON Schema of the package says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jsonschema
import pytest
from made_records import PUBLISHED

import longctx

BLOCKS = """
from torch import nn

class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("what is this?")

class TooLarge(nn.Module):
    def forward(self, x):
        raise MemoryError

class NotFinite(nn.Module):
    def forward(self, x):
        return x / 0

class Priced(nn.Module):
    causal = True

    def __init__(self, width=2.5, name="é"):
        super().__init__()

    def forward(self, x):
        return x.cumsum(1) / 7

    def cost(self, cell, options):
        return {"flops": 1e3, "bytes": 1e3, "state_bytes": 8}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The file of a real sweep with rows of many kinds."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "mine.py").write_text(BLOCKS)
    config = longctx.BenchmarkConfig(
        d_model=32,
        n_heads=2,
        sequence_lengths=[16, 24],
        rounds=1,
        warmup_runs=1,
        benchmark_runs=6,
        fixed_runs=True,
        threads=1,
        isolation="none",
        results_dir=str(folder),
        output_file="run.json",
    )
    names = ["Raises", "TooLarge", "NotFinite", "Priced", "Priced:width=1"]
    with pytest.MonkeyPatch.context() as patch:
        # The lock on the device is another one then, and the warm-up is short.
        patch.setattr(tempfile, "tempdir", str(folder))
        from longctx.engine import timing

        patch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0})
        patch.setattr(timing, "MAX_WARM_S", {"cpu": 0.05})
        longctx.benchmark(["Identity", *(f"{folder}/mine.py:{name}" for name in names)], config)
    return folder / "run.json"


@pytest.fixture
def validator():
    schema = json.loads(Path(longctx.__file__).with_name("results.schema.json").read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    assert schema["items"]
    return kind(schema)


def test_every_record_of_a_sweep_is_as_the_schema_says(swept, validator):
    records = json.loads(swept.read_text(), parse_constant=pytest.fail)
    assert {record["status"] for record in records} == {"ok", "failed", "oom", "skipped", "wrong"}
    assert [error.message for error in validator.iter_errors(records)] == []
    assert all(list(record)[: len(PUBLISHED)] == PUBLISHED for record in records)


def test_the_schema_tells_a_record_from_what_is_none(swept, validator):
    record = json.loads(swept.read_text())[0]
    assert validator.is_valid([])
    assert not validator.is_valid(record)
    assert not validator.is_valid([3])
    for damage in ({"status": "fine"}, {"forward_time_mean": "fast"}, {"sequence_length": 0}, {"samples": [1.0]}):
        assert not validator.is_valid([{**record, **damage}])
    assert not validator.is_valid([{name: value for name, value in record.items() if name != "block_name"}])
