"""Blocks that cheat end up wrong, honest ones pass, and the input is left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longctx import blocks
from longctx.blocks._spec import TOLERANCES
from longctx.config import BlockRequest, Cell
from longctx.engine.gate import check_block, short_length
from longctx.engine.loading import LoadedBlock, WrongOutputError, load_block
from longctx.engine.measure import make_input

CPU = torch.device("cpu")
D = 32


def cell_of(text: str = "Identity", **values) -> Cell:
    return Cell(block=BlockRequest.parse(text), **{"length": 150, "d_model": D, "n_heads": 4, **values})


def loaded_with(module: nn.Module, **values) -> LoadedBlock:
    return LoadedBlock(
        **{
            "name": type(module).__name__,
            "module": module.eval(),
            "options": {},
            "source_hash": type(module).__name__,
            "causal": False,
            "modes": ("forward",),
            "reference": None,
            "cost": None,
            **values,
        }
    )


def check(loaded: LoadedBlock, cell: Cell | None = None, cache=None):
    """What the gate finds; an input that it changed itself is no longer the one that would be timed."""
    cell = cell or cell_of()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp16": torch.float16}[cell.dtype]
    x = make_input(cell, CPU, seed=0)
    before = x.clone()
    found = check_block(loaded, cell, CPU, dtype, 0, x, cache)
    assert torch.equal(x, before) or isinstance(loaded.module, WritingIntoItsInput)
    return found


class Honest(nn.Module):
    """A running mean: causal, and mixes every token."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


class Dropping(Honest):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1)


class NotFinite(Honest):
    def forward(self, x):
        y = super().forward(x)
        y[:, -1, 3] = float("nan")
        return y


class CachedByPointer(Honest):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        if x.data_ptr() not in self.kept:
            self.kept[x.data_ptr()] = super().forward(x)
        return self.kept[x.data_ptr()].clone()


class Stale(Honest):
    kept = None

    def forward(self, x):
        if self.kept is None or self.kept.shape != x.shape:
            self.kept = super().forward(x)
        return self.kept.clone()


class Leaking(nn.Module):
    """Looks one token ahead, and no further."""

    def forward(self, x):
        return x + 0.1 * F.pad(x[:, 1:], (0, 0, 0, 1))


class MeanOfAll(nn.Module):
    def forward(self, x):
        return x + x.mean(1, keepdim=True)


class WritingIntoItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


class Drifting(Honest):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_an_honest_block_passes(dtype):
    found = check(loaded_with(Honest(), causal=True), cell_of(dtype=dtype))
    assert found["passed"], found
    assert found["reason"] is None
    assert found["error"] is None
    assert found["calls"] == 4
    assert found["first_call_s"] > 0


@pytest.mark.parametrize(
    ("module", "causal", "words"),
    [
        (Dropping(), False, "two outputs"),
        (NotFinite(), False, "NaN"),
        (CachedByPointer(), False, "old results"),
        (Stale(), False, "old results"),
        (Leaking(), True, "causal"),
        (MeanOfAll(), True, "causal"),
        (Drifting(), False, "two outputs"),
        (WritingIntoItsInput(), False, "its input tensor"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cheats_are_wrong(module, causal, words, dtype):
    module = type(module)()
    found = check(loaded_with(module, causal=causal), cell_of(dtype=dtype))
    assert not found["passed"]
    assert words in found["reason"]


def test_without_the_claim_later_tokens_may_be_seen():
    assert check(loaded_with(MeanOfAll()))["passed"]


def test_one_token_is_enough():
    assert check(loaded_with(Honest(), causal=True), cell_of(length=1))["passed"]


def test_an_output_of_another_shape_is_an_error():
    class Short(nn.Module):
        def forward(self, x):
            return x[:, :-1]

    with pytest.raises(WrongOutputError, match=r"\[1, 149, 32\]"):
        check(loaded_with(Short()))


@pytest.mark.parametrize("name", blocks.names())
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_blocks_pass_well_within_the_tolerance(name, dtype):
    cell = cell_of(name, dtype=dtype, batch_size=2, num_kv_heads=2, d_model=64)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    found = check(load_block(cell.block, cell, CPU, kind, 0), cell)
    assert found["passed"], found
    assert found["error"] < 0.7 * TOLERANCES[dtype]
    assert found["tolerance"] == TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mixer_that_sees_one_key_too_few_differs_from_its_reference(dtype):
    cell = cell_of("Longformer:window_size=8,num_global_tokens=0", dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    loaded = load_block(cell.block, cell, CPU, kind, 0)
    narrow = load_block(BlockRequest.parse("Longformer:window_size=7,num_global_tokens=0"), cell, CPU, kind, 0)
    narrow.module.load_state_dict(loaded.module.state_dict())
    loaded.module = narrow.module
    found = check(loaded, cell)
    assert not found["passed"]
    assert "reference" in found["reason"]
    assert found["error"] > TOLERANCES[dtype]


def test_the_reference_check_is_made_once_and_the_shape_check_every_time():
    calls = []

    def reference(module, x):
        calls.append(x.shape[1])
        return module(x)

    loaded, cache = loaded_with(Honest(), reference=reference, options={"window_size": 128}), {}
    first, second = check(loaded, cache=cache), check(loaded, cell_of(length=77), cache=cache)
    assert calls == [2 * 128 + 37]
    assert first["error"] == second["error"]
    assert second["calls"] == 4
    check(loaded, cell_of(dtype="fp64"), cache=cache)
    assert len(calls) == 2


def test_a_wrong_reference_check_stays_wrong():
    loaded, cache = loaded_with(Honest(), reference=lambda module, x: 1.01 * module(x)), {}
    for _ in range(2):
        found = check(loaded, cache=cache)
        assert not found["passed"]
        assert found["error"] == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_the_short_length_takes_two_units_and_an_odd_rest():
    assert short_length({"window_size": 512, "dilation": 1}) == 1024 + 37
    assert short_length({"chunk_size": 512}) == 1024 + 37
    assert short_length({}) == 192 + 37
    assert short_length({"chunk_size": 1 << 20}) < 2400
    assert short_length({"window_size": "wide", "chunk_size": None, "block_size": True}) == 192 + 37
