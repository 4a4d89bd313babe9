"""Options from a TOML file: read as if they were typed first, and refused where nobody could type them."""

from __future__ import annotations

import pytest

FILE = """
blocks = ["BLADE:chunk_size=64,128", "path/to/mine.py:Mine"]
sequence_lengths = ["1K", 2048]
batch-size = [1, 4]
mode = "train"
rounds = 2
timeout = 9.5
no-memory-profile = true
quiet = true
cudnn-benchmark = false
torch_benchmark = true
seed = -3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bench.toml"
    path.write_text(FILE)
    return path


def test_a_file_is_as_good_as_words(call, fake, file):
    assert call("sweep", "--config", str(file)).exit_code == 0
    blocks, config, command = fake.calls[0]
    assert blocks == ["BLADE:chunk_size=64", "BLADE:chunk_size=128", "path/to/mine.py:Mine"]
    assert config.sequence_lengths == [1024, 2048]
    assert (config.mode, config.rounds, config.timeout, config.seed) == ("train", 2, 9.5, -3)
    assert (config.profile_memory, config.verbose) == (False, False)
    assert (config.cudnn_benchmark, config.torch_benchmark) == (False, True)
    assert fake.vary == {"batch_size": [1, 4]}
    assert "--config" not in command and "--batch-size 1 4" in command


def test_the_command_line_wins_whole(call, fake, file):
    words = ["--blocks", "Dense", "--batch-size", "2", "--cudnn-benchmark", "--mode=forward", "--no-torch-benchmark"]
    assert call("sweep", *words, f"--config={file}").exit_code == 0
    blocks, config, _ = fake.calls[0]
    assert (blocks, config.batch_size, fake.vary) == (["Dense"], 2, {})
    assert (config.mode, config.cudnn_benchmark, config.torch_benchmark) == ("forward", True, False)
    assert config.sequence_lengths == [1024, 2048]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bathc-size = 1", "Did you mean 'batch-size'?"),
        ('against = "../other"', "--against cannot come from"),
        ('config = "other.toml"', "cannot come from"),
        ("help = true", "cannot come from"),
        ('quiet = "yes"', "true or false"),
        ("rounds = [1, 2]", "takes one value"),
        ("rounds = true", "cannot be True"),
        ("seed = 2020-01-01", "cannot be"),
        ("[sweep]\nrounds = 2", "no option"),
        ("rounds = ", "no TOML"),
        ('mode = "trian"', "Did you mean 'train'?"),
        ("batch-size = [1.5]", "whole numbers"),
    ],
)
def test_what_cannot_be_is_refused(call, fake, tmp_path, text, said):
    path = tmp_path / "bench.toml"
    path.write_text(text)
    result = call("sweep", "--config", str(path))
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")
    assert fake.calls == []


def test_a_file_that_is_not_there_is_refused(call, fake, tmp_path):
    result = call("sweep", "--config", str(tmp_path / "none.toml"))
    assert (result.exit_code, fake.calls) == (2, [])
    assert "cannot read" in result.stderr
    assert call("sweep", "--config").exit_code == 2


def test_against_on_the_command_line_goes_with_a_file(call, monkeypatch, file):
    seen = []
    monkeypatch.setattr("longctx.cli._against.sweep_against", lambda names, other, *a, **k: seen.append(other) or 0)
    assert call("sweep", "--against", "Dense", "--config", str(file)).exit_code == 0
    assert seen == ["Dense"]
