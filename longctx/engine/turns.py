"""Who is sampled when, in two processes that share a device: short turns, A B B A A B, until their ratio is known.

A slow stretch of the machine then falls on both sides, and a drift on both ends of a pair. No torch here.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from longctx.analysis.statistics import relative_half_width
from longctx.config import BenchmarkConfig

MIN_SAMPLE_S = {"cpu": 1e-3, "cuda": 10e-6}
"""Shorter than in other sweeps: what falls on one call should spoil that one alone, and in a sample of several calls
the output of one is still there when the next asks for memory, at a price that differs from process to process."""

TURN_S, MAX_TURN = 20e-3, 50
"""A turn is as many samples as take this long, and no more than so many."""

GOAL = {"cpu": 0.01, "cuda": 0.002}
"""A round is over when the ratio is known this well, or its time is up."""

BUDGET_S, DOUBTFUL, MORE_S = 4.0, 2.0, 8.0
"""Seconds for a round; the larger number where the interval is still so many times wider than it should be."""

LEAST_TURNS = 6
SLOW_S, SLOW_TURNS, SLOW_BUDGET_S = 0.5, 3, 12.0
"""With calls of this length a turn is one of them."""


class Turns:
    """One round of a pair, or of a side that is left without the other. Sides are 0 and 1."""

    def __init__(
        self,
        call_s: Mapping[int, float],
        config: BenchmarkConfig,
        *,
        kind: str,
        seed: str,
        most_calls: int | None = None,
    ) -> None:
        """call_s: seconds a call of each side that is ready. kind: cpu or cuda. seed: decides who begins. most_calls:
        of a sample, at most."""
        self.kind = kind
        self.exact = config.benchmark_runs if config.exact_runs else None
        self.calls = {which: max(1, math.ceil(MIN_SAMPLE_S[kind] / time_s)) for which, time_s in call_s.items()}
        if max(call_s.values()) < 2 * min(call_s.values()):
            # Samples of more calls spread less, and around another middle where noise goes one way.
            self.calls = dict.fromkeys(call_s, max(self.calls.values()))
        self.calls = {which: min(calls, most_calls or calls) for which, calls in self.calls.items()}
        slowest = max(call_s[which] * calls for which, calls in self.calls.items())
        self.slow = slowest >= SLOW_S
        self.count = min(MAX_TURN, max(1, math.ceil(TURN_S / slowest)))
        self.samples: dict[int, list[float]] = {which: [] for which in call_s}
        self.medians: dict[int, list[float]] = {which: [] for which in call_s}
        self._first = list(call_s)
        random.Random(seed).shuffle(self._first)
        self._began = time.monotonic()

    def order(self) -> list[int]:
        """The sides in the order of the next pair of turns."""
        done = max(map(len, self.medians.values()))
        order = self._first if done % 2 == 0 else self._first[::-1]
        return [which for which in order if which in self.samples]

    def job(self, which: int) -> dict[str, Any]:
        """What to ask of a side whose turn it is."""
        count = self.count if self.exact is None else min(self.count, self.exact - len(self.samples[which]))
        return {"job": "take", "count": count, "calls": self.calls[which]}

    def add(self, which: int, samples: list[float]) -> None:
        """What a side took in its turn, seconds a call."""
        self.samples[which] += samples
        self.medians[which].append(statistics.median(samples))

    def lose(self, which: int) -> None:
        """Go on without a side that has failed."""
        del self.samples[which], self.medians[which]

    @property
    def over(self) -> bool:
        """Whether enough is known, or no time left, or nobody to sample. Asked after each pair of turns."""
        if not self.samples:
            return True
        turns, samples = next(iter(self.medians.values())), next(iter(self.samples.values()))
        if self.exact is not None:
            return len(samples) >= self.exact
        elapsed = time.monotonic() - self._began
        if len(turns) < (SLOW_TURNS if self.slow else LEAST_TURNS):
            return False
        if len(self.medians) == 1:
            return True
        ratios = [ours / other for ours, other in zip(*self.medians.values(), strict=True)]
        width = relative_half_width(ratios)
        if width is not None and width <= GOAL[self.kind]:
            return True
        doubtful = width is None or width > DOUBTFUL * GOAL[self.kind]
        return elapsed >= (SLOW_BUDGET_S if self.slow else MORE_S if doubtful else BUDGET_S)
