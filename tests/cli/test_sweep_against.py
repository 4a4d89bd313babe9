"""What `sweep --against` asks of the engine, what it prints, and the code it ends in. The engine is a stand-in."""

from __future__ import annotations

import json
import shlex
import sys
import types

import pytest
from made_records import write

from longctx.analysis.paired import judge
from longctx.cli._against import code_of
from longctx.config import Cell, parse_blocks
from longctx.events import CellFinished, RoundStarted, SweepFinished, SweepStarted
from longctx.results import BenchmarkResult


def row(cell: Cell, name: str, *, ratios: list[float] | None = None, status: str = "ok") -> BenchmarkResult:
    """A row with a round for each ratio to 2 us a token; no times unless it is ok."""
    shared = {"block_name": name, "sequence_length": cell.length, "dtype": cell.dtype, "status": status}
    if status != "ok":
        return BenchmarkResult(**shared, error={"type": "Fault", "message": f"it was {status}"})
    times = [2e-6 * cell.length * ratio for ratio in ratios or [1.0] * 5]
    return BenchmarkResult(**shared, samples=[[time] * 3 for time in times], forward_time_median=times[0])


class FakeSides:
    """Stands in for `longctx.engine.run_against`. ratios: ours over theirs, by length; statuses: of our rows."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.ratios: dict[int, list[float]] = {}
        self.statuses: dict[int, str] = {}
        self.stop: BaseException | None = None

    def run_against(self, blocks, other, config, *, vary, on_event, command, guard, settle):
        self.calls.append((blocks, other, config, command, guard, settle))
        cells = tuple(config.cells(parse_blocks(blocks or ["BLADE"]), dtype="fp32"))
        environment = {"cpu": "A processor", "torch": "2.13.0", "threads": 2}
        on_event(SweepStarted(cells=cells, rounds=config.rounds, environment=environment, path="out/run.json"))
        on_event(RoundStarted(index=0, cells=cells))
        pairs = [self.pair(cell, other) for cell in cells]
        for cell, (ours, _) in zip(cells, pairs, strict=True):
            on_event(CellFinished(cell=cell, round=0, result=ours))
        if self.stop:
            raise self.stop
        on_event(SweepFinished(results=tuple(row for pair in pairs for row in pair), complete=True))
        return pairs

    def pair(self, cell: Cell, other: str) -> tuple[BenchmarkResult, BenchmarkResult]:
        status = self.statuses.get(cell.length, "ok")
        ours = row(cell, cell.block.name, ratios=self.ratios.get(cell.length), status=status)
        return ours, row(cell, f"{cell.block.name}@{other}")


SLOWER = [1.08, 1.07, 1.09, 1.08, 1.085]
UNDECIDED = [1.08, 1.07, 0.99, 1.08, 1.085]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> FakeSides:
    sides = FakeSides()
    module = types.ModuleType("longctx.engine.run_against")
    module.run_against = sides.run_against
    module.against_command = lambda config, blocks, other, words, vary: shlex.join(
        ["longctx", "sweep", "--blocks", *blocks, "--against", other, *words]
    )
    monkeypatch.setitem(sys.modules, "longctx.engine.run_against", module)
    return sides


def test_options_reach_the_engine(call, sides):
    assert call("sweep", "--blocks", "BLADE", "--against", "Dense", "--sequence-lengths", "1K").exit_code == 0
    assert call("sweep", "--blocks", "BLADE", "--against", "../old", "--rounds", "7", "--guard", "2.5").exit_code == 0
    (blocks, other, config, _, guard, settle), again = sides.calls
    assert (blocks, other, config.rounds, guard, settle) == (["BLADE"], "Dense", 5, None, True)
    assert (again[1], again[2].rounds, again[4], again[5]) == ("../old", 7, 0.025, False)


def test_the_command_that_reproduces_it_is_the_same_again(call, monkeypatch):
    seen = []

    def see(blocks, other, config, **kwargs):
        seen.append((blocks, other, config, kwargs["guard"], kwargs["settle"], kwargs["command"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("longctx.engine.run_against.run_against", see)
    words = "sweep --blocks a.py:New --sequence-lengths 1K --guard 2 --seed 3 --no-memory-profile"
    call(*words.split(), "--against", "a folder")
    call(*shlex.split(seen[0][-1])[1:])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guard", "2"], "--guard judges what --against measures"),
        (["--fail-on-regression"], "--fail-on-regression judges"),
        (["--against", "Dense", "--guard", "0"], "between 0 and 100"),
        (["--against", "Dense", "--guard", "nan"], "between 0 and 100"),
    ],
)
def test_options_that_mean_nothing_are_refused(call, sides, words, said):
    result = call("sweep", "--blocks", "BLADE", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert sides.calls == []


def test_a_pair_is_a_line_and_a_sentence(call, sides):
    sides.ratios = {1024: SLOWER}
    result = call("sweep", "--blocks", "BLADE", "--against", "old", "--sequence-lengths", "1K")
    header, line = (line.split() for line in result.stdout.splitlines() if line.startswith(("block", "BLADE")))
    assert header == ["block", "against", "tokens", "time", "ms", "against", "ms", "ratio", "interval", "verdict"]
    assert line == ["BLADE", "BLADE@old", "1K", "2.21", "2.05", "1.080x", "1.070-1.090", "slower"]
    assert "At 1,024 tokens BLADE is slower than BLADE@old: 1.080x the time" in result.stdout
    assert "results:   out/run.json" in result.stdout
    assert "reproduce: longctx sweep --blocks BLADE --against old" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_several_pairs_are_summed_up_and_the_undecided_explained(call, sides):
    sides.ratios = {1024: SLOWER, 2048: UNDECIDED}
    sides.statuses = {4096: "oom"}
    lengths = ["--sequence-lengths", "1K", "2K", "4K"]
    out = call("sweep", "--blocks", "BLADE", "--against", "old", *lengths).stdout
    assert "inconclusive: BLADE at 2K, the rounds do not agree" in out
    assert "oom: BLADE at 4K: it was oom" in out
    assert "Of 3 cells: 1 slower, 1 inconclusive, 1 not ok." in out


def test_json_is_one_document_with_rows_and_pairs(call, sides):
    sides.ratios = {1024: SLOWER}
    result = call("sweep", "--blocks", "BLADE", "--against", "old", "--sequence-lengths", "1K", "--json")
    document = json.loads(result.stdout)
    assert list(document) == ["results", "paired"]
    assert [record["block_name"] for record in document["results"]] == ["BLADE", "BLADE@old"]
    (pair,) = document["paired"]
    assert (pair["block_name"], pair["against"], pair["verdict"]) == ("BLADE", "BLADE@old", "slower")
    assert (pair["ratio"], pair["low"], pair["high"]) == pytest.approx((1.08, 1.07, 1.09))
    assert pair["guard"] == 0.03


@pytest.mark.parametrize(
    ("ratios", "statuses", "words", "code"),
    [
        ({}, {}, ["--strict", "--fail-on-regression"], 0),
        ({1024: SLOWER}, {}, [], 0),
        ({1024: SLOWER}, {}, ["--strict"], 0),
        ({1024: SLOWER}, {}, ["--fail-on-regression"], 4),
        ({1024: [1 / ratio for ratio in SLOWER]}, {}, ["--fail-on-regression", "--strict"], 0),
        ({1024: UNDECIDED}, {}, ["--fail-on-regression"], 0),
        ({1024: UNDECIDED}, {}, ["--strict"], 7),
        ({1024: UNDECIDED, 2048: SLOWER}, {}, ["--strict", "--fail-on-regression"], 4),
        ({}, {1024: "crashed"}, [], 0),
        ({}, {1024: "crashed"}, ["--strict"], 3),
        ({}, {1024: "crashed"}, ["--fail-on-regression"], 4),
        ({}, {1024: "crashed", 2048: "oom"}, [], 3),
        ({}, {1024: "wrong"}, ["--fail-on-regression"], 6),
    ],
)
def test_exit_codes(call, sides, ratios, statuses, words, code):
    sides.ratios, sides.statuses = ratios, statuses
    shared = ["--blocks", "BLADE", "--against", "old", "--sequence-lengths", "1K", "2K", "--quiet"]
    assert call("sweep", *shared, *words).exit_code == code


def test_report_shows_the_verdicts_of_a_saved_run_again(call, tmp_path):
    cell = Cell(block=parse_blocks(["BLADE"])[0], length=1024)
    pair = [row(cell, "BLADE", ratios=[1.1, 1.11, 1.09, 1.1, 1.12]), row(cell, "Dense")]
    for each, opponent in zip(pair, ("Dense", None), strict=True):
        each.config = {"against": {"opponent": opponent, "guard": None}}
    write(tmp_path / "run.json", [each.to_json() for each in pair])
    shown = call("report", str(tmp_path / "run.json")).stdout
    assert "slower" in shown and "fastest mixing block" not in shown
    (run,) = json.loads(call("report", str(tmp_path / "run.json"), "--json").stdout)["runs"]
    assert [each["verdict"] for each in run["paired"]] == ["slower"]


def test_a_sweep_that_ended_before_any_pair_was_measured_is_no_success():
    assert code_of([], [], strict=False, fail_on_regression=False, complete=False) == 3
    rows = FakeSides().pair(Cell(block=parse_blocks(["BLADE"])[0], length=64), "old")
    assert code_of(rows, [judge(*rows)], strict=False, fail_on_regression=True, complete=False) == 0
    assert code_of(rows, [judge(*rows)], strict=True, fail_on_regression=True, complete=False) == 3


def test_an_interrupt_says_how_to_go_on(call, sides):
    sides.stop = KeyboardInterrupt()
    result = call("sweep", "--blocks", "BLADE", "--against", "old", "--sequence-lengths", "1K")
    assert result.exit_code == 130
    assert "longctx sweep --blocks BLADE --against old --output-file out/run.json --resume" in result.stderr


@pytest.mark.parametrize("width", ["40", "60", "80", "120"])
def test_no_table_line_is_wider_than_the_screen(call, sides, width: str):
    sides.ratios = {1024: SLOWER, 2048: UNDECIDED}
    words = ["--blocks", "some_package.blocks:AVeryLongNameOfABlockOfMyOwn", "--sequence-lengths", "1K", "2K"]
    out = call("sweep", *words, "--against", "../another/checkout", COLUMNS=width).stdout
    wide = [
        line for line in out.splitlines() if len(line) > int(width) and not line.startswith(("results", "reproduce"))
    ]
    assert wide == []
    assert "1.080x" in out
    assert "inconclusive" in out
