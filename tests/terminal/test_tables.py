"""Tables on any width: numbers whole, names shortened, nothing from a file obeyed by the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from longctx.analysis.series import names_of
from longctx.results import BenchmarkResult
from longctx.terminal.layout import Column, layout
from longctx.terminal.markdown import to_markdown
from longctx.terminal.tables import (
    environment_line,
    facts,
    notes,
    ranking_lines,
    results_table,
)

NASTY = "[red]evil[/red]\x1b[2J\x1b]0;title\x07\r\nname\u202e with_a_very_long_tail_of_forty_characters_and_more"


def row(name: str, length: int, seconds: float | None = None, **fields) -> BenchmarkResult:
    shared: dict = {"block_name": name, "sequence_length": length, "dtype": "fp32", "config": {"d_model": 512}}
    if seconds is not None:
        shared |= {
            "forward_time_mean": seconds,
            "forward_time_median": seconds,
            "forward_time_ci95": [0.99 * seconds, 1.01 * seconds],
            "samples": [[seconds] * 3],
            "throughput_tokens_per_sec": length / seconds,
            "peak_memory_mb": length / 32,
            "gate": {"error": 2.5e-7, "passed": True},
        }
    return BenchmarkResult(**(shared | fields))


ROWS = [
    row("Dense", 1024, 0.004),
    row("BLADE", 1024, 0.002),
    row(NASTY, 1024, 0.123456),
    row("Dense", 65536, status="oom", error={"type": "OOM", "message": "no room for \x1b[31m91 GiB"}),
    row("BLADE", 65536, 0.1284, warnings=["unstable"]),
    row(NASTY, 65536, 12.345678),
]


def printed(text, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=50, markup=False, highlight=False)
    console.print(text)
    return console.file.getvalue()


def test_rows_named_by_their_place_in_a_model_say_what_they_are() -> None:
    rows = [
        BenchmarkResult(
            block_name=f"blocks.{i}", sequence_length=1024, forward_time_median=1e-3, config={"module_class": kind}
        )
        for i, kind in enumerate(("DenseBlock", "[b]Mine"))
    ]
    shown = results_table(rows, 80).plain
    assert "class" in shown and "DenseBlock" in shown and "[b]Mine" in shown
    assert "| blocks.0 | DenseBlock | 1,024 |" in to_markdown(rows)
    assert "class" not in results_table(ROWS, 120).plain
    assert names_of(rows) == ["blocks.0 DenseBlock", "blocks.1 [b]Mine"]


def test_rows_of_several_training_steps_say_their_step() -> None:
    rows = [row("blocks.0", 1024, 0.004, training_step=step) for step in (100, 20000)]
    lines = printed(results_table(rows, 100), 100).splitlines()
    beginnings = [line.split()[:2] for line in lines if line]
    assert beginnings == [["step", "block"], ["100", "blocks.0"], ["20,000", "blocks.0"]]
    assert "step" not in printed(results_table(rows[:1], 100), 100)
    assert "step 20,000" in printed(ranking_lines(rows, 100), 100)


@pytest.mark.parametrize("width", [20, 30, 40, 50, 60, 80, 100, 120, 200])
def test_every_width_shows_whole_numbers_and_no_wide_line(width: int) -> None:
    out = printed(results_table(ROWS, width), width)
    assert "\x1b" not in out
    if width >= 30:
        assert max(map(cell_len, out.splitlines())) <= width
    for figure in ("4.00", "2.00", "123", "128", "12,346", "OOM"):
        assert re.search(rf"(^|\s){re.escape(figure)}(\s|$)", out, re.MULTILINE), figure


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (120, ["tokens/s", "peak MiB", "vs Dense", "error", "status"], []),
        (80, ["peak MiB", "vs Dense", "error"], ["within", "range"]),
        (50, ["peak MiB", "vs Dense"], ["tokens/s", "error"]),
        (44, ["vs Dense"], ["peak MiB"]),
    ],
)
def test_less_important_columns_go_first(width: int, there: list[str], gone: list[str]) -> None:
    header = results_table(ROWS, width).plain.splitlines()[0]
    assert header.startswith("tokens")
    assert [name for name in there if name not in header] == []
    assert [name for name in gone if name in header] == []


def test_a_very_narrow_screen_gets_lines_of_name_and_value() -> None:
    lines = results_table(ROWS, 24).plain.splitlines()
    assert lines[0].split() == ["tokens", "1K"]
    assert ["time", "ms", "4.00"] in [line.split() for line in lines]


def test_ratios_are_those_of_the_same_round() -> None:
    dense = row("Dense", 1024, 0.004, samples=[[0.004], [0.008], [0.004]])
    other = row("BLADE", 1024, 0.004, samples=[[0.002], [0.004], [0.004]])
    line = results_table([dense, other], 120).plain.splitlines()[2]
    assert "0.50x" in line


def test_the_spread_between_rounds_stands_beside_the_spread_within_and_a_ratio_beside_its_range() -> None:
    within = [[0.99e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1.01e-3], [1.09e-3, 1.1e-3, 1.1e-3, 1.1e-3, 1.1e-3, 1.11e-3]]
    dense = row("Dense", 1024, 0.002, samples=[[2e-3] * 6, [2e-3] * 6])
    other = row("BLADE", 1024, 0.00105, samples=within)
    head, _, line = results_table([dense, other], 140).plain.splitlines()
    figures = dict(
        zip(
            head.replace("vs Dense", "vs").replace("time ms", "time").replace("peak MiB", "peak").split(),
            line.split(),
            strict=False,
        )
    )
    assert figures["within"] == "1.0%"
    assert figures["between"] == "4.8%"
    assert figures["range"] == "0.50-0.55"


def test_a_wrong_number_is_not_shown_as_a_record() -> None:
    out = results_table([row("Dense", 1024, 0.004), row("Cheat", 1024, 1e-9, status="impossible")], 120).plain
    assert "IMPOSSIBLE" in out
    assert "1,024,000,000,000" not in out


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_time_mean": float("nan"), "forward_time_median": None},
        {"forward_time_median": "fast"},
        {"forward_time_median": -1.0},
        {"forward_time_ci95": ["a", "b"], "forward_time_median": 0.1},
        {"gate": "yes", "samples": [None], "warnings": None, "peak_memory_mb": 1e300},
        {"config": [], "environment": None, "status": "\x1b[31mmine", "error": "text"},
    ],
)
def test_absurd_values_of_a_strangers_file_are_shown_as_nothing(fields: dict) -> None:
    rows = [row("Dense", 1024, 0.004), row("Odd", 1024, **fields)]
    for text in (results_table(rows, 80), results_table(rows, 80, ranked=True), ranking_lines(rows, 80), notes(rows)):
        assert "\x1b" not in printed(text, 80)
        assert "nan" not in text.plain.lower()


def test_the_ranked_table_is_fastest_first_with_faults_last() -> None:
    rows = [row("Broken", 1024, status="crashed"), row("Dense", 1024, 0.004), row("Identity", 1024, 0.001)]
    lines = results_table(rows, 120, ranked=True).plain.splitlines()
    assert [line.split()[0] for line in lines] == ["block", "Identity", "Dense", "Broken"]
    assert "4.00x" in lines[2]
    assert "0.25x" in lines[1]


def test_notes_group_lengths_and_give_reasons_and_advice() -> None:
    rows = [
        row("Dense", 65536, status="oom", error={"message": "no room"}),
        row("Dense", 131072, status="oom", error={"message": "no room"}),
        row("BLADE", 1024, 0.1, warnings=["unstable"]),
        row("BLADE", 2048, 0.1, warnings=["unstable"]),
        row("Wrong", 1024, status="wrong", gate={"passed": False, "reason": "error 0.3 over 1e-5"}),
    ]
    lines = notes(rows).plain.splitlines()
    assert lines[0] == "wrong: Wrong at 1K: error 0.3 over 1e-5"
    assert lines[1] == "oom: Dense at 64K, 128K: no room"
    assert lines[2].startswith("unstable: BLADE at 1K, 2K (")
    assert notes([row("Dense", 1024, 0.1)]).plain == ""


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_ranking_breaks_between_entries(width: int) -> None:
    rows = [row(f"Block{i}", 1024, 0.001 * (i + 1)) for i in range(9)] + [row("Dense", 1024, 0.02)]
    lines = ranking_lines(rows, width).plain.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("1K  Block0 0.050x,")
    assert all(re.match(r"    (Block\d|Dense) [\d.]+x", line) for line in lines[1:])
    assert " ".join(lines).count("x") == 10


def test_ascii_terminals_get_ascii() -> None:
    for text in (
        results_table(ROWS, 60, ascii_only=True),
        notes(ROWS, ascii_only=True),
        ranking_lines(ROWS, 40, ascii_only=True),
    ):
        assert text.plain.isascii()


def test_layout_pads_wide_characters_by_their_cells() -> None:
    names = Column(header="block", cells=["日本", "ab"], right=False, flexible=True)
    text = layout([names, Column(header="n", cells=["1", "22"])], 40).plain.splitlines()
    assert [cell_len(line) for line in text] == [9, 9, 9]


@pytest.mark.parametrize("width", [80, 50, 40, 20])
def test_two_settings_of_a_block_are_told_apart_on_every_screen(width: int) -> None:
    names = [f"DPASSM:window_size={window},state_dim={state}" for window in (128, 256) for state in (32, 64)]
    rows = [row(name, 1024, 0.01 * (i + 1)) for i, name in enumerate(names)]
    table = results_table(rows, width).plain
    shown = re.findall(r"DP\S+", table)
    assert len(set(shown)) == len(names), table
    ranked = ranking_lines(rows, width).plain
    assert len(set(re.findall(r"DP\S+", ranked))) == len(names), ranked


def test_warnings_are_named_whole_or_counted() -> None:
    warnings = ["launch_bound", "memory_grows", "unstable"]
    for width in (100, 80, 70):
        table = results_table([row("BLADE", 1024, 0.01, warnings=warnings)], width).plain
        assert table.endswith("launch_bound, memory_grows +1") or "status" not in table


def test_environment_line_takes_whatever_is_known() -> None:
    assert environment_line({}).plain == ""
    line = environment_line({"gpu": "GPU\x1b[0m", "torch": "2.8", "driver": "580", "flags": None}, "bf16").plain
    assert line == "GPU [0m, bf16, torch 2.8, driver 580"
    assert environment_line({"cpu": "C", "flags": {"threads": 1}}).plain == "C, 1 thread"


def test_facts_leave_out_what_is_unknown_and_keep_to_the_width() -> None:
    lines = facts({"name": "a " * 40, "gone": None, "yes": True}, 40).plain.splitlines()
    assert max(map(len, lines)) <= 40
    assert "gone" not in "".join(lines)
    assert lines[-1].split() == ["yes", "yes"]
