"""The pictures: what they show, and that nothing a file can hold ends the process."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.text import Text

from longctx.analysis.roofline import Roof
from longctx.analysis.series import places_of
from longctx.results import BenchmarkResult
from longctx.terminal.plots import MARKERS, plot_size, scaling_plot, to_ascii, value_ticks
from longctx.terminal.roofline import roofline_plot

LENGTHS = (1024, 2048, 4096, 8192, 16384)
METRICS = ("time", "throughput", "memory", "memory-per-token", "scaling")


def row(name, length, time_s, **fields):
    return BenchmarkResult(
        block_name=name,
        sequence_length=length,
        forward_time_median=time_s,
        throughput_tokens_per_sec=length / time_s if time_s else None,
        peak_memory_mb=length / 100,
        peak_bytes_per_token=1000.0,
        **fields,
    )


def run():
    rows = [row("BLADE", length, length * 1e-5) for length in LENGTHS]
    rows += [row("Dense", length, length**2 * 1e-8) for length in LENGTHS[:-1]]
    return [*rows, BenchmarkResult(block_name="Dense", sequence_length=16384, status="oom")]


def printed(plot, width, **options):
    out = io.StringIO()
    Console(file=out, width=width, **options).print(plot)
    return out.getvalue()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [120, 80, 50, 40])
def test_pictures_fit_their_width(metric, width):
    columns, rows = plot_size(width)
    text = printed(scaling_plot(run(), metric=metric, width=columns, height=rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for label in ("1K", "16K", "BLADE", "Dense", "OOM at 16K: Dense", "●", "■"):
        assert label in text
    if width == 80:
        assert len(text.splitlines()) <= 24


def test_curves_keep_their_marker_and_are_listed_as_they_end():
    time = scaling_plot(run()[:-1], metric="time", width=80, height=16)
    rate = scaling_plot(run()[:-1], metric="throughput", width=80, height=16)
    assert "● BLADE" in time.legend.plain and "● BLADE" in rate.legend.plain
    assert "■ Dense 671 at 8K" in time.legend.plain


def marks(picture):
    """Name of a curve -> what stands before it in the legend."""
    return {found[2]: found[1] for found in re.finditer(r"(\S) ([A-Z]\w+)", picture.legend.plain)}


def test_a_block_has_one_marker_in_all_pictures_of_an_output():
    forward = [row(name, length, length * 1e-5) for name in ("Dense", "Mine", "BLADE") for length in LENGTHS]
    # Mine has no step.
    decode = [
        row(name, length, 1e-3 + length * 1e-9, mode="decode", flops=1e9, bytes=1e6)
        for name in ("BLADE", "Dense")
        for length in LENGTHS
    ]
    look = {"width": 80, "height": 16, "places": places_of({"": [*forward, *decode]})}
    every = marks(scaling_plot(forward, metric="time", **look))
    assert len(set(every.values())) == 3
    some = {name: every[name] for name in ("BLADE", "Dense")}
    assert marks(scaling_plot(decode, metric="time", **look)) == some
    assert marks(roofline_plot(decode, Roof(flops=1e13, bytes=1e11), **look)) == some


def test_a_block_without_a_figure_moves_no_other_marker():
    rows = [row(name, length, length * 1e-5) for name in ("Dense", "Mine", "BLADE") for length in LENGTHS]
    for each in rows:
        each.joules_per_token = 1e-3 if each.block_name != "Mine" else None
    time, energy = (marks(scaling_plot(rows, metric=name, width=80, height=16)) for name in ("time", "energy"))
    assert energy == {name: time[name] for name in ("Dense", "BLADE")}


def test_scaling_shows_slopes_and_references():
    plot = scaling_plot(run(), metric="scaling", width=80, height=16)
    # Five lengths over a span of 16 make a law, as in the report; the four of Dense make none.
    assert "BLADE 164, T^1.00" in plot.legend.plain and "local slope 2.00" in plot.legend.plain
    assert "···" in plot.body.plain


def test_scaling_tells_the_exponent_of_the_report():
    rows = [row("BLADE", length, 0.05 + length * 1e-5) for length in LENGTHS]
    assert ", T^1.00" in scaling_plot(rows, metric="scaling", width=80, height=16).legend.plain
    launching = [row("BLADE", length, 0.05, warnings=["launch_bound"]) for length in LENGTHS]
    assert ", launch-bound" in scaling_plot(launching, metric="scaling", width=80, height=16).legend.plain


def test_places_without_a_figure_are_told_together():
    rows = [row(name, length, None) for name in ("A", "B") for length in LENGTHS]
    plot = scaling_plot([*rows, row("C", 1024, None, status="oom")], metric="time", width=80, height=16)
    assert plot.caption.plain == "no figure at 1K, 2K, 4K, 8K, 16K: A, B\nOOM at 1K: C"


def test_colour_only_where_asked():
    plot = scaling_plot(run(), metric="time", width=80, height=16)
    assert "\x1b[" in printed(plot, 80, force_terminal=True, color_system="standard")
    plain = scaling_plot(run(), metric="time", width=80, height=16, color=False)
    assert "\x1b[3" not in printed(plain, 80, force_terminal=True, color_system="standard")


def test_several_files_are_laid_over_each_other():
    plot = scaling_plot({"old": run(), "new": run()}, metric="time", width=100, height=20)
    assert "BLADE (old)" in plot.legend.plain and "BLADE (new)" in plot.legend.plain


def test_one_length_is_drawn_as_bars():
    rows = [row("BLADE", 1024, 0.010), row("Dense", 1024, 0.020)]
    lines = scaling_plot(rows, metric="time", width=60, height=16).body.plain.splitlines()
    assert [line.split()[0] for line in lines] == ["Dense", "BLADE"]
    assert lines[0].count("━") == pytest.approx(2 * lines[1].count("━"), abs=1)


def test_a_narrow_screen_gets_a_table():
    text = printed(scaling_plot(run(), metric="time", width=30, height=12), 30)
    assert "16K  164" in text and "┌" not in text
    assert max(map(len, text.splitlines())) <= 30


def test_names_are_plain_text():
    hostile = "\x1b[31m[red]x[/red]\x1b]0;t\x07\u202e\ud800\nnext"
    plot = scaling_plot(
        [row(hostile, length, length * 1e-5) for length in LENGTHS],
        metric="time",
        width=80,
        height=16,
        title=hostile,
    )
    text = printed(plot, 80)
    text.encode()
    assert "[red]x[/red]" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    long = scaling_plot([row("x" * 500, t, 1e-3) for t in LENGTHS], metric="time", width=80, height=16)
    assert max(map(len, long.legend.plain.splitlines())) <= 80


def test_ascii_only_is_ascii():
    for metric in METRICS:
        assert scaling_plot(run(), metric=metric, width=80, height=16, ascii_only=True).plain.isascii()


def test_markers_differ_in_ascii_too():
    shown = to_ascii(Text(MARKERS)).plain
    assert len(set(shown)) == len(MARKERS)
    assert not set(shown) & set(".:|-=")


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.1, 0.9), (0.30, 0.33), (2.0, 2.0001), (-300.0, 300.0)])
def test_ticks_lie_inside_and_apart(low, high):
    ticks = value_ticks(low, high, rows=14)
    assert 1 <= len(ticks) <= 9
    assert all(low <= position <= high for position, _ in ticks)


BAD_INPUTS = {
    "empty run": "[]",
    "None": "[r(1024, None), r(2048, 1.0), r(4096, 2.0)]",
    "NaN": "[r(1024, nan), r(2048, 1.0), r(4096, 2.0)]",
    "all NaN": "[r(1024, nan), r(2048, nan)]",
    "inf": "[r(1024, inf), r(2048, 1.0), r(4096, -inf)]",
    "zero": "[r(1024, 0), r(2048, 0.0), r(4096, 2.0)]",
    "negative": "[r(1024, -1.0), r(2048, 1.0), r(4096, 2.0)]",
    "one point": "[r(1024, 1.0)]",
    "equal values": "[r(1024, 1.0), r(2048, 1.0), r(4096, 1.0)]",
    "same length twice": "[r(1024, 1.0), r(1024, 2.0)]",
    "huge": "[r(1024, 1e308), r(2048, 1e-308), r(4096, 10**400)]",
    "no number": "[r(1024, '1'), r(2048, True), r(4096, [1.0]), r(8192, 1.0)]",
    "only failures": "[r(1024, 1.0, status='oom'), r(2048, 1.0, status='x' * 200)]",
    "thirty blocks": "[r(n, 1.0 * i, name=str(i)) for i in range(1, 31) for n in (1024, 2048)]",
}


def test_no_input_ends_the_process():
    # In a child, because plotext's kernel would take pytest down with it; the last case printed is to blame.
    script = f"""
from longctx.results import BenchmarkResult
from longctx.terminal.plots import scaling_plot
nan, inf = float("nan"), float("inf")
def r(length, value, name="X", **fields):
    return BenchmarkResult(block_name=name, sequence_length=length, forward_time_median=value,
        throughput_tokens_per_sec=value, peak_memory_mb=value, peak_bytes_per_token=value, **fields)
for case, rows in {BAD_INPUTS!r}.items():
    print(case, flush=True)
    for metric in {METRICS!r}:
        for width, height in ((100, 20), (40, 6), (20, 2)):
            assert scaling_plot(eval(rows), metric=metric, width=width, height=height).plain
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stdout[-200:] + done.stderr[-2000:]
