"""What a running sweep tells: the engine yields these, the terminal draws them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longctx.config import Cell
from longctx.results import BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class SweepStarted:
    """The plan is made and the machine is known; nothing is measured yet."""

    cells: tuple[Cell, ...]
    rounds: int
    environment: dict[str, Any]
    path: str | None
    """Where results are saved, or None."""
    reused: dict[Cell, BenchmarkResult] = field(default_factory=dict)
    """Results taken over from the file by --resume."""
    weights: dict[Cell, float] = field(default_factory=dict)
    """Predicted cost of one measurement of each cell, in arbitrary units: for time estimates."""


@dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """A round has cells to measure, and begins."""

    index: int
    """0, 1, ..."""
    cells: tuple[Cell, ...]
    """In the order in which they will run."""


@dataclass(frozen=True, kw_only=True)
class CellStarted:
    """A cell is measured now."""

    cell: Cell
    round: int


@dataclass(frozen=True, kw_only=True)
class CellPhase:
    """A cell went on to its next phase: build, gate, warmup, timing, energy, memory."""

    cell: Cell
    phase: str


@dataclass(frozen=True, kw_only=True)
class SampleTaken:
    """A round of a cell has come so far: told a few times a second, not for each sample."""

    cell: Cell
    seconds: float
    """A call, by the newest sample."""
    count: int
    """Samples of this round so far."""


@dataclass(frozen=True, kw_only=True)
class CellFinished:
    """The row of this cell as it stands after this round. It was saved before this event."""

    cell: Cell
    round: int
    result: BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line for the user that is no result: `level` is info or warning."""

    text: str
    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class SweepFinished:
    """The last event, however the sweep ended; all rows were saved before."""

    results: tuple[BenchmarkResult, ...]
    complete: bool
    """False when --max-time or an interruption ended it early."""
    reason: str | None = None
    """Why it is not complete, in words."""


Event = SweepStarted | RoundStarted | CellStarted | CellPhase | SampleTaken | CellFinished | Notice | SweepFinished
