"""`longctx limits` without a search: what it asks for, what it prints, how it ends."""

import dataclasses
import json
import sys
import types

import pytest

from longctx.config import BenchmarkConfig, parse_blocks
from longctx.events import CellFinished, CellStarted, SweepFinished, SweepStarted
from longctx.results import BenchmarkResult
from longctx.terminal.limits import limits_text


def rows_of(name, longest, end):
    rows, length = [], 1024
    while length <= 2 * longest:
        ok = length <= longest
        rows.append(
            BenchmarkResult(
                block_name=name,
                sequence_length=length,
                status="ok" if ok else end,
                error=None if ok else {"type": "X", "message": f"no more \x1b[31m{end}", "log_tail": None},
                total_memory_mb=length / 128 if ok else None,
                peak_memory_mb=length / 256 if ok else None,
                first_call_s=0.25 if ok else None,
                dtype="fp32",
                config={
                    "batch_size": 1,
                    "d_model": 512,
                    "n_heads": 8,
                    "limits": {"resolution": 1.0, "max_length": None},
                },
                environment={"cpu": "A processor", "torch": "2.13.0", "memory_available_bytes": 8 << 30},
            )
        )
        length *= 2
    return rows


@pytest.fixture
def search(monkeypatch):
    """Stands in for the engine: `ends` says how far each block goes and what ends it."""
    asked = types.SimpleNamespace(calls=[], ends={"Dense": (16384, "timeout"), "BLADE": (65536, "oom")})

    def run_limits(blocks, config, *, resolution, max_length, vary, on_event, command):
        asked.calls.append((blocks, config, resolution, max_length, vary))
        cells = {block.name: cell for block in parse_blocks(asked.ends) for cell in config.cells([block], dtype="fp32")}
        environment = {"cpu": "A processor", "torch": "2.13.0"}
        on_event(SweepStarted(cells=(), rounds=1, environment=environment, path="out/limits.json"))
        rows = [row for name, (longest, end) in asked.ends.items() for row in rows_of(name, longest, end)]
        for row in rows:
            on_event(CellStarted(cell=cells[row.block_name], round=0))
            on_event(CellFinished(cell=cells[row.block_name], round=0, result=row))
        on_event(SweepFinished(results=tuple(rows), complete=True))
        return rows

    from longctx.engine import run_limits as real

    module = types.ModuleType("longctx.engine.run_limits")
    module.run_limits, module.limits_command = run_limits, real.limits_command
    monkeypatch.setitem(sys.modules, "longctx.engine.run_limits", module)
    return asked


@pytest.mark.parametrize("columns", ["120", "80", "50"])
def test_the_answer_fits_the_terminal_and_says_why_it_ended(search, call, columns):
    done = call("limits", COLUMNS=columns)
    flat = " ".join(done.stdout.split())
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines()[:-2])) <= int(columns)
    for words in (
        "65,536",
        "memory",
        "time",
        "24 GiB",
        "141 GiB",
        "extrapolated",
        "no more",
        "BLADE goes to 65,536 tokens",
    ):
        assert words in flat, words
    assert "time ended it, not memory; by its memory law the 8.00 GiB here would hold about" in flat
    assert "\x1b" not in done.stdout + done.stderr
    assert "[1] " in done.stderr and "fits: 8.00 MiB" in done.stderr and "results:" in done.stdout


def test_options_reach_the_search(search, call):
    done = call(
        "limits", "--blocks", "BLADE", "--mode", "train", "--max-length", "1M", "--resolution", "0.1", "--quiet"
    )
    ((blocks, config, resolution, longest, vary),) = search.calls
    assert done.exit_code == 0 and done.stderr == ""
    assert (blocks, config.mode, resolution, longest, vary) == (["BLADE"], "train", 0.1, 1 << 20, {})
    assert "reproduce: longctx limits --blocks BLADE --mode train" in done.stdout


