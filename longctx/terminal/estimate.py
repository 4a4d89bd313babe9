"""How long a running sweep has still to go."""

from __future__ import annotations

import time
from collections.abc import Mapping

from longctx.config import Cell
from longctx.events import CellFinished, SweepStarted
from longctx.results import BenchmarkResult


class Estimate:
    """How much of a sweep is done and how long the rest takes, from predicted costs and measured durations.

    A cell's duration is predicted as `fixed + slope * weight`, fitted to what was measured; once a cell has run in a
    later round, where nothing is checked any more, its own duration is the prediction.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.weights: dict[Cell, float] = {}
        self.rounds = 1
        self.left: dict[Cell, int] = {}
        """Rounds that a cell has still to be measured in."""
        self.durations: dict[Cell, float] = {}
        self._running: tuple[Cell, float] | None = None
        """The cell that is being measured, and since when."""

    def start(self, event: SweepStarted, reused: Mapping[Cell, BenchmarkResult]) -> None:
        self.started = time.monotonic()
        self.rounds = event.rounds
        self.weights = {cell: max(0.0, event.weights.get(cell, 1.0)) for cell in event.cells}
        self.left = {cell: self._rounds_left(reused.get(cell)) for cell in event.cells}

    def _rounds_left(self, result: BenchmarkResult | None) -> int:
        if result is None:
            return self.rounds
        return max(0, self.rounds - len(result.samples)) if result.ok else 0

    def cell_started(self, cell: Cell) -> None:
        self._running = cell, time.monotonic()

    def cell_finished(self, event: CellFinished) -> None:
        if self._running is not None and event.result.status != "skipped":
            took = time.monotonic() - self._running[1]
            once = (event.result.gate_s or 0.0) + (event.result.first_call_s or 0.0) if event.round == 0 else 0.0
            self.durations[event.cell] = max(0.05 * took, took - once)
        self._running = None
        self.left[event.cell] = self._rounds_left(event.result)

    def runs_left(self) -> int:
        """Measurements still to come."""
        return sum(self.left.values())

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _predict(self) -> tuple[float, float] | None:
        """(fixed, slope) of duration over weight, None until something was measured."""
        points = [(self.weights.get(cell, 1.0), took) for cell, took in self.durations.items()]
        if not points:
            return None
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
        slope = max(0.0, min(slope, mean_y / mean_x if mean_x else 0.0))
        return max(0.0, mean_y - slope * mean_x), slope

    def _left_s(self) -> float | None:
        line = self._predict()
        if line is None:
            return None

        def one(cell: Cell) -> float:
            return self.durations.get(cell, line[0] + line[1] * self.weights.get(cell, 1.0))

        left = sum(runs * one(cell) for cell, runs in self.left.items() if runs)
        if self._running is not None:
            # One that takes longer than predicted takes nothing off the others.
            cell, since = self._running
            left -= min(time.monotonic() - since, one(cell))
        return max(0.0, left)

    def remaining_s(self) -> float | None:
        """Seconds still to go; None until two cells were measured, which is when it begins to mean something."""
        return self._left_s() if len(self.durations) >= 2 else None

    def share(self) -> float:
        """Done part of the whole, 0 to 1, by time."""
        left = self._left_s()
        if left is None:
            return 0.0
        whole = self.elapsed_s() + left
        return min(1.0, self.elapsed_s() / whole) if whole else 1.0
