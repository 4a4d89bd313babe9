"""Who is sampled when, in two processes that share a device, and when a round is over."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny_sweeps import paired_config

from longctx.engine import process, timing, turns
from longctx.engine.timing import time_call
from longctx.engine.turns import Turns


def turns_of(*call_s: float, kind: str = "cpu", seed: str = "0", **values) -> Turns:
    return Turns(dict(enumerate(call_s)), paired_config(Path("."), **values), kind=kind, seed=seed)


def take(plan: Turns, *, ratio: float = 1.0, most: int = 1000) -> list[int]:
    """Play a round with steady sides; the order in which they were asked."""
    asked = []
    while not plan.over and len(asked) < most:
        for which in plan.order():
            asked.append(which)
            plan.add(which, [0.01 * (ratio if which == 0 else 1.0)] * plan.job(which)["count"])
    return asked


def test_sides_alternate_and_neither_always_begins():
    asked = take(turns_of(0.01, 0.01))
    first, second = asked[:2]
    assert {first, second} == {0, 1}
    assert asked[:6] == [first, second, second, first, first, second]
    assert {take(turns_of(0.01, 0.01, seed=str(n)))[0] for n in range(20)} == {0, 1}


def test_a_turn_is_a_few_short_samples_and_the_same_for_both():
    assert turns_of(0.002, 0.0021).job(0) == {"job": "take", "count": 10, "calls": 1}
    assert turns_of(0.0002, 0.00021).job(1) == {"job": "take", "count": 20, "calls": 5}
    assert turns_of(0.5, 0.01).job(1)["count"] == 1
    assert turns_of(1e-6, 1e-6).job(0)["count"] <= turns.MAX_TURN
    assert turns_of(4e-6, 4e-6, kind="cuda").job(0) == {"job": "take", "count": 50, "calls": 3}
    # Speeds far apart: each side fills its own samples.
    far = turns_of(0.0001, 0.01)
    assert (far.job(0)["calls"], far.job(1)["calls"]) == (10, 1)


def test_a_round_ends_when_the_ratio_is_known_or_the_time_is_up(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(turns.time, "monotonic", lambda: 0.0)
    assert len(take(turns_of(0.01, 0.01))) == 2 * turns.LEAST_TURNS
    assert len(take(turns_of(2.0, 2.0))) == 2 * turns.LEAST_TURNS
    noisy = turns_of(0.01, 0.01)
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock) * 0.1)
    asked = 0
    while not noisy.over:
        for which in noisy.order():
            noisy.add(which, [0.01 * (1 + (asked % 7) / 7)])
            asked += 1
    assert asked > turns.LEAST_TURNS * 2
    assert next(clock) * 0.1 >= turns.MORE_S


def test_exact_runs_are_exact():
    plan = turns_of(0.002, 0.002, benchmark_runs=23, fixed_runs=True)
    take(plan)
    assert [len(samples) for samples in plan.samples.values()] == [23, 23]


def test_a_side_left_alone_takes_the_least_and_stops():
    assert len(take(turns_of(0.01))) == turns.LEAST_TURNS
    plan = turns_of(0.01, 0.01)
    take(plan, most=2)
    plan.lose(0)
    assert set(take(plan)) == {1}
    plan.lose(1)
    assert plan.over


def test_samples_come_when_they_are_ordered(monkeypatch):
    monkeypatch.setattr(timing, "MIN_WARM_S", {"cpu": 0.0})
    monkeypatch.setattr(timing, "MAX_WARM_S", {"cpu": 0.01})
    calls, events = [], []
    orders = iter([{"job": "take", "count": 2, "calls": 3}, {"job": "take", "count": 1, "calls": 3}, {"job": "end"}, 1])

    def emit(event):
        events.append((event, len(calls)))

    plan = SimpleNamespace(warmup_runs=1, runs=50, exact=True, budget_s=9.0)
    cpu = torch.device("cpu")
    found = time_call(lambda: calls.append(time.sleep(0.001)), device=cpu, plan=plan, emit=emit, orders=orders)
    told = [(event["event"], count) for event, count in events if event["event"] != "phase"]
    warm = told[0][1]
    # Each turn begins with a call that does not count.
    assert told == [("ready", warm), ("taken", warm + 7), ("taken", warm + 11)]
    assert [len(event["samples"]) for event, _ in events if event["event"] == "taken"] == [2, 1]
    assert len(found.samples) == 3
    assert (found.calls_per_sample, found.contention) == (3, None)
    assert list(orders) == [1]


def test_threads_of_a_side_do_not_spin_while_the_other_has_its_turn(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinite")
    shared = {"memory": False, "elsewhere": False}
    assert process._environment(2, in_turns=False, **shared)["GOMP_SPINCOUNT"] == "infinite"
    assert int(process._environment(2, in_turns=True, **shared)["GOMP_SPINCOUNT"]) <= 10_000
