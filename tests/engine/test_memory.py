"""The memory reading is held against allocations that are known, in a process set up as the memory worker is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from longctx.engine import memory
from longctx.engine.process import MALLOC_ENVIRONMENT

LADDER = """
import json, torch
from longctx.engine.memory import cpu_peak_bytes
torch.set_num_threads(1)
def ones(mib): return torch.ones(mib << 18)
def spike(): ones(16); return None
cases = {
    "256": lambda: ones(256), "60": lambda: [ones(5) for _ in range(12)], "16": spike, "64": lambda: ones(64),
    "4": lambda: ones(4),
}
ones(300)
print(json.dumps({name: [cpu_peak_bytes(call) / 2**20 for _ in range(5)] for name, call in cases.items()}))
"""


def in_memory_process(source: str, **environment: str):
    env = {**os.environ, **MALLOC_ENVIRONMENT, **environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from Linux' /proc")


@linux
def test_known_allocations_are_read_within_two_mib_every_time():
    for expected, readings in in_memory_process(LADDER).items():
        assert readings == pytest.approx([float(expected)] * 5, abs=2.0), expected


@linux
def test_a_linear_layer_takes_its_output_and_holds_its_tensors():
    found = in_memory_process(
        """
import json, torch
from dataclasses import asdict
from longctx.engine.memory import measure_memory
layer, x = torch.nn.Linear(256, 2048), torch.ones(1, 8192, 256)
with torch.inference_mode():
    print(json.dumps(asdict(measure_memory(lambda: layer(x), device=x.device, module=layer, inputs=[x]))))
"""
    )
    output = 8192 * 2048 * 4
    assert found["peak_bytes"] == pytest.approx(output, abs=2 << 20)
    assert found["allocated_bytes"] == output + 8192 * 256 * 4 + (256 + 1) * 2048 * 4
    assert found["reserved_bytes"] is None
    assert found["reason"] is None


@linux
def test_a_call_that_leaves_memory_behind_is_told_from_one_that_fills_a_cache():
    found = in_memory_process(
        """
import collections, json, torch
from longctx.engine.memory import measure_memory
kept, cache, last = [], {}, collections.deque(maxlen=8)
def remembers(): last.append(torch.ones(8 << 18))
def hoards(): kept.append(torch.ones(8 << 18))
def fills(): cache.setdefault("once", torch.ones(8 << 18))
def plain(): return torch.ones(8 << 18)
read = lambda call: measure_memory(call, device=torch.device("cpu"), module=torch.nn.Linear(2, 2), inputs=[]).grows
print(json.dumps([read(plain), read(fills), read(remembers), read(hoards)]))
"""
    )
    assert found == [False, False, False, True]


def test_without_the_allocator_settings_there_is_a_reason_and_no_number(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    layer = nn.Linear(4, 4)
    reading = memory.measure_memory(
        lambda: layer(torch.ones(1, 4)), device=torch.device("cpu"), module=layer, inputs=[]
    )
    assert reading.peak_bytes is None
    assert reading.allocated_bytes == (4 * 4 + 4 + 4) * 4
    assert "MALLOC" in reading.reason or "/proc" in reading.reason


def test_storages_are_counted_once_wherever_they_lie():
    @dataclass
    class State:
        keys: torch.Tensor
        more: dict

    base = torch.zeros(10, 10)
    state = State(base[:5], {"view": base[5:], "other": torch.zeros(3, dtype=torch.float64)})
    assert memory.tensor_bytes([base, (base.t(), [state]), None, "text"]) == 400 + 24


@pytest.mark.cuda
def test_on_a_gpu_too_a_call_that_leaves_memory_behind_is_told():
    device = torch.device("cuda", torch.cuda.current_device())
    layer, kept = nn.Linear(8, 8).to(device), []

    def grows(call):
        return memory.measure_memory(call, device=device, module=layer, inputs=[]).grows

    assert not grows(lambda: torch.ones(8 << 18, device=device))
    assert grows(lambda: kept.append(torch.ones(8 << 18, device=device)))


@pytest.mark.cuda
def test_cuda_peak_is_exact_in_any_order():
    device = torch.device("cuda", torch.cuda.current_device())
    layer = nn.Linear(8, 8).to(device)

    def need(mib: int):
        return lambda: torch.empty(mib << 20, dtype=torch.int8, device=device)[:16].clone()

    # Graphs of other blocks in this process are not this call's.
    floor = memory.resting(device)
    readings = {}
    for mib in (4, 64, 1, 64, 4, 1):
        reading = memory.measure_memory(need(mib), device=device, module=layer, inputs=[], floor=floor)
        readings.setdefault(mib, set()).add(reading.peak_bytes)
    assert readings == {mib: {(mib << 20) + 16} for mib in readings}
