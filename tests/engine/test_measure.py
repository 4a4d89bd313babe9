"""A cell from end to end: every fault of a block is a status, and harms neither the process nor the next row."""

from __future__ import annotations

import json
import os

import pytest
import torch

from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine import timing
from longctx.engine.call import Run
from longctx.engine.flags import flag_state
from longctx.engine.loading import load_block
from longctx.engine.measure import Plan, fault_of, make_input, measure_cell
from longctx.results import STATUSES

CPU = torch.device("cpu")

MODULE = """
import os, sys, time
import torch
import torch.nn.functional as F
from torch import nn

class Base(nn.Module):
    def forward(self, x):
        return x.cumsum(1) / 7

class Dropping(Base):
    def forward(self, x):
        return F.dropout(x, 0.1)

class OutOfMemory(Base):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

class HostOutOfMemory(Base):
    def forward(self, x):
        return torch.empty(1 << 60, dtype=torch.uint8)

class NotForThis(Base):
    def forward(self, x):
        raise RuntimeError('"mixer_cpu" not implemented for \\'Half\\'')

class Raising(Base):
    def forward(self, x):
        raise ValueError("what is this?")

class Quitting(Base):
    def forward(self, x):
        sys.exit(4)

class Interrupted(Base):
    def forward(self, x):
        raise KeyboardInterrupt

class WrongShape(Base):
    def forward(self, x):
        return x[..., :-1]

class Vandal(Base):
    def __init__(self):
        super().__init__()
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
    def forward(self, x):
        torch.manual_seed(3)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float16)
        os.environ["LONGCTX_TEST_VANDAL"] = "1"
        return super().forward(x)

class Curious(Base):
    causal = True
    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == 2
        return super().forward(x)

class _Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.01)
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.02)
        return grad

class SlowBackward(Base):
    def forward(self, x):
        return _Sleeps.apply(x) if self.training else x.clone()

class Streaming(nn.Module):
    # The sum of all tokens so far; its state says where the stream stands.
    causal = True
    def forward(self, x, state=None, keep_state=True):
        y = x.cumsum(1) / 9
        return y, (y[:, -1:].clone(), x.shape[1]) if keep_state else None
    def init_state(self, batch_size):
        return torch.zeros(batch_size, 1, 1), 0
    def step(self, x, state):
        total, seen = state
        assert seen <= 64 + 17 or seen > 100, seen
        y = total + x / 9
        return y, (y, seen + 1)

class Forgetful(Streaming):
    def forward(self, x, state=None, keep_state=True):
        y, state = super().forward(x, state, True)
        return (y, None) if not keep_state else (y * 2, state)
    def step(self, x, state):
        return x / 9, state

class Learning(nn.Module):
    def __init__(self, d_model, device=None, dtype=None):
        super().__init__()
        self.inner = nn.Linear(d_model, d_model, device=device, dtype=dtype)
    def forward(self, x):
        if self.training:
            assert torch.is_grad_enabled() and x.requires_grad and x.grad is None and self.inner.weight.grad is None
        return self.inner(x)
"""


@pytest.fixture(autouse=True)
def brief_warmup(monkeypatch):
    monkeypatch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(timing, "MAX_WARM_S", {"cpu": 0.02, "cuda": 0.02})
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", {"cpu": 1e-4, "cuda": 10e-6})


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "blocks_of_mine.py"
    path.write_text(MODULE)
    return str(path)


def measure(text: str, *, plan: Plan | None = None, events: list | None = None, cache=None, threads=1, **values):
    cell = Cell(block=BlockRequest.parse(text), **{"length": 90, "d_model": 32, "n_heads": 4, **values})
    plan = plan or Plan(warmup_runs=1, runs=2, exact=True, memory=False)
    return measure_cell(
        cell,
        plan,
        device=CPU,
        config=BenchmarkConfig(threads=threads).to_json(),
        gate_cache={} if cache is None else cache,
        emit=(lambda event: None) if events is None else events.append,
    )


def test_a_whole_cell():
    events: list = []
    found = measure("Identity", events=events, plan=Plan(warmup_runs=1, runs=3, exact=True))
    assert found["status"] == "ok", found["error"]
    assert len(found["samples_round"]) == 3
    assert found["gate"]["passed"]
    assert found["gate"]["error"] < 1e-5
    assert found["first_call_s"] > 0
    assert found["gate_s"] > 0
    assert found["flops"] > 0
    assert found["bytes"] > 0
    assert found["path"]
    assert found["allocated_memory_mb"] > 12 * 32 * 32 * 4 / 2**20
    assert found["host_time_median"] is None
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases == ["build", "gate", "warmup", "timing", "memory"]
    json.dumps(found)


