"""What a sweep refuses before anything is measured, and where it saves."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch
from tiny_sweeps import BLOCKS, config_of, lines, of_kind, saved, statuses, sweep

import longctx
from longctx import results as results_module
from longctx.config import BenchmarkConfig
from longctx.engine.runner import results_path, run_sweep
from longctx.errors import LongctxError, ResultsError, UsageError
from longctx.events import CellStarted

pytestmark = pytest.mark.usefixtures("tidy")

# -- what is refused before anything is measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("BLAED", "Did you mean 'BLADE'"),
        ("BLADE:chunk_sise=4", "chunk_size"),
        ("BLADE:chunk_size=0", "chunk_size"),
        ("nowhere.py:Block", "no file"),
        ("no_such_package:Block", "no_such_package"),
        ("{mine}:Plane", "Did you mean 'Plain'"),
        ("{mine}:Plain:width=3", "no option 'width'"),
        ("{mine}:HERE", "not something to build"),
    ],
)
def test_a_block_that_cannot_be_is_refused_and_no_file_is_made(tmp_path, mine, block, words):
    events = []
    with pytest.raises(LongctxError, match=words) as caught:
        target = block.replace("{mine}", mine("").rstrip(":"))
        run_sweep(["Identity", target], config_of(tmp_path), on_event=events.append)
    assert caught.value.exit_code == 2
    assert events == []
    assert not saved(tmp_path).exists()


def test_two_blocks_of_one_name_are_refused(tmp_path, mine):
    (tmp_path / "other.py").write_text(BLOCKS)
    with pytest.raises(LongctxError, match=r"same name, \w+: .*:.* and .*:"):
        sweep([mine("Plain"), f"{tmp_path}/other.py:Plain"], tmp_path)
    assert not saved(tmp_path).exists()


@pytest.mark.parametrize(
    ("name", "value"), [("d_model", 33), ("num_kv_heads", 3), ("timeout", math.inf), ("max_time", math.inf)]
)
def test_an_impossible_configuration_is_refused(tmp_path, name, value):
    with pytest.raises(UsageError, match=name):
        sweep(["Identity"], tmp_path, **{name: value})
    assert not saved(tmp_path).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_ends_in_five(tmp_path):
    with pytest.raises(LongctxError) as caught:
        sweep(["Identity"], tmp_path, device="cuda")
    assert caught.value.exit_code == 5
    assert not saved(tmp_path).exists()


def test_a_file_that_is_in_the_way_is_refused_and_left_alone(tmp_path, mine):
    saved(tmp_path).parent.mkdir()
    saved(tmp_path).write_text("[]")
    with pytest.raises(ResultsError, match="exists"):
        sweep([mine("Counted")], tmp_path)
    saved(tmp_path).write_text("damaged")
    with pytest.raises(ResultsError, match="not a results file"):
        sweep([mine("Counted")], tmp_path, resume=True)
    assert saved(tmp_path).read_text() == "damaged"
    assert lines(tmp_path / "calls") == []
    (row,), _ = sweep([mine("Counted")], tmp_path, force=True)
    assert longctx.load(saved(tmp_path)) == [row]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, mine):
    (tmp_path / "out").write_text("a file in the place of the folder")
    with pytest.raises(ResultsError, match="cannot write"):
        sweep([mine("Counted")], tmp_path)
    assert lines(tmp_path / "calls") == []


# -- where results go ----------------------------------------------------------------------------------------------


def test_a_name_lies_under_the_results_folder_and_a_path_where_it_says():
    def place(output_file):
        return results_path(BenchmarkConfig(results_dir="results", output_file=output_file))

    assert place("run.json") == Path("results/run.json")
    assert place("./run.json") == Path("run.json")
    assert place("here/run.json") == Path("here/run.json")
    assert place("/tmp/run.json") == Path("/tmp/run.json")
    assert place(None).parent == Path("results")
    assert place(None).suffix == ".json"


def test_a_file_in_the_working_directory_stays_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, events = sweep(["Identity"], tmp_path, output_file="./here.json")
    assert longctx.load("here.json") == rows
    assert events[0].path == "here.json"
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]


def test_nothing_is_written_where_nothing_is_to_be_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, events = sweep(["Identity"], tmp_path, save_results=False)
    assert statuses(rows) == {("Identity", 16): "ok"}
    assert events[0].path is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_sweep_and_keeps_what_was_saved(tmp_path, monkeypatch):
    write, writes = results_module.write_atomically, []

    def fill_up(path, text):
        writes.append(path)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(results_module, "write_atomically", fill_up)
    with pytest.raises(ResultsError, match="disk is full"):
        sweep(["Identity"], tmp_path, sequence_lengths=[8, 16, 24, 32])
    monkeypatch.undo()
    assert len(longctx.load(saved(tmp_path))) == 2
    rows, events = sweep(["Identity"], tmp_path, sequence_lengths=[8, 16, 24, 32], resume=True)
    assert len(rows) == 4
    assert len(of_kind(events, CellStarted)) == 2
