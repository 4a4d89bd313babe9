"""Several blocks in a row: right, streamed, counted, and a cell of their own."""

from __future__ import annotations

import pytest
import torch

from longctx import blocks
from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine.loading import load_block
from longctx.engine.measure import Plan, measure_cell

OPTIONS = {"BLADE": "chunk_size=8", "DPASSM": "window_size=8", "Longformer": "window_size=8", "BigBird": "block_size=8"}
USERS = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.inner = nn.Linear(d_model, d_model)
    def forward(self, x):
        return x + self.inner(x)

def reference(module, x):
    return module(x)

Mine.reference = reference
"""


def cell_of(name, **values):
    request = BlockRequest.parse(f"{name}:{OPTIONS[name]}" if name in OPTIONS else name)
    return Cell(block=request, **{"length": 21, "d_model": 16, "n_heads": 2, "layers": 3, "dtype": "fp64", **values})


def load(cell, dtype=torch.float64):
    return load_block(cell.block, cell, torch.device("cpu"), dtype, 0)


@pytest.mark.parametrize("name", blocks.names())
def test_a_stack_is_its_layers_one_after_another(name):
    loaded = load(cell_of(name))
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = loaded.call(x)
        by_hand = x
        for layer in loaded.module.blocks:
            by_hand, _ = layer(by_hand)
        assert torch.equal(whole, by_hand)
        torch.testing.assert_close(loaded.reference(loaded.twin(torch.float64), x), whole)
        y, state = loaded.prefill(x[:, :10])
        rest, state = loaded.module(x[:, 10:20], state)
        last, _ = loaded.step(x[:, 20:], state)
    torch.testing.assert_close(torch.cat([y, rest, last], 1), whole)
    first, second = (layer.qkv_proj.weight for layer in loaded.module.blocks[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["forward", "train", "decode", "prefill"])
def test_a_stack_is_measured_in_every_mode(mode):
    config = BenchmarkConfig(threads=1).to_json()
    found = {}
    for layers in (1, 3):
        found[layers] = measure_cell(
            cell_of("DPASSM", mode=mode, layers=layers, dtype="fp32"),
            Plan(warmup_runs=1, runs=2, exact=True),
            device=torch.device("cpu"),
            config=config,
            gate_cache={},
            emit=lambda event: None,
        )
        assert found[layers]["status"] == "ok", found[layers]["error"]
    assert found[3]["flops"] == 3 * found[1]["flops"]
    assert found[1]["bytes"] < found[3]["bytes"] <= 3 * found[1]["bytes"]
    assert found[3]["gate"]["tolerance"] == 3 * found[1]["gate"]["tolerance"]
    assert found[3]["source_hash"] == found[1]["source_hash"]


def test_a_stack_of_the_users_block(tmp_path):
    (tmp_path / "mine.py").write_text(USERS)
    loaded = load(cell_of(f"{tmp_path}/mine.py:Mine"))
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    assert torch.equal(loaded.call(x), loaded.reference(loaded.twin(torch.float64), x))
    with pytest.raises(NotImplementedError, match="no state"):
        loaded.prefill(x)


def test_a_stack_that_differs_from_its_reference_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text(USERS.replace("return module(x)", "return module(x) + 1e-3"))
    found = measure_cell(
        cell_of(f"{tmp_path}/mine.py:Mine", dtype="fp32"),
        Plan(timing=False, memory=False),
        device=torch.device("cpu"),
        config=BenchmarkConfig(threads=1).to_json(),
        gate_cache={},
        emit=lambda event: None,
    )
    assert found["status"] == "wrong"


def test_layers_are_an_axis_and_part_of_the_key():
    one, three = (cell_of("Dense", layers=layers) for layers in (1, 3))
    identity = {"options": {}, "source_hash": "x"}
    assert one.key(identity=identity) != three.key(identity=identity)
    config = BenchmarkConfig(layers=4, sequence_lengths=[8])
    assert [cell.layers for cell in config.cells([one.block], dtype="fp32")] == [4]
