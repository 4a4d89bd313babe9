"""The views of a running sweep, driven by made-up events: what they say, how tall they get, what they cost."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.cells import cell_len
from rich.console import Console

from longctx.config import BenchmarkConfig, parse_blocks, variants
from longctx.events import (
    CellFinished,
    CellPhase,
    CellStarted,
    Notice,
    RoundStarted,
    SampleTaken,
    SweepFinished,
    SweepStarted,
)
from longctx.results import BenchmarkResult
from longctx.terminal.live import LiveView, PlainView, SweepView, sweep_view

NASTY = "x.py:Evil[red]\x1b[2J"


def make_cells(blocks: list[str], lengths: list[int]):
    config = BenchmarkConfig(sequence_lengths=lengths)
    return tuple(config.cells(parse_blocks(blocks), dtype="fp32"))


def ok(cell, rounds: int = 1, **fields) -> BenchmarkResult:
    seconds = cell.length * 1e-6
    figures = {
        "forward_time_median": seconds,
        "samples": [[seconds]] * rounds,
        "peak_memory_mb": 64.0,
        "gate": {"error": 1.25e-7},
    }
    return BenchmarkResult(block_name=cell.block.name, sequence_length=cell.length, **(figures | fields))


def started(cells, *, rounds: int = 1, reused=None, weights=None) -> SweepStarted:
    environment = {"cpu": "A processor", "torch": "2.13.0"}
    return SweepStarted(
        cells=cells, rounds=rounds, environment=environment, path="run.json", reused=reused or {}, weights=weights or {}
    )


def sweep(cells, *, rounds: int = 1):
    """The events of a whole sweep."""
    yield started(cells, rounds=rounds)
    for index in range(rounds):
        yield RoundStarted(index=index, cells=cells)
        for cell in cells:
            yield CellStarted(cell=cell, round=index)
            yield CellPhase(cell=cell, phase="timing")
            yield SampleTaken(cell=cell, seconds=0.00123, count=1)
            yield CellFinished(cell=cell, round=index, result=ok(cell, index + 1))
    yield SweepFinished(results=(), complete=True)


def console_of(width: int = 80, height: int = 24, *, terminal: bool = False, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(
        file=file, width=width, height=height, force_terminal=terminal, force_interactive=terminal, color_system=None
    )


def written(console: Console) -> str:
    return console.file.buffer.getvalue().decode(console.encoding)


def picture(view: LiveView) -> list[str]:
    console = console_of(view.console.width, view.console.height)
    console.print(view.render())
    return written(console).splitlines()


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("longctx.terminal.live.time.monotonic", lambda: self.now)


def test_the_view_suits_the_console() -> None:
    assert type(sweep_view(console_of())) is PlainView
    assert type(sweep_view(console_of(terminal=True))) is LiveView
    assert type(sweep_view(console_of(terminal=True), quiet=True)) is SweepView


def test_plain_is_one_line_a_cell_without_escapes() -> None:
    console = console_of()
    cells = make_cells(["Dense", NASTY], [1024, 2048])
    with PlainView(console) as view:
        for event in sweep(cells, rounds=2):
            view.update(event)
    lines = written(console).splitlines()
    assert lines[:3] == ["A processor, torch 2.13.0", "results: run.json", "round 1 of 2"]
    assert lines[3] == "[1/8] Dense 1K  1.02 ms  64.0 MiB  error 1.2e-07"
    assert lines[4].startswith("[2/8] Evil[red] [2J 1K  1.02 ms")
    assert lines[7] == "round 2 of 2"
    assert lines[-1].startswith("[8/8]")
    assert "\x1b" not in written(console)


def test_plain_says_what_became_of_a_cell_and_counts_what_is_left() -> None:
    console = console_of()
    cells = make_cells(["Dense", "BLADE"], [1024])
    view = PlainView(console)
    view.update(started(cells, rounds=3))
    fault = BenchmarkResult(
        block_name="Dense", sequence_length=1024, status="crashed", error={"message": "SIGSEGV \x1b[0m"}
    )
    view.update(CellFinished(cell=cells[0], round=0, result=fault))
    # A cell that was not ok is not run in later rounds.
    assert written(console).splitlines()[-1] == "[1/4] Dense 1K  crashed: SIGSEGV [0m"


def test_quiet_shows_warnings_only() -> None:
    console = console_of()
    view = SweepView(console)
    for event in sweep(make_cells(["Dense"], [1024])):
        view.update(event)
    view.update(Notice(text="by the way"))
    view.update(Notice(text="look [red]out\x1b[0m", level="warning"))
    assert written(console) == "warning: look [red]out [0m\n"
    assert view.path == "run.json"


def test_the_picture_fills_as_the_sweep_goes() -> None:
    cells = make_cells(["Dense", "BLADE"], [1024, 2048])
    view = LiveView(console_of(100, 24, terminal=True))
    events = sweep(cells)
    for event in itertools.islice(events, 2):
        view.update(event)
    assert "0/4" in picture(view)[0]
    for event in itertools.islice(events, 7):
        view.update(event)
    lines = picture(view)
    assert "1/4" in lines[0]
    assert "25%" not in lines[1]
    assert lines[1].startswith("BLADE 1K  timing  1 sample: 1.23ms")
    assert [line.split() for line in lines[3:6]] == [
        ["time", "ms", "1K", "2K", "error"],
        ["Dense", "1.02", "·", "1.2e-07"],
        ["BLADE", "…", "·", "-"],
    ]


def test_rows_taken_over_are_there_from_the_start() -> None:
    cells = make_cells(["Dense", "BLADE"], [1024])
    view = LiveView(console_of(100, 24, terminal=True))
    view.update(started(cells, rounds=3, reused={cells[0]: ok(cells[0], rounds=2)}))
    assert view.rows == 1
    lines = picture(view)
    assert "0/4" in lines[0]
    assert lines[4].split() == ["Dense", "1.02", "1.2e-07"]


def test_a_fault_stands_in_the_table() -> None:
    cells = make_cells(["Dense", "BLADE"], [1024])
    view = LiveView(console_of(100, 24, terminal=True))
    view.update(started(cells))
    fault = BenchmarkResult(block_name="Dense", sequence_length=1024, status="oom")
    view.update(CellFinished(cell=cells[0], round=0, result=fault))
    assert picture(view)[4].split() == ["Dense", "OOM", "-"]


@pytest.mark.parametrize("width", [20, 50, 80, 120])
@pytest.mark.parametrize("height", [3, 6, 10, 24])
def test_never_taller_or_wider_than_the_screen(width: int, height: int) -> None:
    blocks = [f"BLADE:chunk_size={2**i}" for i in range(5, 25)] + [NASTY]
    cells = make_cells(blocks, [1 << i for i in range(10, 21)])
    view = LiveView(console_of(width, height, terminal=True))
    for index, event in enumerate(sweep(cells)):
        view.update(event)
        if index % 97 == 0:
            lines = picture(view)
            assert len(lines) < height or height == 3
            assert max(map(cell_len, lines)) <= width
            assert "\x1b" not in "".join(lines)


def test_the_running_cell_is_among_those_shown() -> None:
    cells = make_cells([f"BLADE:chunk_size={i}" for i in range(1, 31)], [1024])
    view = LiveView(console_of(80, 12, terminal=True))
    view.update(started(cells))
    view.update(CellStarted(cell=cells[25], round=0))
    text = "\n".join(picture(view)[3:])
    assert "chunk_size=26" in text
    assert "more blocks" in text


def test_ascii_consoles_get_ascii() -> None:
    cells = make_cells(["Dense", "a.py:" + "Long" * 40], [1024])
    view = LiveView(console_of(50, 24, terminal=True, encoding="ascii"))
    view.update(started(cells))
    view.update(CellStarted(cell=cells[1], round=0))
    assert "\n".join(picture(view)).isascii()


def test_the_terminal_is_put_back_after_an_interruption() -> None:
    console = console_of(terminal=True)
    with pytest.raises(KeyboardInterrupt), LiveView(console) as view:
        view.update(started(make_cells(["Dense"], [1024])))
        raise KeyboardInterrupt
    out = written(console)
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")


def test_many_events_draw_little(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cells = make_cells(["Dense"], [1024])
    view = LiveView(console_of(terminal=True), animate=False)
    drawn = []
    monkeypatch.setattr(view, "render", lambda: drawn.append(clock.now) or "")
    with view:
        view.update(started(cells))
        before = len(drawn)
        for count in range(10_000):
            clock.now += 0.001
            view.update(SampleTaken(cell=cells[0], seconds=0.001, count=count))
        # In the measuring process nothing is drawn between two samples.
        assert len(drawn) == before
        for _ in range(100):
            clock.now += 0.01
            view.update(CellPhase(cell=cells[0], phase="warmup"))
        assert len(drawn) - before <= 5


def test_the_estimate_goes_by_cost_and_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cells = make_cells(["Dense"], [1024, 2048, 4096, 8192])
    view = SweepView(console_of())
    view.update(started(cells, rounds=2, weights={cell: cell.length / 1024 for cell in cells}))
    assert view.estimate.remaining_s() is None
    assert view.estimate.share() == 0
    for cell, seconds in zip(cells, (1.0, 2.0, 4.0, 8.0), strict=True):
        view.update(CellStarted(cell=cell, round=0))
        clock.now += seconds
        view.update(CellFinished(cell=cell, round=0, result=ok(cell)))
        if cell == cells[1]:
            # 4 + 8 seconds of this round and 15 of the next.
            assert view.estimate.remaining_s() == pytest.approx(27.0)
            assert view.estimate.share() == pytest.approx(3 / 30)
    assert view.estimate.remaining_s() == pytest.approx(15.0)
    view.update(CellStarted(cell=cells[3], round=1))
    clock.now += 3.0
    assert view.estimate.remaining_s() == pytest.approx(12.0)
    clock.now += 100.0
    assert view.estimate.remaining_s() == pytest.approx(7.0)


def test_the_estimate_leaves_out_what_was_checked_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cells = make_cells(["Dense", "BLADE"], [1024])
    view = SweepView(console_of())
    view.update(started(cells, rounds=2))
    for cell in cells:
        view.update(CellStarted(cell=cell, round=0))
        clock.now += 5.0
        view.update(CellFinished(cell=cell, round=0, result=ok(cell, gate_s=3.0, first_call_s=1.0)))
    assert view.estimate.remaining_s() == pytest.approx(2.0)


def test_a_row_that_was_saved_as_the_interruption_came_is_counted() -> None:
    cells = make_cells(["Dense"], [1024, 2048])
    view = SweepView(console_of())
    view.update(started(cells))
    view.update(SweepFinished(results=(ok(cells[0]),), complete=False, reason="interrupted"))
    assert view.rows == 1


def test_every_mode_has_a_table_where_they_fit_and_the_running_one_where_they_do_not() -> None:
    config = BenchmarkConfig(sequence_lengths=[1024, 2048])
    vary = {"mode": ["forward", "train"], "batch_size": [1, 4]}
    cells = tuple(
        cell for each in variants(config, vary) for cell in each.cells(parse_blocks(["Dense", "BLADE"]), dtype="fp32")
    )
    for height, tables in ((24, ["forward", "train"]), (10, ["train"])):
        view = LiveView(console_of(80, height, terminal=True))
        view.update(started(cells))
        view.update(CellStarted(cell=cells[-1], round=0))
        lines = picture(view)
        assert len(lines) < height
        assert [line.split()[0] for line in lines if line.endswith("error")] == tables
        assert "train  batch 4" in lines[1]
        assert "batch" in next(line for line in lines if line.endswith("error"))


def test_a_row_that_is_taken_over_stands_in_its_own_setting() -> None:
    config = BenchmarkConfig(sequence_lengths=[1024])
    cells = [
        cell
        for each in variants(config, {"mode": ["forward", "train"]})
        for cell in each.cells(parse_blocks(["Dense"]), dtype="fp32")
    ]
    view = PlainView(console_of())
    view.update(started(tuple(cells), reused={cells[1]: ok(cells[1])}))
    assert list(view.results) == [cells[1]]
    view.update(CellFinished(cell=cells[0], round=0, result=ok(cells[0])))
    assert "Dense 1K  forward  1.02 ms" in written(view.console)