def test_one_json_document(search, call):
    done = call("limits", "--json")
    document = json.loads(done.stdout)
    assert [one["longest"] for one in document["limits"]] == [16384, 65536]
    assert [one["limit"] for one in document["limits"]] == ["time", "memory"]
    assert document["limits"][1]["memory_law"]["exponent"] == pytest.approx(1.0, abs=0.01)
    assert all(held["extrapolated"] for held in document["limits"][1]["would_hold"])
    assert len(document["results"]) == 5 + 1 + 7 + 1


def test_nothing_that_fits_is_a_failed_check(search, call):
    search.ends = {"Dense": (512, "failed")}
    done = call("limits")
    assert done.exit_code == 3 and "failed" in done.stdout
    assert call("limits", "--max-length", "many").exit_code == 2


def test_blocks_that_all_reach_the_end_of_the_search_are_named_alike():
    rows = [row for name in ("Dense", "BLADE", "DPASSM") for row in rows_of(name, 4096, "ok")[:3]]
    for row in rows:
        row.config["limits"]["max_length"] = 4096
    said = limits_text(rows, 100).plain
    assert said.endswith("BLADE, DPASSM and Dense go to at least 4,096 tokens each.")


def test_warnings_of_the_lengths_stand_under_the_table():
    rows = rows_of("BLADE", 4096, "oom")
    rows[1].warnings = ["memory_grows"]
    assert "memory_grows: BLADE at 2K (every call leaves memory behind" in limits_text(rows, 100).plain
    narrow = limits_text(rows, 50).plain
    assert max(map(len, narrow.splitlines())) <= 50 and "memory behind" in " ".join(narrow.split())


def test_report_says_how_to_go_on_with_a_search_that_was_ended(call, tmp_path):
    path = tmp_path / "limits.json"
    rows = [*rows_of("BLADE", 8192, "oom"), *rows_of("Dense", 4096, "oom")[:-1]]
    for row in rows:
        row.command = "longctx limits --blocks BLADE Dense --max-time 9"
    path.write_text(json.dumps([row.to_json() for row in rows]))
    out = call("report", str(path)).stdout
    assert "not complete: 1 of 2 searches not finished\n" in out
    assert f"go on: longctx limits --blocks BLADE Dense --output-file {path} --resume\n" in out
    assert json.loads(call("report", str(path), "--json").stdout)["runs"][0]["unfinished"][0]["missing"] == 1
    done = [row.to_json() for row in rows_of("BLADE", 8192, "oom")]
    path.write_text(json.dumps(done))
    assert "not complete" not in call("report", str(path)).stdout


def test_its_pictures_are_those_that_it_has_figures_for(call, tmp_path):
    path = tmp_path / "limits.json"
    path.write_text(json.dumps([row.to_json() for row in rows_of("BLADE", 8192, "oom")]))
    out = call("plot", str(path)).stdout
    assert "Peak memory (MiB) over tokens" in out and "Nothing to draw" not in out
    # One that is asked for by name says that there is nothing.
    assert "Nothing to draw" in call("plot", str(path), "--metric", "time").stdout
    failed = [row.to_json() for row in rows_of("BLADE", 8192, "oom") if not row.ok]
    path.write_text(json.dumps(failed))
    out = call("plot", str(path)).stdout
    assert out.count("Nothing to draw") == 1 and "OOM at 16K: BLADE" in out


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (50, 10)])
def test_the_live_picture_fits_the_screen(search, width, height):
    import io

    from rich.console import Console

    from longctx.terminal.limits import LiveLimits, limits_view

    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, force_interactive=True)
    view = limits_view(console)
    assert isinstance(view, LiveLimits)
    config = BenchmarkConfig(sequence_lengths=[1024])
    cells = tuple(config.cells(parse_blocks(["Dense", "BLADE"]), dtype="fp32"))
    view.update(SweepStarted(cells=cells, rounds=1, environment={}, path=None))
    for row in [*rows_of("Dense", 2048, "oom"), *rows_of("BLADE", 4096, "timeout")]:
        (cell,) = config.cells(parse_blocks([row.block_name]), dtype="fp32")
        cell = dataclasses.replace(cell, length=row.sequence_length)
        view.update(CellStarted(cell=cell, round=0))
        text = Console(file=io.StringIO(), width=width)
        text.print(view.render())
        lines = text.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width and len(lines) <= height
        view.update(CellFinished(cell=cell, round=0, result=row))
    text.print(view.render())
    picture = text.file.getvalue()
    assert "7 lengths tried" in picture and "2,048" in picture and "8,192 TIMEOUT" in picture


