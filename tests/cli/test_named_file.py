"""A results file by its bare name, wherever the sweep that was given that name has put it."""

import json

import pytest

from longctx.results import BenchmarkResult

HERE, SAVED = (
    BenchmarkResult(block_name=name, sequence_length=1024, forward_time_median=0.5) for name in ("Here", "Saved")
)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder that `--output-file NAME` writes to, with a run.json."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports" / "benchmark"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps([SAVED.to_json()]))
    return folder


@pytest.mark.parametrize("words", [["report", "run.json"], ["plot", "run.json"], ["compare", "run.json", "run.json"]])
def test_it_is_found_where_it_was_saved(saved, call, words):
    result = call(*words)
    assert result.exit_code == 0 and "Saved" in result.stdout


def test_a_file_here_and_a_file_with_a_folder_are_meant_as_they_are_named(saved, call):
    (saved.parents[1] / "run.json").write_text(json.dumps([HERE.to_json()]))
    assert "Here" in call("report", "run.json").stdout
    assert "Saved" in call("report", "reports/benchmark/run.json").stdout
    assert call("report", "./gone.json").exit_code == 2


def test_it_is_looked_for_under_another_results_dir(saved, call):
    (saved / "run.json").rename(saved.parent / "moved.json")
    assert call("report", "moved.json").exit_code == 2
    assert "Saved" in call("report", "moved.json", "--results-dir", str(saved.parent)).stdout
