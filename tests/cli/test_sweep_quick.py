"""What sweep and quick ask of the engine, what they print, and the code they end in. The engine is a stand-in."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from rich.console import Console

from longctx.cli._show import tail
from longctx.config import BenchmarkConfig, parse_blocks
from longctx.events import SweepFinished, SweepStarted
from longctx.results import BenchmarkResult
from longctx.terminal.live import SweepView


def test_published_defaults_reach_the_engine(call, fake) -> None:
    assert call("sweep").exit_code == 0
    blocks, config, command = fake.calls[0]
    assert blocks is None
    assert config.sequence_lengths == [1024, 2048, 4096, 8192]
    assert (config.d_model, config.n_heads, config.batch_size, config.warmup_runs) == (512, 8, 1, 3)
    assert (config.rounds, config.exact_runs, config.save_results) == (3, False, True)
    assert command == "longctx sweep"


def test_options_reach_the_engine_and_the_command_reproduces_them(call, fake) -> None:
    words = "sweep --blocks BLADE,DPASSM BLADE:chunk_size=64 --sequence-lengths 1K,2K 4096 --dtype fp32"
    words += " --num-kv-heads 2 --benchmark-runs 10 --rounds 2 --timeout 9.5 --no-memory-profile --no-cudnn-benchmark"
    words += " --cudnn-deterministic --threads 2 --seed 7 --mode train --max-time 60"
    assert call(*words.split()).exit_code == 0
    blocks, config, command = fake.calls[0]
    assert blocks == ["BLADE", "DPASSM", "BLADE:chunk_size=64"]
    assert config.sequence_lengths == [1024, 2048, 4096]
    assert config.exact_runs
    assert not config.profile_memory
    assert call(*shlex.split(command)[1:]).exit_code == 0
    again = fake.calls[1]
    assert again == fake.calls[0]


def test_comprehensive_is_sweep(call, fake) -> None:
    assert call("comprehensive", "--sequence-lengths", "1K").exit_code == 0
    assert fake.calls[0][1].sequence_lengths == [1024]


def test_a_sweep_prints_table_plot_ranking_path_and_command(call, fake) -> None:
    result = call("sweep", "--sequence-lengths", "1K", "2K")
    out = result.stdout
    assert "A processor" in out
    assert "vs Dense" in out
    assert "Forward time" in out
    assert "1K  Identity 0.25x, BLADE 0.50x, Dense 1.00x" in out
    assert "results:   reports/benchmark/run.json" in out
    assert "reproduce: longctx sweep --sequence-lengths 1024 2048" in out
    assert "[6/6] BLADE 2K  4.10 ms" in result.stderr
    assert "\x1b" not in out + result.stderr


def test_a_sweep_that_ended_early_says_where_it_is_saved_only_if_it_is() -> None:
    cells = tuple(BenchmarkConfig(sequence_lengths=[1024, 2048]).cells(parse_blocks(["Dense"]), dtype="fp32"))

    def told(*results):
        console = Console(file=io.StringIO(), width=100)
        view = SweepView(console)
        view.update(SweepStarted(cells=cells, rounds=1, environment={}, path="out/run.json"))
        view.update(SweepFinished(results=results, complete=False, reason="--max-time of 4 s is over"))
        tail(console, view, "longctx sweep --max-time 4")
        return console.file.getvalue()

    some, none = told(BenchmarkResult(block_name="Dense", sequence_length=1024)), told()
    assert "--max-time of 4 s is over, 1 of 2 cells not measured" in some
    assert (
        "longctx sweep --max-time 4 --output-file out/run.json --resume" in some and "results:   out/run.json" in some
    )
    assert "2 of 2 cells not measured" in none and "run.json" not in none


def test_quiet_leaves_only_the_result(call, fake) -> None:
    result = call("sweep", "--quiet", "--sequence-lengths", "1K")
    assert "vs Dense" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["sweep", "quick"])
def test_json_is_one_document_of_records(call, fake, command: str) -> None:
    fake.status = lambda cell: "oom" if cell.block.name == "Dense" else "ok"
    result = call(command, "--json")
    records = json.loads(result.stdout)
    assert {record["status"] for record in records} == {"ok", "oom"}
    assert list(records[0])[:2] == ["block_name", "sequence_length"]
    dense = next(record for record in records if record["block_name"] == "Dense")
    assert dense["forward_time_mean"] is None


@pytest.mark.parametrize(
    ("bad", "words", "code"),
    [
        ({}, [], 0),
        ({"Dense": "oom"}, [], 0),
        ({"Dense": "oom"}, ["--strict"], 3),
        ({"Dense": "oom", "Identity": "crashed", "BLADE": "timeout"}, [], 3),
        ({"BLADE": "wrong"}, [], 6),
        ({"BLADE": "impossible"}, ["--strict"], 6),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "quick"])
def test_exit_codes(call, fake, command: str, bad: dict[str, str], words: list[str], code: int) -> None:
    fake.status = lambda cell: bad.get(cell.block.name, "ok")
    result = call(command, *words)
    assert result.exit_code == code
    for name, status in bad.items():
        assert f"{status}: {name} at" in result.stdout


def test_quick_ranks_says_what_it_means_and_what_next(call, fake) -> None:
    fake.path = None
    result = call("quick", "--seq-len", "4K", "--runs", "7")
    config = fake.calls[0][1]
    assert (config.rounds, config.benchmark_runs, config.exact_runs, config.save_results) == (1, 7, True, False)
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert lines.index("Identity") < lines.index("BLADE") < lines.index("Dense")
    assert "vs Identity" in result.stdout
    assert "At 4,096 tokens BLADE is the fastest mixing block, 2.00x faster than Dense." in result.stdout
    assert "next: longctx sweep" in result.stdout


def test_a_command_that_needs_more_than_a_line_has_one_of_its_own(call, fake) -> None:
    out = call("quick", "--blocks", "Dense", "BLADE:chunk_size=1024", COLUMNS="50").stdout
    assert "next, how it scales with length:\n  longctx sweep --blocks Dense BLADE:chunk_size=1024\n" in out


def test_quick_saves_when_asked(call, fake) -> None:
    result = call("quick", "--output-file", "here.json")
    assert fake.calls[0][1].save_results
    assert "results: reports/benchmark/run.json" in result.stdout


@pytest.mark.parametrize("width", ["50", "80", "120"])
@pytest.mark.parametrize("command", ["sweep", "quick"])
def test_no_table_line_is_wider_than_the_screen(call, fake, command: str, width: str) -> None:
    words = ["--blocks", "Dense", "BLADE:chunk_size=1024", "some_package.blocks:AVeryLongNameOfABlockOfMyOwn"]
    result = call(command, *words, COLUMNS=width)
    free = ("results:", "reproduce:", "next:", "  longctx ")
    too_wide = [x for x in result.stdout.splitlines() if len(x) > int(width) and not x.startswith(free)]
    assert too_wide == []
    assert "…" not in "".join(word for word in result.stdout.split() if word[0].isdigit())


@pytest.mark.parametrize("command", ["sweep", "quick"])
def test_several_modes_and_shapes_reach_the_engine_and_the_command(call, fake, command: str) -> None:
    words = (
        "--mode forward,train decode --batch-size 1 4 --dtype fp32 --d-model 64 --n-heads 4 8 --blocks BLADE --layers 2"
    )
    assert call(command, *words.split()).exit_code == 0
    _, config, line = fake.calls[0]
    assert fake.vary == {"batch_size": [1, 4], "n_heads": [4, 8], "mode": ["forward", "train", "decode"]}
    assert (config.mode, config.batch_size, config.n_heads, config.dtype, config.d_model) == (
        "forward",
        1,
        4,
        "fp32",
        64,
    )
    assert config.layers == 2
    seen = fake.vary
    assert call(*shlex.split(line)[1:]).exit_code == 0
    assert (fake.calls[1], fake.vary) == (fake.calls[0], seen)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "trian"], "Did you mean 'train'?"),
        (["--dtype", "bf61"], "Did you mean 'bf16'?"),
        (["--batch-size", "1", "many"], "whole numbers, not 'many'"),
        (["--d-model", "-64"], "--d-model"),
        (["--d-model", "512", "--n-heads", "8", "7"], "not divisible by n_heads 7"),
    ],
)
def test_values_that_cannot_be_are_refused(call, fake, words: list[str], said: str) -> None:
    result = call("sweep", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_each_mode_has_its_table_its_plot_and_its_conclusion(call, fake) -> None:
    result = call("sweep", "--mode", "forward", "train", "--sequence-lengths", "1K", "2K", "--batch-size", "1", "4")
    out = result.stdout
    assert (
        out.index("forward: no state kept") < out.index("train: forward, loss and backward") < out.index("Forward time")
    )
    assert "Train time" in out
    assert "Forward: At 2,048 tokens, batch 1, BLADE" in out
    assert "Train: At 2,048 tokens, batch 1, BLADE" in out
    header = next(line for line in out.splitlines() if line.startswith("tokens"))
    assert header.split()[:3] == ["tokens", "batch", "block"]
    assert "BLADE 2K  train, batch 4" in result.stderr
    one = call("sweep", "--sequence-lengths", "1K", "--batch-size", "1", "4").stdout
    assert "1,024 tokens" in one and "tokens  batch" not in one


def test_quick_says_what_a_sweep_would_say(call, fake) -> None:
    result = call("quick", "--mode", "forward", "decode")
    assert "Forward: At 2,048 tokens BLADE is the fastest mixing block, 2.00x faster than Dense." in result.stdout
    assert "Decode: After 2,048 tokens BLADE" in result.stdout
    assert "local slope" not in result.stdout
