"""A sweep as it runs: a live picture where there is a terminal, one line a cell where there is none.

Both take the same events. The picture is drawn at most a few times a second and never taller than the screen: the
processors belong to what is being measured, and what is taller cannot be cleared again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from longctx.config import Cell
from longctx.events import (
    CellFinished,
    CellPhase,
    CellStarted,
    Event,
    Notice,
    RoundStarted,
    SampleTaken,
    SweepFinished,
    SweepStarted,
)
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt
from longctx.terminal.console import ascii_only
from longctx.terminal.tables import Column, environment_line, gate_error, layout, status_word

if TYPE_CHECKING:
    from rich.live import Live

REFRESH_PER_SECOND = 2
"""Drawing takes some milliseconds: this often it costs the measurement about a hundredth of one core."""
EXTRA_REFRESH_S = 0.25
SAMPLES_SHOWN = 6


def sweep_view(console: Console, *, quiet: bool = False, animate: bool = True) -> SweepView:
    """The view that suits `console`. animate: False where the measurement runs in this very process."""
    if quiet:
        return SweepView(console)
    return LiveView(console, animate=animate) if console.is_interactive else PlainView(console)


class SweepView:
    """What is known of a sweep so far. By itself it shows warnings and nothing else: the quiet view."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii = ascii_only(console)
        self.path: str | None = None
        self.environment: dict[str, Any] = {}
        self.cells: tuple[Cell, ...] = ()
        self.rounds = 1
        self.round = 0
        self.results: dict[Cell, BenchmarkResult] = {}
        self.finished: SweepFinished | None = None
        self.estimate = Estimate()
        self.step, self.steps = 0, 0

    def __enter__(self) -> SweepView:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def rows(self) -> int:
        """Rows that stand in the results so far."""
        # An interruption may come between the saving of a row and the word that it is there.
        return len(self.finished.results if self.finished else self.results)

    @property
    def complete(self) -> bool:
        return self.finished is None or self.finished.complete

    def update(self, event: Event) -> None:
        """Take in one event. Called from the thread that runs the sweep."""
        match event:
            case SweepStarted():
                self.path, self.environment = event.path, event.environment
                self.cells, self.rounds = event.cells, event.rounds
                places = {(cell.block.name, cell.length): cell for cell in event.cells}
                reused = {places.get((row.block_name, row.sequence_length)): row for row in event.reused}
                self.results = {cell: row for cell, row in reused.items() if cell is not None}
                self.estimate.start(event, self.results)
                self.steps = self.estimate.runs_left()
            case RoundStarted():
                # A sweep may add rounds to those that it set out with.
                self.round, self.rounds = event.index, max(self.rounds, event.index + 1)
            case CellStarted():
                self.estimate.cell_started(event.cell)
            case CellFinished():
                self.results[event.cell] = event.result
                self.step += 1
                self.estimate.cell_finished(event)
                self.steps = self.step + self.estimate.runs_left()
            case Notice() if event.level != "info":
                self.say(Text.assemble((f"{event.level}:", "yellow"), f" {fmt.plain(event.text)}"))
            case SweepFinished():
                self.finished = event

    def say(self, line: Text) -> None:
        """Print a line that stays."""
        self.console.print(line, soft_wrap=True)


class PlainView(SweepView):
    """One line for each cell that finishes, without escapes: for logs, and for reading along in a pipe."""

    def update(self, event: Event) -> None:
        super().update(event)
        match event:
            case SweepStarted():
                self.say(environment_line(event.environment))
                if event.path:
                    self.say(Text(f"results: {fmt.plain(event.path)}"))
                if event.reused:
                    self.say(Text(f"{len(event.reused)} rows are taken over from that file"))
            case RoundStarted() if self.rounds > 1:
                self.say(Text(f"round {event.index + 1} of {self.rounds}"))
            case CellFinished():
                self.say(Text(self._line(event)))
            case Notice() if event.level == "info":
                self.say(Text(fmt.plain(event.text)))

    def _line(self, event: CellFinished) -> str:
        count = f"[{self.step:>{len(str(self.steps))}}/{self.steps}]"
        return f"{count} {finished_line(event.cell, event.result)}"


def finished_line(cell: Cell, result: BenchmarkResult) -> str:
    """`BLADE 4K  12.3 ms  64.0 MiB  error 1.2e-07`: one row in one line."""
    parts = [f"{fmt.plain(cell.block.name)} {fmt.tokens(cell.length)}"]
    if not result.ok:
        error = result.error if isinstance(result.error, dict) else {}
        said = fmt.shorten(fmt.plain(error.get("message") or ""), 160)
        return "  ".join([*parts, fmt.plain(result.status) + (f": {said}" if said else "")])
    parts.append(fmt.duration(result.time_s))
    if result.peak_memory_mb is not None:
        parts.append(fmt.memory(fmt.from_mib(result.peak_memory_mb)))
    if (error := gate_error(result)) is not None:
        parts.append(f"error {fmt.error(error)}")
    if result.warnings:
        parts.append(fmt.plain(", ".join(map(str, result.warnings))))
    return "  ".join(parts)