@pytest.mark.parametrize("mode", ["forward", "train", "decode", "prefill"])
@pytest.mark.parametrize("name", ["Identity", "BLADE:chunk_size=16"])
def test_every_mode_is_measured(mode, name):
    found = measure(name, mode=mode, plan=Plan(warmup_runs=1, runs=2, exact=True))
    assert found["status"] == "ok", found["error"]
    assert len(found["samples_round"]) == 2


def test_phases_that_are_not_planned_are_not_done():
    found = measure("Identity", plan=Plan(gate=False, timing=False, memory=True))
    assert found["status"] == "ok"
    assert found["samples_round"] == []
    assert found["gate"] is None
    timed = measure("Identity", plan=Plan(gate=False, memory=False, warmup_runs=1, runs=2, exact=True))
    assert timed["first_call_s"] > 0
    assert timed["allocated_memory_mb"] is None


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("Dropping", "wrong", "two outputs"),
        ("OutOfMemory", "oom", "1 TiB"),
        ("HostOutOfMemory", "oom", "no room in memory for another"),
        ("NotForThis", "unsupported", "Half"),
        ("Raising", "failed", "ValueError in blocks_of_mine.py, line"),
        ("Raising", "failed", "what is this"),
        ("Quitting", "failed", "exit code 4"),
        ("WrongShape", "failed", "31"),
        ("Missing", "failed", "has no 'Missing'"),
    ],
)
def test_faults_become_a_status(place, name, status, words):
    found = measure(f"{place}:{name}")
    assert found["status"] == status
    assert status in STATUSES
    assert words in found["error"]["message"]
    assert found["error"]["type"]
    assert found["samples_round"] == []
    json.dumps(found)


def test_what_a_gpu_says_of_its_memory_is_cut_to_what_matters():
    text = (
        "CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 10.36 GiB "
    )
    text += (
        "is free. Including non-PyTorch memory, this process has 129.43 GiB memory in use. Of the allocated memory ..."
    )
    found = fault_of(torch.OutOfMemoryError(text))
    assert found["status"] == "oom"
    wanted = "there was no room in memory for another 16.00 GiB: 10.36 GiB of 139.80 GiB were free"
    assert found["error"]["message"] == wanted


def test_an_interruption_passes(place):
    with pytest.raises(KeyboardInterrupt):
        measure(f"{place}:Interrupted")


def test_a_mode_that_a_block_does_not_have_is_unsupported(place):
    assert measure(f"{place}:Base", mode="decode")["status"] == "unsupported"
    found = measure("Dense:causal=false", mode="prefill")
    assert found["status"] == "unsupported"
    assert "causal" in found["error"]["message"]


def test_a_block_that_changes_global_state_harms_no_other_row(place):
    before = flag_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
    environment = dict(os.environ)
    assert measure(f"{place}:Vandal", threads=2)["status"] == "ok"
    after = flag_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
    assert before == after
    assert dict(os.environ) == environment
    assert measure(f"{place}:Curious", threads=2)["status"] == "ok"


def test_training_starts_each_call_without_gradients(place):
    found = measure(f"{place}:Learning", mode="train")
    assert found["status"] == "ok", found["error"]


def test_memory_of_a_training_step_is_read_without_the_gradients_of_the_one_before():
    cell = Cell(block=BlockRequest(target="Identity"), length=16, d_model=8, n_heads=2, mode="train")
    device = torch.device("cpu")
    run = Run(cell, load_block(cell.block, cell, device, torch.float32, 0), make_input(cell, device, seed=0))
    leaves = [run.x, *run.loaded.module.parameters()]
    run.call_prepared()
    assert all(leaf.grad is not None for leaf in leaves)
    run.prepare()
    assert all(leaf.grad is None for leaf in leaves)


def test_a_gate_that_failed_is_not_timed(place):
    events: list = []
    measure(f"{place}:Dropping", events=events)
    assert [event["phase"] for event in events] == ["build", "gate"]


def test_inputs_are_the_same_on_every_run_and_in_every_format():
    cell = Cell(block=BlockRequest(target="Identity"), length=50, d_model=32, n_heads=4, dtype="bf16")
    x = make_input(cell, CPU, seed=5)
    assert x.shape == (1, 50, 32)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, make_input(cell, CPU, seed=5))
    assert not torch.equal(x, make_input(cell, CPU, seed=6))
    assert 0.9 < float(x.float().std()) < 1.1


