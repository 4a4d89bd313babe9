"""The roofline as picture and table, and figures for papers: units, marks, names of strangers, no half-written file."""

import re

import pytest

from longctx.analysis.roofline import Roof, longest_points, machines, roof_points
from longctx.errors import MissingError, ResultsError
from longctx.results import BenchmarkResult
from longctx.terminal.figures import Panel, save_figure
from longctx.terminal.roofline import roofline_plot, roofline_table

ROOF = Roof(flops=8e14, bytes=2e12)
HOSTILE = "_$\\x^{2 \x1b[31m[red]"


def row(name, length, *, flops=7e6, seconds=1e-8, **fields):
    values = {"forward_time_median": seconds * length, "flops": flops * length, "bytes": 2048.0 * length + 6e6}
    values |= {"roofline_fraction": 0.25, "dtype": "bf16", "environment": {"gpu": "G", "torch": "2.11"}}
    values |= {"forward_time_ci95": [0.9 * seconds * length, 1.2 * seconds * length]}
    return BenchmarkResult(block_name=name, sequence_length=length, **(values | fields))


def rows(name="BLADE"):
    lengths = [1024 << i for i in range(6)]
    return [row(each, t, seconds=s) for t in lengths for each, s in (("Dense", 2e-8), (name, 1e-8))]


def test_a_point_is_work_over_bytes_and_over_time():
    (point,) = roof_points([row("A", 1000), row("B", 1000, status="oom"), row("C", 1000, flops=0.0)])
    assert point.intensity == pytest.approx(7e9 / 8.048e6) and point.rate == pytest.approx(7e14)
    assert point.least_s == pytest.approx(0.25 * 1e-5)
    assert [p.length for p in longest_points(rows())] == [32768, 32768]


def test_the_roof_is_the_lower_of_two_limits():
    assert ROOF.ridge == 400.0
    assert (ROOF.at(100.0), ROOF.at(400.0), ROOF.at(1e6)) == (2e14, 8e14, 8e14)


def test_machines_are_told_apart():
    other = row("A", 1024, environment={"cpu": "C", "threads": 2, "torch": "2.11"})
    more = row("A", 1024, environment={"cpu": "C", "threads": 1, "torch": "2.11"})
    assert len(machines(rows())) == 1 and len(machines([*rows(), other, more])) == 3


@pytest.mark.parametrize("width", [120, 80, 50, 40, 30])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_picture_fits_and_needs_no_colour(width, ascii_only):
    plot = roofline_plot(rows(HOSTILE), ROOF, width=min(width, 100), height=16, color=False, ascii_only=ascii_only)
    text = plot.plain
    assert max(map(len, text.splitlines())) <= max(width, 66) and "\x1b" not in text
    assert plot.body.plain and max(map(len, plot.body.plain.splitlines())) <= width
    if width >= 40:
        assert "25.0% of the roof" in text and "800 TFLOP/s" in text and "400 FLOP/byte" in text
        assert (("=" if ascii_only else "▀") in plot.body.plain) and len(text.splitlines()) <= 24
    assert text.isascii() or not ascii_only


def test_the_table_has_the_least_time_and_drops_columns_on_narrow_screens():
    assert re.search(r"BLADE +32K +\S+ +700 +328 us +81.9 us +25.0%", roofline_table(rows(), 120).plain)
    for width in (80, 50):
        text = roofline_table(rows(), width).plain
        assert "of the roof" in text and max(map(len, text.splitlines())) <= width
    assert roofline_table([], 80).plain == ""


def panels(found):
    metrics = ("time", "throughput", "memory", "memory-per-token", "scaling", "tflops", "energy")
    return [
        *(Panel(metric=name, runs={"": found}) for name in metrics),
        Panel(metric="roofline", runs={"": found}, roof=ROOF),
    ]


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_figures_are_written_whole(tmp_path, ending):
    pytest.importorskip("matplotlib", reason="needs the extra `figures` (matplotlib)")
    path = tmp_path / f"new/figure.{ending}"
    oom = BenchmarkResult(block_name="Dense", sequence_length=65536, status="oom")
    for found in (rows(HOSTILE), [*rows(), oom], [oom, *rows()[:1]]):
        save_figure(panels(found), path, caption="A GPU, bf16, torch 2.11")
        data = path.read_bytes()
        assert data[:4] == (b"\x89PNG" if ending == "png" else b"%PDF") and len(data) > 20_000
        assert b"A GPU, bf16" in data or ending == "pdf"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError):
        save_figure(panels(rows())[:1], tmp_path / "file" / "x.png", caption="")


def test_curves_have_units_bars_slopes_and_names():
    pytest.importorskip("matplotlib", reason="needs the extra `figures` (matplotlib)")
    from matplotlib.figure import Figure

    from longctx.terminal import figures

    axes = Figure().subplots()
    figures._curves(Panel(metric="time", runs={"": rows()}), axes)
    assert axes.get_ylabel() == "forward time (µs)" and axes.get_xlabel() == "sequence length (tokens)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert {"Dense", "BLADE", "slope of T", "slope of T²"} <= {t.get_text() for t in axes.get_legend().get_texts()}
    assert len(axes.containers) == 2 and all(bars.has_yerr for bars in axes.containers)


def test_without_matplotlib_the_command_that_brings_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingError) as error:
        save_figure([], tmp_path / "x.png", caption="")
    assert error.value.exit_code == 5 and "pip install 'longctx[figures]'" in error.value.hint