def test_the_running_search_is_among_those_that_the_screen_has_room_for():
    import io

    from rich.console import Console

    from longctx.terminal.limits import LiveLimits

    view = LiveLimits(Console(file=io.StringIO(), width=50, height=12, force_terminal=True), animate=False)
    (first,) = BenchmarkConfig(sequence_lengths=[1024]).cells(parse_blocks(["BLADE"]), dtype="fp32")
    cells = [dataclasses.replace(first, batch_size=size) for size in range(1, 13)]
    view.update(SweepStarted(cells=tuple(cells), rounds=1, environment={}, path=None))
    for running in cells:
        view.update(CellStarted(cell=running, round=0))
        text = Console(file=io.StringIO(), width=50)
        text.print(view.render())
        lines = text.file.getvalue().splitlines()
        assert len(lines) <= 12 and any(line.split()[:2] == [str(running.batch_size), "BLADE"] for line in lines)
        assert "more rows" in lines[-1]


def test_a_saved_search_can_be_read_again_and_is_no_sweep(call, tmp_path):
    path = tmp_path / "limits-now.json"
    path.write_text(json.dumps([row.to_json() for row in rows_of("BLADE", 65536, "oom")]))
    assert call("report", "--results-dir", str(tmp_path)).exit_code == 2
    assert "BLADE goes to 65,536 tokens" in call("report", str(path)).stdout
    (run,) = json.loads(call("report", str(path), "--json").stdout)["runs"]
    assert run["limits"][0]["longest"] == 65536
    pasted = call("report", str(path), "--markdown").stdout
    for words in ("| block | fits | too long |", "| BLADE | 65,536 | 131,072 | memory |", "| block | 24 GiB |"):
        assert words in pasted
    assert pasted.rstrip().endswith("A processor, fp32, torch 2.13.0") and "\nBLADE goes to 65,536 tokens" in pasted
    for words in (["report", str(path), "--markdown"], ["report", str(path), "--csv"], ["plot", str(path)]):
        assert call(*words).exit_code == 0


@pytest.mark.parametrize("columns", ["120", "80", "50"])
def test_every_mode_and_setting_has_a_limit_of_its_own(call, tmp_path, columns):
    rows = []
    for mode, batch, longest in (("forward", 1, 65536), ("forward", 4, 16384), ("train", 1, 8192), ("train", 4, 2048)):
        for row in [*rows_of("Dense", longest // 2, "oom"), *rows_of("BLADE", longest, "oom")]:
            config = row.config | {"batch_size": batch}
            rows.append(dataclasses.replace(row, mode=mode, batch_size=batch, config=config).to_json())
    path = tmp_path / "limits-now.json"
    path.write_text(json.dumps(rows))
    shown = call("report", str(path), COLUMNS=columns).stdout
    flat = " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert flat.count("Longest context, mode") == 2 and "mode train, D 512, H 8" in flat
    assert "Batch 1: BLADE goes to 65,536 tokens; Dense to 32,768." in flat
    assert "Batch 4: BLADE goes to 2,048 tokens; Dense to 1,024." in flat
    found = json.loads(call("report", str(path), "--json").stdout)["runs"][0]["limits"]
    assert [(one["mode"], one["batch_size"], one["longest"]) for one in found[-2:]] == [
        ("train", 4, 1024),
        ("train", 4, 2048),
    ]
    assert "| 4 | BLADE | 2,048 | 4,096 | memory |" in call("report", str(path), "--markdown").stdout


def test_several_modes_and_batches_reach_the_search(search, call):
    call(
        "limits", "--blocks", "BLADE", "--mode", "train", "decode", "--batch-size", "1", "4", "--layers", "2", "--quiet"
    )
    ((_, config, _, _, vary),) = search.calls
    assert vary == {"mode": ["train", "decode"], "batch_size": [1, 4]} and config.layers == 2
