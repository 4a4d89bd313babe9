"""A sweep as it runs: a live picture where there is a terminal, one line a cell where there is none.

Both take the same events. The picture is drawn at most a few times a second and never taller than the screen: the
processors belong to what is being measured, and what is taller cannot be cleared again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from longctx.analysis.settings import Axis, in_words, varying, without
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
from longctx.terminal.console import ascii_only, cursor_while_stopped
from longctx.terminal.estimate import Estimate
from longctx.terminal.layout import Column, layout
from longctx.terminal.prose import say
from longctx.terminal.tables import environment_line, gate_error, status_word

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
        self.axes: list[Axis] = []
        """Along which the cells differ, block and length aside."""
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
                self.axes = varying(event.cells)
                self.results = dict(event.reused)
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
        say(self.console, line)


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
                    count = len(event.reused)
                    self.say(Text(f"{count} {'row is' if count == 1 else 'rows are'} taken over from that file"))
            case RoundStarted() if self.rounds > 1:
                self.say(Text(f"round {event.index + 1} of {self.rounds}"))
            case CellFinished():
                self.say(Text(self._said(event)))
            case Notice() if event.level == "info":
                self.say(Text(fmt.plain(event.text)))

    def _said(self, event: CellFinished) -> str:
        count = f"[{self.step:>{len(str(self.steps))}}/{self.steps}]"
        return f"{count} {finished_line(event.cell, event.result, self.axes)}"


def finished_line(cell: Cell, result: BenchmarkResult, axes: Sequence[Axis] = ()) -> str:
    """`BLADE 4K  12.3 ms  64.0 MiB  error 1.2e-07`: one row in one line. axes: those to name besides."""
    parts = [f"{fmt.plain(cell.block.name)} {fmt.tokens(cell.length)}", *([in_words(cell, axes)] if axes else [])]
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
        self._closing = contextlib.ExitStack()
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
        self._closing.enter_context(cursor_while_stopped(self.console))
        self._live.start(refresh=True)
        self._closing.callback(self._live.stop)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

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
                    self.message = finished_line(event.cell, event.result, self.axes)
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
                lines += [Text(""), *self._tables(width, room)]
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
        head = f" {fmt.tokens(cell.length)}  " + "".join(f"{axis.text(cell)}  " for axis in self.axes) + self.phase
        if self.sample_count:
            last = [fmt.duration(s).replace(" ", "") for s in self.samples]
            count = f"  {self.sample_count} sample{'' if self.sample_count == 1 else 's'}"
            room = width - len(head) - 12
            # The last of them that there is room for.
            while last and len(count) + 2 + len(" ".join(last)) > room:
                last.pop(0)
            head += f"{count}: {' '.join(last)}" if last else count if len(count) <= room else ""
        name = fmt.shorten(fmt.plain(cell.block.name), max(8, width - len(head)), ellipsis="~" if self.ascii else "…")
        return Text.assemble((name, "bold cyan"), head, no_wrap=True, overflow="ellipsis")

    def _tables(self, width: int, room: int) -> list[Text]:
        """A table for each mode if all fit on the screen, else that of the running cell alone."""
        modes: dict[str, dict[tuple, Cell]] = {}
        for cell in self.cells:
            modes.setdefault(cell.mode, {}).setdefault(self._line(cell), cell)
        needed = sum(len(lines) + 2 for lines in modes.values()) - 1
        if needed <= room:
            return [
                part
                for index, (mode, lines) in enumerate(modes.items())
                for part in ([Text("")] if index else []) + [self._table(mode, list(lines.values()), width, room)]
            ]
        mode = self.running.mode if self.running else next(iter(modes))
        return [self._table(mode, list(modes[mode].values()), width, room)]

    def _line(self, cell: Cell) -> tuple:
        """What the line of a table stands for: a block in a setting."""
        return (cell.block, *(axis.of(cell) for axis in self.axes))

    def _table(self, mode: str, heads: list[Cell], width: int, room: int) -> Text:
        """Blocks and settings of a mode down, lengths across; what does not fit is left out around the running cell.

        heads: any cell of each line.
        """
        cells = [cell for cell in self.cells if cell.mode == mode]
        lengths = sorted({cell.length for cell in cells})
        by_place = {(self._line(cell), cell.length): cell for cell in cells}
        lines = [self._line(head) for head in heads]
        running = self.running if self.running and self._line(self.running) in lines else None
        hidden = len(heads) > room - 1
        size = max(1, room - 2 if hidden else room - 1)
        shown = _window(heads, lines.index(self._line(running)) if running else 0, size)
        unit = fmt.column_unit(self.results[cell].time_s for cell in cells if self._is_ok(cell))
        word = mode if any(axis.name == "mode" for axis in self.axes) or mode != "forward" else "time"
        columns = [
            Column(
                header=f"{word} {unit.name}",
                cells=[fmt.plain(head.block.name) for head in shown],
                right=False,
                flexible=True,
            )
        ]
        for axis in without(self.axes, ("mode",)):
            columns.append(Column(header=axis.header, cells=[fmt.plain(axis.of(head)) for head in shown]))
        styles: dict[tuple[int, str], str] = {}
        length_focus = running.length if running else lengths[-1]
        for length in lengths:
            words = []
            for row, head in enumerate(shown):
                said, style = self._place(by_place.get((self._line(head), length)), unit)
                words.append(said)
                styles[row, fmt.tokens(length)] = style
            # The lengths nearest to the running one stay the longest.
            distance = abs(lengths.index(length) - lengths.index(length_focus))
            columns.append(Column(header=fmt.tokens(length), cells=words, keep=100 - distance))
        errors = [self._worst_error(head) for head in shown]
        columns.append(Column(header="error", cells=[fmt.error(error) for error in errors], keep=99))
        text = layout(columns, width, ascii_only=self.ascii, styles=styles)
        if hidden:
            what = "rows" if without(self.axes, ("mode",)) else "blocks"
            text.append(f"\n{len(heads) - len(shown)} more {what}", style="dim")
        return text

    def _is_ok(self, cell: Cell) -> bool:
        return cell in self.results and self.results[cell].ok

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

    def _worst_error(self, head: Cell) -> float | None:
        errors = [gate_error(result) for cell, result in self.results.items() if self._line(cell) == self._line(head)]
        return max((error for error in errors if error is not None), default=None)


def _window(items: list[Any], focus: int, size: int) -> list[Any]:
    start = max(0, min(focus - size // 2, len(items) - size))
    return items[start : start + size]
