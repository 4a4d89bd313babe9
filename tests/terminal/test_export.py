"""The documents for other programs: they read back, and nothing in them acts."""

import csv
import io
import json

from made_records import row, run

from longctx.terminal.export import document, to_csv
from longctx.terminal.markdown import to_markdown

HOSTILE = "=cmd|' /c'!A1 `<b>x</b>` \x1b[31m[red]@me #1 \ud800\n| a"


def test_csv_reads_back_and_runs_nothing():
    text = to_csv({"x": [row(HOSTILE, 1024, 0.1 + 0.2, warnings=["unstable"]), row("B", 2048, status="oom")]})
    text.encode()
    read = list(csv.DictReader(io.StringIO(text)))
    assert len(read) == 2
    assert read[0]["block_name"].startswith("'=cmd")
    assert "\x1b" not in text
    assert float(read[0]["forward_time_median"]) == 0.1 + 0.2
    assert (read[1]["forward_time_median"], read[1]["status"]) == ("", "oom")


def test_csv_tells_rows_of_two_shapes_apart():
    shapes = [{"d_model": 64, "n_heads": 4}, {"d_model": HOSTILE, "n_heads": [1]}]
    text = to_csv({"x": [row("A", 1024, 1.0, config=config) for config in shapes] + [row("A", 1024, 1.0)]})
    read = list(csv.DictReader(io.StringIO(text)))
    assert [(line["d_model"][:4], line["n_heads"]) for line in read] == [("64", "4"), ("'=cm", "[1]"), ("", "")]


def test_markdown_keeps_its_columns():
    text = to_markdown([row(HOSTILE, 1024, 1.0), *run()], environment="torch 2 | <cpu>")
    text.encode()
    assert "<" not in text and "\x1b" not in text and "@me" not in text
    head, rule, *body = text.split("\n\n")[0].splitlines()
    bars = {line.replace("\\|", "").count("|") for line in (head, rule, *body)}
    assert bars == {9}
    assert "| 4,096 |" in text and "| 0.25 |" in text
    assert "Dense at 8,192: oom, needs" in text


def test_document_is_strict_json():
    rows = [*run(), row("X", 1024, float("nan"), config={"a": float("inf")})]
    data = json.loads(json.dumps(document(rows), allow_nan=False))
    assert len(data["results"]) == len(rows)
    assert data["results"][-1]["forward_time_median"] is None
    assert data["ratios_to_dense"][1]["ratio"] == 1.0
    assert {s["name"] for s in data["local_slopes"]} >= {"Dense", "BLADE"}


def test_several_runs_are_told_apart_in_one_table():
    read = list(csv.DictReader(io.StringIO(to_csv({"old": run(), "=new": run()[:1]}))))
    assert [r["run"] for r in read] == ["old"] * len(run()) + ["'=new"]