@pytest.mark.cuda
def test_a_whole_cell_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    cell = Cell(block=BlockRequest(target="Identity"), length=4096, dtype="bf16")
    found = measure_cell(
        cell, Plan(), device=device, config=BenchmarkConfig().to_json(), gate_cache={}, emit=lambda event: None
    )
    assert found["status"] == "ok", found["error"]
    assert len(found["samples_round"]) >= 20
    assert found["host_time_median"] > 0
    assert found["peak_memory_mb"] > 0
    assert found["reserved_memory_mb"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["train", "decode", "prefill"])
@pytest.mark.parametrize("name", ["Dense", "BLADE", "DPASSM"])
def test_every_mode_on_a_gpu(mode, name):
    device = torch.device("cuda", torch.cuda.current_device())
    cell = Cell(block=BlockRequest(target=name), length=2048, dtype="bf16", mode=mode)
    found = measure_cell(
        cell,
        Plan(runs=20, exact=True),
        device=device,
        config=BenchmarkConfig().to_json(),
        gate_cache={},
        emit=lambda event: None,
    )
    assert found["status"] == "ok", found["error"]
    assert (found["forward_share"] is not None) == (mode == "train")
    if mode == "train":
        assert 0.05 < found["forward_share"] < 0.95
    else:
        assert found["state_bytes"] > 0
    # The context is no part of a step: neither its input nor what reading it took, but for BLADE's captured graphs.
    if mode == "decode":
        assert found["peak_memory_mb"] < 2048 * 512 * 2 / 2**20 * (4 if name == "BLADE" else 1)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("name", ["Dense", "BLADE", "DPASSM", "Longformer"])
def test_a_replayed_cell_waits_for_no_host(mode, name):
    device = torch.device("cuda", torch.cuda.current_device())
    cell = Cell(block=BlockRequest(target=name), length=2048, dtype="bf16", mode=mode)
    plan, config = Plan(runs=20, exact=True, cuda_graph=True), BenchmarkConfig().to_json()
    found = measure_cell(cell, plan, device=device, config=config, gate_cache={}, emit=lambda event: None)
    assert found["status"] == "ok", found["error"]
    assert "launch_bound" not in found["warnings"]
    # A replay has no moment between its two parts.
    assert found["forward_share"] is None


def test_a_training_step_knows_its_forward_part(place):
    found = measure(f"{place}:SlowBackward", mode="train", length=8)
    assert found["status"] == "ok", found["error"]
    # Backward sleeps twice as long as forward.
    assert 0.15 < found["forward_share"] < 0.5
    assert measure("Identity")["forward_share"] is None


@pytest.mark.parametrize(("mode", "tokens"), [("decode", 90), ("prefill", 90)])
def test_the_state_is_counted_from_its_tensors(mode, tokens):
    found = measure("Dense", mode=mode)
    assert found["status"] == "ok", found["error"]
    assert found["state_bytes"] >= tokens * 2 * 32 * 4
    assert found["state_bytes"] <= 2 * (tokens + 64) * 2 * 32 * 4
    small = measure("DPASSM:window_size=8,state_dim=4", mode=mode)["state_bytes"]
    assert 7 * 2 * 32 * 4 + 4 * 4 <= small < found["state_bytes"] / 2


def test_forward_keeps_no_state(place):
    assert measure(f"{place}:Streaming", mode="prefill")["state_bytes"] == 4 * 32
    assert measure(f"{place}:Streaming", mode="forward")["state_bytes"] is None


def test_a_stream_stays_near_its_length(place):
    """However many steps are timed, none is much further on than the context that is asked for."""
    found = measure(f"{place}:Streaming", mode="decode", length=64, plan=Plan(warmup_runs=1, runs=50, exact=True))
    assert found["status"] == "ok", found["error"]
    assert found["calls_per_sample"] <= 8


@pytest.mark.parametrize(("mode", "word"), [("decode", "a step"), ("prefill", "keeps its state")])
def test_a_stream_that_goes_on_wrongly_is_wrong(place, mode, word):
    found = measure(f"{place}:Forgetful", mode=mode)
    assert found["status"] == "wrong"
    assert word in found["error"]["message"]
    assert measure(f"{place}:Forgetful")["status"] == "ok"