class LiveView(SweepView):
    """Progress, the running cell, and a table of blocks x lengths that fills as the sweep goes."""

    def __init__(self, console: Console, *, animate: bool = True) -> None:
        super().__init__(console)
        self.animate = animate
        self.running: Cell | None = None
        self.phase = ""
        self.samples: deque[float] = deque(maxlen=SAMPLES_SHOWN)
        self.sample_count = 0
        self.message = "starting"
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> LiveView:
        from rich.live import Live

        self._live = Live(
            get_renderable=self.render,
            console=self.console,
            auto_refresh=self.animate,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, event: Event) -> None:
        with self._lock:
            super().update(event)
            match event:
                case CellStarted():
                    self.running, self.phase, self.sample_count = event.cell, "", 0
                    self.samples.clear()
                case CellPhase():
                    self.phase = event.phase
                case SampleTaken():
                    self.samples.append(event.seconds)
                    self.sample_count = event.count
                case CellFinished():
                    self.running = None
                    self.message = finished_line(event.cell, event.result)
                case Notice() if event.level == "info":
                    self.message = fmt.plain(event.text)
        # A sample may come every few microseconds: those are left to the next regular drawing.
        if not isinstance(event, SampleTaken):
            self._refresh()

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= EXTRA_REFRESH_S:
            self._drawn = now
            self._live.refresh()

    def render(self) -> Group:
        """The picture as it stands."""
        with self._lock:
            width, height = self.console.size
            lines = [self._progress(width), self._now(width)]
            room = height - len(lines) - 4
            if self.cells and room >= 3:
                lines += [Text(""), self._table(width, room)]
            return Group(*lines)

    def _progress(self, width: int) -> Text:
        share = self.estimate.share()
        left = self.estimate.remaining_s()
        words = f" {share:>4.0%}"
        tail = f"  {fmt.clock(self.estimate.elapsed_s())}"
        tail += f", about {fmt.clock(left)} left" if left is not None else ""
        count = f"  {self.step}/{self.steps}" if self.steps else ""
        round_ = f"  round {self.round + 1}/{self.rounds}" if self.rounds > 1 else ""
        if width < 60:
            round_ = ""
        bar = max(0, min(30, width - len(words + tail + count + round_)))
        full = round(bar * share)
        text = Text(no_wrap=True, overflow="ellipsis")
        if bar >= 5:
            solid, empty = ("#", "-") if self.ascii else ("━", "─")
            text.append(solid * full, style="cyan").append(empty * (bar - full), style="dim")
        text.append(words, style="bold").append(count).append(round_).append(tail, style="dim")
        return text

    def _now(self, width: int) -> Text:
        cell = self.running
        if cell is None:
            return Text(fmt.shorten(self.message, width), style="dim", no_wrap=True)
        head = f" {fmt.tokens(cell.length)}  {self.phase}"
        if self.sample_count:
            last = " ".join(fmt.duration(s).replace(" ", "") for s in self.samples)
            samples = f"  {self.sample_count} sample{'' if self.sample_count == 1 else 's'}: {last}"
            head += fmt.shorten(samples, max(0, width - len(head) - 12), ellipsis="~" if self.ascii else "…")
        name = fmt.shorten(fmt.plain(cell.block.name), max(8, width - len(head)), ellipsis="~" if self.ascii else "…")
        return Text.assemble((name, "bold cyan"), head, no_wrap=True, overflow="ellipsis")

    def _table(self, width: int, room: int) -> Text:
        """Blocks down, lengths across; what does not fit is left out around the running cell."""
        blocks = list(dict.fromkeys(cell.block for cell in self.cells))
        lengths = sorted({cell.length for cell in self.cells})
        by_place = {(cell.block, cell.length): cell for cell in self.cells}
        focus = blocks.index(self.running.block) if self.running and self.running.block in blocks else 0
        hidden = len(blocks) > room - 1
        shown = _window(blocks, focus, max(1, room - 2 if hidden else room - 1))
        unit = fmt.column_unit(r.time_s for r in self.results.values() if r.ok)
        columns = [
            Column(
                header=f"time {unit.name}",
                cells=[fmt.plain(block.name) for block in shown],
                right=False,
                flexible=True,
            )
        ]
        styles: dict[tuple[int, str], str] = {}
        length_focus = self.running.length if self.running else lengths[-1]
        for length in lengths:
            cells = []
            for row, block in enumerate(shown):
                word, style = self._place(by_place.get((block, length)), unit)
                cells.append(word)
                styles[row, fmt.tokens(length)] = style
            # The lengths nearest to the running one stay the longest.
            distance = abs(lengths.index(length) - lengths.index(length_focus)) if length_focus in lengths else 0
            columns.append(Column(header=fmt.tokens(length), cells=cells, keep=100 - distance))
        errors = [self._worst_error(block) for block in shown]
        columns.append(Column(header="error", cells=[fmt.error(error) for error in errors], keep=99))
        text = layout(columns, width, ascii_only=self.ascii, styles=styles)
        if hidden:
            text.append(f"\n{len(blocks) - len(shown)} more blocks", style="dim")
        return text

    def _place(self, cell: Cell | None, unit: fmt.Unit) -> tuple[str, str]:
        if cell is None:
            return "", ""
        result = self.results.get(cell)
        running = cell == self.running
        if result is None:
            return (("..." if self.ascii else "…"), "bold cyan") if running else (("." if self.ascii else "·"), "dim")
        if not result.ok:
            return status_word(result), "bold red" if result.status in ("wrong", "impossible") else "yellow"
        return unit.text(result.time_s), "bold cyan" if running else ""

    def _worst_error(self, block: object) -> float | None:
        errors = [gate_error(result) for cell, result in self.results.items() if cell.block == block]
        return max((error for error in errors if error is not None), default=None)


def _window(items: list[Any], focus: int, size: int) -> list[Any]:
    start = max(0, min(focus - size // 2, len(items) - size))
    return items[start : start + size]


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
