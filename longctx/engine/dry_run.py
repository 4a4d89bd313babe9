"""What a sweep would do, without doing it: its cells, and the least that each can take. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.config import LIGHTNING, BenchmarkConfig, Cell
from longctx.engine.machine import predict_memory_bytes
from longctx.engine.peaks import Peaks, load_peaks, peaks_key
from longctx.engine.preparation import START_TIMEOUT_S, requested
from longctx.engine.process import Refused, WorkerLost
from longctx.engine.runner import Sweep, results_path
from longctx.results import BenchmarkResult, read_results

STREAMED = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell and what would become of it. Figures are lower bounds, None where nothing is known."""

    cell: Cell
    verdict: str
    """run, kept (by --resume), or the status that its row would have: skipped, unsupported, failed, crashed, oom."""
    reason: str | None = None
    flops: float | None = None
    bytes: float | None = None
    state_bytes: float | None = None
    least_time_s: float | None = None
    """Of one call, by the best rates that this machine was ever seen to reach."""
    least_memory_bytes: float | None = None
    """Weights, input, output, gradients and state, whatever the implementation."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep would do. peaks: None where none are kept for this machine."""

    cells: tuple[PlannedCell, ...]
    rounds: int
    environment: Mapping[str, Any]
    free_bytes: float
    peaks: Peaks | None


def plan_sweep(
    blocks: Iterable[str] | None, config: BenchmarkConfig, *, vary: Mapping[str, Sequence[Any]] | None = None
) -> SweepPlan:
    """What `run_sweep` with the same arguments would do. Measures nothing and writes nothing. Raises as it does."""
    return _DryRun(requested(blocks or config.blocks), config, vary=vary, on_event=None, command="").plan()


class _DryRun(Sweep):
    """A sweep that ends where measuring would begin. It takes no lock: it disturbs no other sweep."""

    def plan(self) -> SweepPlan:
        path = results_path(self.config)
        if self.config.resume and path.exists():
            self.earlier = {(row.key, row.block_name): row for row in read_results(path) if row.key}
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._look()
            peaks = load_peaks(peaks_key(self.environment))
            return SweepPlan(
                cells=tuple(self._planned(cell, peaks) for cell in self.cells),
                rounds=self.config.rounds,
                environment=self.environment,
                free_bytes=self._free_bytes(),
                peaks=peaks,
            )

    def _planned(self, cell: Cell, peaks: Peaks | None) -> PlannedCell:
        identity, row = self.identities[cell.block], self.rows.get(cell)
        if lost := self.lost.get(cell.block):
            return PlannedCell(cell=cell, verdict=lost.status, reason=f"while it was loaded: {lost.message}")
        if row is not None and not self._is_missing(row):
            return PlannedCell(cell=cell, verdict="kept", reason=f"{row.status} in the results file")
        # Lightning trains a model that has more than these blocks: theirs is the least that it can take.
        step = dataclasses.replace(cell, mode="train") if cell.mode == LIGHTNING else cell
        if step.mode not in identity["modes"]:
            return PlannedCell(cell=cell, verdict="unsupported", reason=f"it has {', '.join(identity['modes'])}")
        cost, failure = self._cost(step)
        memory = predict_memory_bytes(cell, identity["options"])
        if cost and cell.mode in STREAMED:
            memory += cost["state_bytes"]
        least_s = None
        if cost and peaks:
            least_s = peaks.bound_s(flops=cost["flops"], bytes=cost["bytes"], dtype=cell.dtype)
        skip = None if row is not None else self._why_skip(cell)
        return PlannedCell(
            cell=cell,
            verdict="failed" if failure else "skipped" if skip else "run",
            reason=failure or skip,
            **(cost or {}),
            least_time_s=least_s or None,
            least_memory_bytes=memory,
        )

    def _is_missing(self, row: BenchmarkResult) -> bool:
        """Whether a row that is there lacks rounds or memory."""
        return row.ok and (len(row.samples) < self.config.rounds or self._lacks_memory(row))

    def _cost(self, cell: Cell) -> tuple[dict[str, float] | None, str | None]:
        """(FLOPs, bytes and state of a cell by its cost model, why there are none)."""
        self.timing = self.timing or self._ready()
        try:
            answer = self.timing.ask({"job": "cost", "cell": cell.to_json()}, timeout=START_TIMEOUT_S)
        except Refused as refused:
            return None, refused.message
        except WorkerLost as lost:
            self._forget(self.timing)
            return None, lost.message
        return answer["cost"], None
