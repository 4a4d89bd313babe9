"""Energy of a call on a GPU, by the counter of its driver. Joules."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from longctx.engine.device import nvml_snapshot

WINDOW_S = 2.0
"""The counter moves in steps of up to a tenth of a second."""

BATCH_S = 0.2


def energy_per_call(call: Callable[[], Any], *, device: torch.device, window_s: float = WINDOW_S) -> float | None:
    """Joules that the whole GPU takes for a `call()`, over at least `window_s` seconds of calls back to back.

    Idle power is part of it: it is what the work costs on this card. None where the driver tells no energy.
    """
    if _counter_j(device) is None:
        return None
    call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    batch = max(1, round(BATCH_S / max(time.perf_counter() - start, 1e-6)))
    before, calls, began = _counter_j(device), 0, time.perf_counter()
    while time.perf_counter() - began < window_s:
        for _ in range(batch):
            call()
        torch.cuda.synchronize(device)
        calls += batch
    after = _counter_j(device)
    if before is None or after is None or after <= before:
        return None
    return (after - before) / calls


def _counter_j(device: torch.device) -> float | None:
    snapshot = nvml_snapshot(device)
    energy = snapshot.get("energy_mj") if snapshot else None
    return None if energy is None else energy / 1e3
