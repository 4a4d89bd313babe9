"""`report` of a run that was ended early: what it lacks, and the command that goes on with it."""

from __future__ import annotations

import json

import pytest

from longctx.analysis.unfinished import unfinished
from longctx.blocks import names
from longctx.config import BenchmarkConfig, parse_blocks, variants
from longctx.reproduce import command_line
from longctx.results import BenchmarkResult


def rows_of(blocks, *, rounds=2, done=None, vary=None, fields=None, **config):
    """The rows of a sweep as it saves them. done: rounds of a cell by its number, all of them if None."""
    made = BenchmarkConfig(rounds=rounds, dtype="fp32", **config)
    command = command_line("sweep", made, blocks, defaults=BenchmarkConfig(), vary=vary)
    rows = []
    cells = [
        cell for each in variants(made, vary) for cell in each.cells(parse_blocks(blocks or names()), dtype="fp32")
    ]
    for index, cell in enumerate(sorted(cells, key=lambda cell: cell.length)):
        count = rounds if done is None else done(index)
        if not count:
            continue
        rows.append(
            BenchmarkResult(
                block_name=cell.block.name,
                sequence_length=cell.length,
                batch_size=cell.batch_size,
                mode=cell.mode,
                dtype=cell.dtype,
                forward_time_median=1e-3,
                samples=[[1e-3] * 3] * count,
                config=made.to_json() | {name: getattr(cell, name) for name in vary or ()},
                command=command,
                **(fields or {}),
            )
        )
    return rows


SWEEPS = [
    {"blocks": []},
    {"blocks": ["Dense", "DPASSM:window_size=128", "DPASSM:window_size=256", "a/mine.py:Mine", "p.q:Own:scale=0.5"]},
    {"blocks": ["Dense", "BLADE"], "vary": {"mode": ["forward", "train"], "batch_size": [1, 4]}},
    {"blocks": ["Dense"], "vary": {"d_model": [256, 512], "n_heads": [4, 8]}, "lightning_mode": True},
]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_whole_run_lacks_nothing_and_a_part_of_it_lacks_the_rest(sweep):
    whole = rows_of(**sweep)
    assert unfinished(whole, "x.json", blocks=names()) == []
    (left,) = unfinished(whole[:1], "x.json", blocks=names())
    assert (left.cells, left.missing, left.short) == (len(whole), len(whole) - 1, 0)


def test_what_another_command_measured_is_not_missing():
    first = rows_of(["Dense", "BLADE"], done=lambda index: 2 * (index < 3))
    assert unfinished(first, "x.json", blocks=names())
    # The rest under a time limit, which makes another command of it.
    rest = rows_of(["Dense", "BLADE"], max_time=60.0)[3:]
    assert unfinished([*first, *rest], "x.json", blocks=names()) == []


@pytest.mark.parametrize("columns", [120, 50])
def test_report_says_what_is_missing_and_how_to_go_on(longctx, tmp_path, columns):
    path = tmp_path / "run.json"
    rows = rows_of(
        ["Dense", "BLADE"], sequence_lengths=[1024, 2048, 4096], done=lambda index: (2, 1, 1, 0, 0, 0)[index]
    )
    path.write_text(json.dumps([row.to_json() for row in rows]))
    code, out, _ = longctx("report", path, columns=columns)
    flat = " ".join(out.split())
    assert code == 0
    assert "not complete: 3 of 6 cells not measured, at 2K, 4K; 2 more in fewer than 2 rounds" in flat
    again = next(line for line in out.splitlines() if line.startswith("go on: "))
    assert again.startswith("go on: longctx sweep --blocks Dense BLADE") and "--rounds 2" in again
    assert again.endswith(f"--output-file {path} --resume")
    (run,) = json.loads(longctx("report", path, "--json")[1])["runs"]
    assert (run["unfinished"][0]["missing"], run["unfinished"][0]["short"]) == (3, 2)
    assert "3 of 6 cells not measured" in longctx("report", path, "--markdown")[1]


def test_rounds_alone_may_be_missing(longctx, tmp_path):
    path = tmp_path / "run.json"
    rows = rows_of(["Dense"], sequence_lengths=[1024, 2048], done=lambda index: 2 - index)
    path.write_text(json.dumps([row.to_json() for row in rows]))
    assert "not complete: 1 of 2 cells in fewer than 2 rounds, at 2K" in longctx("report", path)[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"command": "longctx sweep --blocks " + " ".join(f"b{i}" for i in range(700))},
        {"command": "longctx sweep --mode " + "a " * 300 + "--dtype " + "b " * 300 + "--batch-size " + "1 " * 300},
        {"command": "rm -rf /"},
        {"command": "longctx sweep --blocks 'Dense"},
        {"command": "longctx sweep --against other"},
        {"config": {"sequence_lengths": [[1], None], "rounds": "x"}},
        {"config": {}},
    ],
)
def test_a_strangers_command_is_counted_and_never_run(longctx, tmp_path, fields):
    path = tmp_path / "run.json"
    (row,) = rows_of(["Dense"], sequence_lengths=[1024], rounds=1)
    path.write_text(json.dumps([row.to_json() | fields]))
    code, out, _ = longctx("report", path)
    assert code == 0 and "rm -rf" not in out and "not complete" not in out
