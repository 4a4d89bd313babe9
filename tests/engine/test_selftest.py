"""`longctx test` finds what is wrong: in a block, in the timer, in the memory reading, and in its own process."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from longctx.engine import memory, run_selftest, selftest, timing
from longctx.errors import LongctxError

CPU = torch.device("cpu")

BLOCKS = """
import os, signal
import torch
from torch import nn


class Honest(nn.Module):
    causal = True

    def __init__(self, d_model):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.proj(x.cumsum(1) / counts[:, None])

    def reference(self, x):
        return torch.stack([self.proj(x[:, : t + 1].mean(1)) for t in range(x.shape[1])], dim=1)


class LooksAhead(Honest):
    def forward(self, x):
        return super().forward(x) + 1e-4 * x.mean(1, keepdim=True)


class WrongGradient(Honest):
    def forward(self, x):
        y = super().forward(x)
        return 1.5 * y - 0.5 * y.detach()


class Dies(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Honest):
    def forward(self, x):
        raise RuntimeError("no kernel for this")
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Checks in this process at a short length, on one thread."""
    monkeypatch.setattr(selftest, "LENGTH", 61)
    monkeypatch.setattr(selftest, "GRADIENT_LENGTH", 29)
    monkeypatch.setattr(selftest, "SPLITS", (1, 30, 19, 11))
    monkeypatch.setattr(selftest, "STEPS", 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def block_file(tmp_path):
    path = tmp_path / "blocks.py"
    path.write_text(BLOCKS)
    return path


def verdicts(path, name):
    checks = selftest.run_part(f"block:{path}:{name}", device=CPU, dtype="fp32")
    return {check.name: check.passed for check in checks}


def test_our_block_passes_all_five():
    checks = list(selftest.run_part("block:identity", device=CPU, dtype="bf16"))
    assert [check.name for check in checks] == ["forward", "gradients", "causality", "streaming", "step"]
    assert all(check.passed and check.figure <= check.limit for check in checks)


def test_what_is_wrong_with_a_block_is_found(block_file):
    assert verdicts(block_file, "Honest") == {"forward": True, "gradients": True, "causality": True}
    ahead = verdicts(block_file, "LooksAhead")
    assert not ahead["causality"] and not ahead["forward"]
    assert verdicts(block_file, "WrongGradient") == {"forward": True, "gradients": False, "causality": True}
    assert verdicts(block_file, "Raises") == {"runs": False}


def test_a_timer_that_is_off_by_three_percent_is_found(monkeypatch):
    honest = [0.050, 0.100, 0.200]
    monkeypatch.setattr(selftest, "DELAYS_S", honest)
    monkeypatch.setattr(selftest, "_check_throttled", lambda device: selftest.Check(part="timer", name="", passed=True))

    def reading(factor):
        def time_call(wait, **how):
            wait()
            return SimpleNamespace(median=wait.args[1][-1] * factor, samples=[0.0])

        return time_call

    for factor, passed in ((1.03, False), (1.005, True)):
        monkeypatch.setattr(timing, "time_call", reading(factor))
        *delays, _ = selftest.run_part("timer", device=CPU, dtype="fp32")
        assert [check.passed for check in delays] == [passed] * 3


def test_the_timer_reads_a_known_delay_and_marks_a_chip_that_stays_hot(monkeypatch):
    monkeypatch.setattr(selftest, "DELAYS_S", (0.050,))
    delay, hot = selftest.run_part("timer", device=CPU, dtype="fp32")
    assert delay.passed and delay.figure < 1.0
    assert hot.passed and "throttled" in hot.note


def test_a_chip_that_is_hot_and_not_marked_is_found(monkeypatch):
    monkeypatch.setattr(timing, "_warnings", lambda *a: [])
    assert not selftest._check_throttled(CPU).passed


def test_memory_that_cannot_be_read_is_a_failure(monkeypatch):
    monkeypatch.setattr(memory, "measure_memory", lambda *a, **k: memory.MemoryReading(reason="no /proc"))
    checks = list(selftest.run_part("memory", device=CPU, dtype="fp32"))
    assert [(check.passed, check.note) for check in checks] == [(False, "no /proc")] * 3


def test_a_memory_reading_three_mebibytes_off_is_found(monkeypatch):
    off = memory.MemoryReading(peak_bytes=(16 + 3) << 20)
    monkeypatch.setattr(memory, "measure_memory", lambda *a, **k: off)
    first = next(iter(selftest.run_part("memory", device=CPU, dtype="fp32")))
    assert not first.passed and first.figure == pytest.approx(3.0)


@pytest.mark.skipif(sys.platform != "linux", reason="peak CPU memory is read from /proc")
def test_memory_and_a_dying_block_each_in_their_own_process(block_file):
    parts = [f"block:{block_file}:Dies", "memory", "block:Identity"]
    events = list(run_selftest.run_checks(parts, device="cpu", dtype="fp32"))
    checks = [event for event in events if event["event"] == "check"]
    dead, *others = checks
    assert not dead["passed"] and "SIGKILL" in dead["note"] and "last words" in dead["note"]
    assert {check["part"] for check in others} == {"memory", "block:Identity"}
    assert all(check["passed"] for check in others), others


def test_a_silent_process_is_ended(monkeypatch):
    monkeypatch.setattr(run_selftest, "PART_TIMEOUT_S", 0.2)
    (event,) = run_selftest.run_checks(["timer"], device="cpu", dtype="fp32")
    assert not event["passed"] and event["part"] == "timer" and "nothing was heard" in event["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_said_as_such():
    with pytest.raises(LongctxError) as caught:
        list(run_selftest.run_checks(["timer"], device="cuda", dtype="auto"))
    assert caught.value.exit_code == 5


def test_the_light_half_loads_no_torch():
    code = "import sys, longctx.engine.run_selftest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
