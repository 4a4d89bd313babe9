"""What can be drawn over: which rows are then one curve, where they stand, and what is refused."""

from __future__ import annotations

import pytest

from longctx.analysis.series import METRICS, collect
from longctx.analysis.x_axis import natural_x, x_axis
from longctx.errors import UsageError
from longctx.results import BenchmarkResult


def row(name="DPASSM", *, window=256, length=1024, **fields):
    shared = {"dtype": "fp32", "config": {"d_model": 64, "n_heads": 4}, "block_options": {"window_size": window}}
    return BenchmarkResult(block_name=name, sequence_length=length, forward_time_median=1e-3, **(shared | fields))


def points(rows, word):
    return {curve.name: curve.points for curve in collect({"": rows}, METRICS["time"], x_axis(word, rows))[0]}


def test_a_field_of_the_configuration():
    rows = [row(batch_size=b, length=t) for b in (1, 4) for t in (1024, 2048)]
    assert points(rows, "batch-size") == {name: [(1, 1e-3), (4, 1e-3)] for name in ("DPASSM T=1024", "DPASSM T=2048")}
    assert points(rows, "batch") == points(rows, "batch_size")
    assert list(points(rows, "tokens")) == ["DPASSM B=1", "DPASSM B=4"]
    wide = [row(config={"d_model": d, "n_heads": 4}) for d in (64, 128)]
    assert points(wide, "d_model") == {"DPASSM": [(64, 1e-3), (128, 1e-3)]}


def test_an_option_of_a_block_joins_the_rows_that_it_makes():
    rows = [row(f"DPASSM:state_dim=8,window_size={w}", window=w) for w in (128, 256)]
    rows += [row("DPASSM:state_dim=8", window=512), row("Dense", block_options={"causal": True})]
    assert points(rows, "window_size") == {"DPASSM:state_dim=8": [(128, 1e-3), (256, 1e-3), (512, 1e-3)]}
    missing = collect({"": rows}, METRICS["time"], x_axis("window_size", rows))[1]
    assert [(each.name, each.x, each.reason) for each in missing] == [("Dense", None, "no window_size")]


def test_number_formats_stand_evenly():
    rows = [row(dtype=dtype) for dtype in ("fp32", "bf16", "fp64")]
    axis = x_axis("dtype", rows)
    assert [axis.categories[axis.value(each)] for each in rows] == ["fp32", "bf16", "fp64"]
    assert len(points(rows, "dtype")["DPASSM"]) == 3


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([row(length=1024), row(length=2048, batch_size=4)], "length"),
        ([row(batch_size=1), row(batch_size=4)], "batch_size"),
        ([row("DPASSM:window_size=128", window=128), row()], "window_size"),
        ([row(batch_size=1), row(batch_size=4), row(batch_size=4, window=128)], "length"),
        ([row(), row("Dense", block_options={})], "length"),
        ([row(dtype="fp32"), row(dtype="bf16")], "length"),
    ],
)
def test_the_only_number_that_varies_is_drawn_over_by_itself(rows, name):
    assert natural_x(rows).name == name


def test_what_is_not_there_is_refused_with_what_is():
    rows = [row(batch_size=1), row(batch_size=4)]
    with pytest.raises(UsageError, match="Did you mean 'window_size'") as caught:
        x_axis("windw-size", rows)
    assert caught.value.hint == "these rows differ in length, batch_size"
    for word in ("mode", "device", "causal"):
        with pytest.raises(UsageError):
            x_axis(word, rows)
