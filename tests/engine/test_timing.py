"""The timer is held against delays that are known, and its stopping rules against calls that are scripted."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from longctx.engine import timing
from longctx.engine.timing import time_call

CPU = torch.device("cpu")


def plan(**values):
    return SimpleNamespace(**{"warmup_runs": 1, "runs": 5, "exact": True, "budget_s": 0.5, **values})


@pytest.fixture
def brief_warmup(monkeypatch):
    monkeypatch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(timing, "MAX_WARM_S", {"cpu": 0.05, "cuda": 0.05})


@pytest.mark.parametrize("delay_s", [0.050, 0.100])
def test_a_known_delay_is_read_within_two_percent(brief_warmup, delay_s):
    found = time_call(lambda: time.sleep(delay_s), device=CPU, plan=plan())
    assert len(found.samples) == 5
    # A sleep may last longer where others are at work, and never shorter.
    assert min(found.samples) == pytest.approx(delay_s, rel=0.02)
    assert found.median == sorted(found.samples)[2] >= delay_s
    assert found.calls_per_sample == 1
    assert found.host_time_median is None


def test_short_calls_are_put_together_until_a_sample_is_long_enough(brief_warmup):
    found = time_call(lambda: time.sleep(0.001), device=CPU, plan=plan())
    assert 2 <= found.calls_per_sample <= 10
    assert 0.001 <= found.median < 0.01
    assert min(found.samples) * found.calls_per_sample >= 0.8 * timing.MIN_SAMPLE_S["cpu"]


def test_a_slow_first_call_stays_out_of_the_samples(brief_warmup):
    calls = []

    def fn():
        calls.append(None)
        time.sleep(0.3 if len(calls) == 1 else 0.02)

    found = time_call(fn, device=CPU, plan=plan())
    assert found.first_call_s >= 0.3
    assert max(found.samples) < 0.2


def test_exact_runs_are_exact_and_open_ended_runs_are_at_least_so_many(brief_warmup):
    fixed = time_call(lambda: time.sleep(0.012), device=CPU, plan=plan(runs=3))
    assert len(fixed.samples) == 3
    turn = iter(range(10**6))

    def uneven():
        time.sleep(0.012 if next(turn) % 2 else 0.024)

    free = time_call(uneven, device=CPU, plan=plan(runs=4, exact=False))
    assert len(free.samples) > 10
    assert "unstable" in free.warnings


def test_very_slow_calls_are_few(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_WARM_S", 0.01)
    monkeypatch.setattr(timing, "VERY_SLOW_S", 0.015)
    found = time_call(
        lambda: time.sleep(0.02), device=CPU, plan=plan(exact=False, runs=10), warmed=3, call_s=0.02, first_call=False
    )
    assert len(found.samples) == 3
    assert found.first_call_s is None
    assert found.warmups == 3


def test_inputs_go_round_and_preparation_is_outside_the_sample(brief_warmup):
    seen = []

    def fn(x):
        seen.append(x)
        time.sleep(0.011)

    found = time_call(fn, device=CPU, plan=plan(), inputs=["a", "b", "c"], before_sample=lambda: time.sleep(0.03))
    assert set(seen) == {"a", "b", "c"}
    assert seen[-3] != seen[-2] != seen[-1]
    assert found.median < 0.03


def test_events_tell_phases_and_samples(brief_warmup):
    events = []
    found = time_call(lambda: time.sleep(0.011), device=CPU, plan=plan(runs=3), emit=events.append)
    assert [e["phase"] for e in events if e["event"] == "phase"] == ["warmup", "timing"]
    samples = [e for e in events if e["event"] == "sample"]
    assert samples[-1]["count"] == 3
    assert samples[-1]["seconds"] == found.samples[-1]


def test_garbage_collection_rests_while_timing_and_comes_back(brief_warmup):
    seen = []

    def fn():
        seen.append(gc.isenabled())
        time.sleep(0.011)

    time_call(fn, device=CPU, plan=plan(runs=1))
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        time_call(lambda: 1 / 0, device=CPU, plan=plan())
    assert gc.isenabled()


def test_an_adjusted_wall_clock_changes_nothing(brief_warmup, monkeypatch):
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
    found = time_call(lambda: time.sleep(0.02), device=CPU, plan=plan(runs=3))
    assert 0.02 <= found.median < 1.0


@pytest.mark.cuda
def test_device_time_follows_the_work_queued():
    device = torch.device("cuda", torch.cuda.current_device())
    times = [
        time_call(lambda n=cycles: torch.cuda._sleep(n), device=device, plan=plan(runs=20)).median
        for cycles in (2_000_000, 8_000_000)
    ]
    assert times[1] / times[0] == pytest.approx(4.0, rel=0.05)


@pytest.mark.cuda
def test_work_on_another_stream_is_noticed():
    device = torch.device("cuda", torch.cuda.current_device())
    side = torch.cuda.Stream()

    def fn():
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)

    assert time_call(fn, device=device, plan=plan(runs=20)).device_sync_mismatch


def test_a_block_cannot_turn_the_clock_back(brief_warmup, monkeypatch):
    real = time.perf_counter_ns

    def turned(x):
        monkeypatch.setattr(time, "perf_counter_ns", lambda: real() // 10)
        monkeypatch.setattr(time, "perf_counter", lambda: real() * 1e-10)
        time.sleep(0.02)

    found = time_call(turned, device=CPU, plan=plan(runs=3, exact=True), inputs=[torch.zeros(1)])
    assert found.median >= 0.02


def test_values_change_between_samples_so_that_nothing_can_be_looked_up(brief_warmup):
    seen = []
    inputs = [torch.ones(4, 8), torch.ones(4, 8)]
    time_call(
        lambda x: (seen.append((x.data_ptr(), x.sum().item())), time.sleep(0.011)),
        device=CPU,
        plan=plan(runs=4, exact=True),
        inputs=inputs,
    )
    assert len(set(seen)) == len(seen)


def test_work_that_goes_on_in_another_thread_is_noticed(brief_warmup):
    def work():
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            torch.ones(64, 64).sum()

    running = []

    def hands_on():
        time.sleep(0.011)
        running.append(threading.Thread(target=work))
        running[-1].start()

    thrice = plan(runs=3, exact=True)
    found = time_call(hands_on, device=CPU, plan=thrice)
    for thread in running:
        thread.join()
    assert "another thread" in found.device_sync_mismatch
    honest = time_call(lambda: torch.ones(1500, 1500) @ torch.ones(1500, 1500), device=CPU, plan=thrice)
    assert honest.device_sync_mismatch is None
