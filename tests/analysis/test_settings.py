"""What rows must share to be compared, how it is said, and that nothing is mixed that does not share it."""

from __future__ import annotations

import pytest

from longctx.analysis.conclusions import conclude, conclude_modes
from longctx.analysis.curves import curves
from longctx.analysis.ranking import base_of
from longctx.analysis.series import METRICS, collect
from longctx.analysis.settings import by_mode, in_words, varying
from longctx.config import BlockRequest, Cell
from longctx.results import BenchmarkResult


def row(name, length, time_s, **fields):
    shared = {"config": {"d_model": 64, "n_heads": 4, "num_kv_heads": None}, "dtype": "fp32", "samples": [[time_s] * 3]}
    return BenchmarkResult(
        block_name=name, sequence_length=length, forward_time_median=time_s, **(shared | {"status": "ok"} | fields)
    )


def run(axis, values, *, lengths=(1024, 2048, 4096)):
    """Dense and BLADE in every setting; BLADE is the faster one in the first setting alone."""
    rows = []
    for index, value in enumerate(values):
        fields = {axis: value} if axis in ("mode", "dtype", "batch_size") else {}
        if not fields:
            fields = {"config": {"d_model": 64, "n_heads": 4, axis: value}}
        for length in lengths:
            rows.append(row("Dense", length, (1 + 10 * index) * length * 1e-6, **fields))
            rows.append(row("BLADE", length, (0.5 + 25 * index) * length * 1e-6, **fields))
    return rows


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("mode", ["forward", "train"], ["forward", "train"]),
        ("dtype", ["fp32", "bf16"], ["fp32", "bf16"]),
        ("batch_size", [1, 16], ["batch 1", "batch 16"]),
        ("d_model", [64, 128], ["width 64", "width 128"]),
        ("n_heads", [4, 8], ["4 heads", "8 heads"]),
        ("layers", [1, 3], ["1 layer", "3 layers"]),
    ],
)
def test_no_axis_is_mixed(axis, values, words):
    rows = run(axis, values)
    axes = varying(rows)
    assert [each.name for each in axes] == [axis]
    assert list(dict.fromkeys(in_words(each, axes) for each in rows)) == words
    for each in rows:
        base = base_of(each, rows)
        assert axes[0].of(base) == axes[0].of(each)
    assert [len(curve.rows) for curve in curves(rows)] == [3] * 4
    said = conclude(rows)
    assert len(said.crossovers) == 2 and len(said.growths) == 4
    assert {best.time[0] for best in said.best if best.setting == words[0]} == {"BLADE"}
    assert {best.time[0] for best in said.best if best.setting == words[1]} == {"Dense"}
    assert len(said.sentences) == 2
    assert words[0] in said.sentences[0] and "BLADE is the fastest" in said.sentences[0]
    assert words[1] in said.sentences[1] and "Dense is faster" in said.sentences[1]


def test_rows_of_one_name_and_two_options_are_two_curves():
    rows = [
        row("BLADE", length, 1e-6 * length * size, block_options={"chunk_size": size, "state_dim": 64})
        for size in (256, 512)
        for length in (1024, 2048)
    ]
    names = ["BLADE chunk_size=256", "BLADE chunk_size=512"]
    assert [curve.name for curve in curves(rows)] == names
    assert [curve.name for curve in collect({"": rows}, METRICS["time"])[0]] == names


def test_each_mode_is_concluded_by_itself():
    rows = run("mode", ["train", "forward", "decode"])
    assert list(by_mode(rows)) == ["forward", "train", "decode"]
    found = conclude_modes(rows)
    assert [len(each.growths) for each in found.values()] == [2, 2, 2]
    assert {growth.curve.name for growth in found["train"].growths} == {"Dense", "BLADE"}
    assert found["decode"].sentences[0].startswith("After 4,096 tokens")


def test_memory_of_decoding_is_that_of_the_state():
    rows = [row("Dense", 64, 1e-3, mode="decode", state_bytes=4096, peak_memory_mb=7.0)]
    assert METRICS["memory"].value(rows[0]) == 4096
    rows[0].mode = "prefill"
    assert METRICS["memory"].value(rows[0]) == 7.0 * 2**20


def test_what_a_failed_row_does_not_know_is_no_difference():
    rows = [row("A", 64, 1.0), BenchmarkResult(block_name="B", sequence_length=64, status="crashed")]
    assert varying(rows) == []
    rows[1].status = "ok"
    assert {axis.name for axis in varying(rows)} >= {"dtype"}


def test_as_many_key_value_heads_as_heads_are_no_trait():
    cells = [Cell(block=BlockRequest(target="Dense"), length=64, n_heads=n) for n in (4, 8)]
    assert [axis.name for axis in varying(cells)] == ["n_heads"]
    cells.append(Cell(block=BlockRequest(target="Dense"), length=64, n_heads=8, num_kv_heads=2))
    assert [axis.name for axis in varying(cells)] == ["n_heads", "num_kv_heads"]


def test_a_row_may_hold_anything():
    rows = [row("A", 64, 1.0, config={"d_model": [1], "n_heads": {"a": 1}}), row("A", 64, 1.0, config=None)]
    assert [axis.name for axis in varying(rows)] == ["d_model", "n_heads"]
    assert "width [1]" in in_words(rows[0], varying(rows))
