"""The longest context that fits: tries lengths in worker processes that may die of it. No torch here.

One length is one run of the call and of its memory reading, untimed; the first one goes through the gate. Whatever ends
it is an answer: an out-of-memory error, the kernel's killer, a timeout. On a CPU a length that is predicted to need
more than most of the free memory is not tried: the machine has work besides.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from longctx.analysis.frontier import (
    CPU_SHARE,
    MEMORY,
    RESOLUTION,
    START_LENGTH,
    TIME,
    extrapolated,
    next_length,
    reached_at,
    refusals,
)
from longctx.config import MAX_LENGTH, BenchmarkConfig, BlockRequest, Cell, check_length
from longctx.engine.machine import available_memory_bytes, predict_memory_bytes
from longctx.engine.preparation import requested
from longctx.engine.rows import add_round, fault
from longctx.engine.runner import Sweep
from longctx.errors import UsageError
from longctx.events import CellFinished, CellStarted, Event
from longctx.reproduce import command_line
from longctx.results import MIB, BenchmarkResult

TIMEOUT_S = 120.0
TIME_MARGIN = 1.25
"""How far beyond the timeout a length must be predicted to lie before it is not tried."""

HOPELESS = ("unsupported", "failed", "crashed", "wrong")
"""A block that ends so at the first length is not looked at further."""


def run_limits(
    blocks: Iterable[str] | None,
    config: BenchmarkConfig,
    *,
    resolution: float = RESOLUTION,
    max_length: int | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> list[BenchmarkResult]:
    """Find the longest context of `blocks` (None: all of ours) as `config` says: a row for every length that was tried.

    The answer is read off the rows by `analysis.frontier.frontiers`. resolution: how small the gap between a length
    that fits and one that does not must be. max_length: longer ones are not asked for. vary: as `run_sweep` takes it,
    and each combination of values has a limit of its own. Raises as `run_sweep` does.
    """
    if not 0.001 <= resolution <= 0.5:
        raise UsageError(f"the resolution must lie between 0.001 and 0.5, not {resolution:g}", "0.05 is five percent")
    if max_length is not None:
        check_length(max_length)
    if config.isolation == "none":
        raise UsageError("limits needs processes of its own", "what runs out of memory must not be this one")
    config = dataclasses.replace(
        config,
        sequence_lengths=[min(START_LENGTH, max_length or START_LENGTH)],
        rounds=1,
        gate=False,
        energy=False,
        output_file=config.output_file or time.strftime("limits-%Y%m%d-%H%M%S.json"),
    )
    requests = requested(blocks or config.blocks)
    asked = {"resolution": resolution, "max_length": max_length, "vary": vary}
    command = command or limits_command(config, map(str, requests), **asked)
    return _Search(requests, config, **asked, on_event=on_event, command=command).carry_out()


def limits_defaults() -> BenchmarkConfig:
    """What `longctx limits` does when nothing is said."""
    return BenchmarkConfig(timeout=TIMEOUT_S, fixed_runs=False)


def limits_command(
    config: BenchmarkConfig,
    blocks: Iterable[str],
    *,
    resolution: float,
    max_length: int | None,
    vary: Mapping[str, Sequence[Any]] | None = None,
) -> str:
    """`longctx limits ...` that looks for the same again."""
    defaults = limits_defaults()
    config = dataclasses.replace(config, sequence_lengths=defaults.sequence_lengths, rounds=defaults.rounds)
    config = dataclasses.replace(config, gate=True, energy=True)
    more = [] if resolution == RESOLUTION else ["--resolution", f"{resolution:g}"]
    more += [] if max_length is None else ["--max-length", str(max_length)]
    return command_line("limits", config, blocks, defaults=defaults, vary=vary, more=more)


class _Search(Sweep):
    """A sweep whose lengths are found as it goes."""

    def __init__(
        self,
        requests: list[BlockRequest],
        config: BenchmarkConfig,
        *,
        resolution: float,
        max_length: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(requests, config, **kwargs)
        self.resolution, self.max_length = resolution, max_length
        self.took: dict[Cell, float] = {}
        """Seconds that a length took as a whole."""
        self.known_when_skipped: dict[Cell, int] = {}

    def _circumstances(self, cell: Cell) -> dict[str, Any]:
        return {"kind": "limits"}

    def _asked_for(self, cell: Cell) -> tuple[dict[str, Any], str]:
        config, command = super()._asked_for(cell)
        return config | {"limits": {"resolution": self.resolution, "max_length": self.max_length}}, command

    def _take_over(self) -> None:
        """Name the first cells, and take over every length of the file that was tried under the same circumstances."""
        starts = list(self.cells)
        for start in starts:
            lengths = {row.sequence_length for row in self.earlier.values() if row.block_name == start.block.name}
            lengths = {length for length in lengths if not self.max_length or length <= self.max_length}
            self.cells += [dataclasses.replace(start, length=length) for length in sorted(lengths - {start.length})]
        super()._take_over()
        for row in self.rows.values():
            row.config["limits"] = {"resolution": self.resolution, "max_length": self.max_length}
        self.cells = [cell for cell in self.cells if cell in self.rows or cell in starts]

    def _finished_rows(self) -> list[BenchmarkResult]:
        order = {start: index for index, start in enumerate(self._starts())}
        cells = sorted(self.rows, key=lambda cell: (order[dataclasses.replace(cell, length=1)], cell.length))
        return [self.rows[cell] for cell in cells]

    # -- the search ---------------------------------------------------------------------------------------------

    def _run_rounds(self) -> None:
        if self.separate_memory:
            # It has looked at the blocks; what it holds is wanted now.
            self._end_round()
        while (cell := self._next()) is not None:
            self._check_time()
            self.emit(CellStarted(cell=cell, round=0))
            self._try(cell)
            self._save()
            self.emit(CellFinished(cell=cell, round=0, result=self.rows[cell]))

    def _next(self) -> Cell | None:
        """The shortest of the lengths that the blocks want next, so that all have something when the time is over."""
        wanted = []
        for start in self._starts():
            length = self._next_length(start)
            if length is not None:
                wanted.append(dataclasses.replace(start, length=length))
        return min(wanted, key=lambda cell: cell.length, default=None)

    def _starts(self) -> list[Cell]:
        """What has a limit of its own, each a block in a setting, as its cell of length 1."""
        return list(dict.fromkeys(dataclasses.replace(cell, length=1) for cell in self.cells))

    def _next_length(self, start: Cell) -> int | None:
        tried = self._tried(start)
        fits = max((cell.length for cell, row in tried.items() if row.ok), default=0)
        ended = {cell.length: row.status for cell, row in tried.items() if row.ok or not self._worth_again(cell)}
        fails, refused = refusals(ended, fits)
        if fails is not None and not fits and (ended[fails] in HOPELESS or start.block in self.lost):
            return None
        return next_length(
            fits,
            fails,
            longest=self.max_length or MAX_LENGTH,
            resolution=self.resolution,
            start=self.config.sequence_lengths[0],
            guess=self._guess(start),
            refused=refused,
        )

    def _tried(self, start: Cell) -> dict[Cell, BenchmarkResult]:
        return {c: row for c, row in self.rows.items() if dataclasses.replace(c, length=start.length) == start}

    def _worth_again(self, cell: Cell) -> bool:
        """Whether a length that was only predicted not to fit may fit, by what was learnt since."""
        known = self.known_when_skipped.get(cell)
        return known is not None and known < self._count_ok(cell) and self._why_not(cell) is None

    def _count_ok(self, cell: Cell) -> int:
        return sum(row.ok for row in self._tried(cell).values())

    def _guess(self, cell: Cell) -> float | None:
        """The length at which memory or time should run out."""
        known = [
            reached_at(self._totals(cell), self._usable_bytes()),
            reached_at(self._times(cell), self.config.timeout),
        ]
        return min((length for length in known if length), default=None)

    def _totals(self, cell: Cell) -> dict[int, float]:
        return {
            c.length: row.total_memory_mb * MIB
            for c, row in self._tried(cell).items()
            if row.ok and row.total_memory_mb
        }

    def _times(self, cell: Cell) -> dict[int, float]:
        return {c.length: self.took[c] for c, row in self._tried(cell).items() if row.ok and c in self.took}

    def _usable_bytes(self) -> float:
        """What a length may need of the device's memory."""
        if self.environment.get("gpu"):
            return self.environment.get("gpu_memory_free_bytes") or 0.0
        return CPU_SHARE * available_memory_bytes()

    # -- one length ---------------------------------------------------------------------------------------------

    def _try(self, cell: Cell) -> None:
        if cell not in self.keys:
            self.cells.append(cell)
            self._name(cell)
        row = self._new_row(cell)
        found = self._why_not(cell)
        if found is None:
            self.known_when_skipped.pop(cell, None)
            found = self._measure(cell)
        elif found["status"] == "skipped":
            self.known_when_skipped[cell] = self._count_ok(cell)
        add_round(row, cell, found)
        self.rows[cell] = row

    def _measure(self, cell: Cell) -> dict[str, Any]:
        first = not any(row.ok for row in self._tried(cell).values())
        job = self._job(cell, gate=first, timing=False, memory=True)
        worker = self.memory or self.timing or self._ready(memory=self.separate_memory)
        start = time.monotonic()
        found, worker = self._ask(worker, cell, job)
        self.took[cell] = time.monotonic() - start - (found.get("gate_s") or 0.0)
        self.memory, self.timing = (worker, None) if self.separate_memory else (None, worker)
        return found

    def _why_not(self, cell: Cell) -> dict[str, Any] | None:
        """What becomes of a length that is not tried, or None if it is."""
        if lost := self.lost.get(cell.block):
            return fault(lost.status, lost.kind, f"while it was loaded: {lost.message}", lost.log_tail)
        on_gpu = bool(self.environment.get("gpu"))
        free = self.environment["gpu_memory_total_bytes"] if on_gpu else available_memory_bytes()
        least = predict_memory_bytes(cell, self.identities[cell.block]["options"])
        if least > free:
            return fault("skipped", MEMORY, f"needs at least {_gib(least)}, {_gib(free)} are there")
        if not on_gpu:
            needed, usable = extrapolated(self._totals(cell), cell.length), CPU_SHARE * free
            if needed and needed > usable:
                return fault("skipped", MEMORY, f"would need about {_gib(needed)}, {_gib(usable)} may be used")
        took = extrapolated(self._times(cell), cell.length)
        if took and took > TIME_MARGIN * self.config.timeout:
            return fault("skipped", TIME, f"would take about {took:,.0f} s, --timeout is {self.config.timeout:g} s")
        return None


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
