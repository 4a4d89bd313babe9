"""Block requests, lengths, and the configuration: what is understood, and what is refused in words."""

from __future__ import annotations

import traceback

import pytest

from longctx import BenchmarkConfig
from longctx.config import BlockRequest, Cell, parse_blocks, parse_length, variants
from longctx.errors import LongctxError, UsageError
from longctx.reproduce import command_line


@pytest.mark.parametrize(
    ("text", "target", "options", "name"),
    [
        ("BLADE", "BLADE", {}, "BLADE"),
        ("BLADE:chunk_size=1024", "BLADE", {"chunk_size": 1024}, "BLADE:chunk_size=1024"),
        (
            "Dense:causal=false,dropout=0.5",
            "Dense",
            {"causal": False, "dropout": 0.5},
            "Dense:causal=False,dropout=0.5",
        ),
        ("package.module:Name", "package.module:Name", {}, "Name"),
        ("path/to/file.py:Name:scale=x", "path/to/file.py:Name", {"scale": "x"}, "Name:scale=x"),
    ],
)
def test_block_requests_are_read_as_written(text, target, options, name):
    request = BlockRequest.parse(text)
    assert (request.target, dict(request.options), request.name) == (target, options, name)
    assert BlockRequest.parse(str(request)) == request


@pytest.mark.parametrize("text", ["", ":chunk_size=4", "BLADE:chunk size=4", "BLADE:chunk_size=", "BLADE:a=1,b"])
def test_unreadable_block_requests_are_refused(text):
    with pytest.raises(UsageError):
        BlockRequest.parse(text)


def test_a_comma_separates_blocks_only_without_a_colon():
    names = [str(request) for request in parse_blocks(["BLADE,DPASSM", "DPASSM:window_size=8,state_dim=4", "BLADE"])]
    assert names == ["BLADE", "DPASSM", "DPASSM:state_dim=4,window_size=8"]


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("64K", 65536), ("1m", 1048576), (17, 17)])
def test_lengths(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1.5K", "many", "99999999999", "", "1G"])
def test_impossible_lengths_are_refused(text):
    with pytest.raises(UsageError):
        parse_length(text)


def test_published_defaults():
    config = BenchmarkConfig()
    assert (config.d_model, config.n_heads, config.batch_size) == (512, 8, 1)
    assert config.sequence_lengths == [1024, 2048, 4096, 8192]
    assert (config.warmup_runs, config.benchmark_runs, config.device) == (3, 10, "auto")
    assert list(config.to_json())[:5] == [
        "d_model",
        "n_heads",
        "device",
        "torch_benchmark",
        "cudnn_benchmark",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 7},
        {"num_kv_heads": 3},
        {"d_model": 0},
        {"batch_size": -1},
        {"rounds": 0},
        {"sequence_lengths": []},
        {"sequence_lengths": [0]},
        {"sequence_lengths": [1 << 40]},
        {"dtype": "int8"},
        {"device": "tpu"},
        {"timeout": 0},
        {"max_time": -5},
        {"benchmark_runs": True},
        {"isolation": "container"},
    ],
)
def test_bad_configurations_are_refused(change):
    with pytest.raises(LongctxError) as caught:
        BenchmarkConfig(**change)
    assert caught.value.exit_code == 2


def test_runs_are_exact_when_asked_for():
    assert not BenchmarkConfig().exact_runs
    assert BenchmarkConfig(benchmark_runs=5).exact_runs
    assert BenchmarkConfig(fixed_runs=True).exact_runs
    assert not BenchmarkConfig(benchmark_runs=5, fixed_runs=False).exact_runs


def test_cells_go_up_in_length_and_survive_the_pipe():
    config = BenchmarkConfig(sequence_lengths=[2048, 1024])
    cells = list(config.cells(parse_blocks(["Dense", "BLADE:chunk_size=8"]), dtype="fp32"))
    assert [(cell.length, cell.block.name) for cell in cells] == [
        (1024, "Dense"),
        (1024, "BLADE:chunk_size=8"),
        (2048, "Dense"),
        (2048, "BLADE:chunk_size=8"),
    ]
    assert [Cell.from_json(cell.to_json()) for cell in cells] == cells


def test_keys_tell_apart_what_a_number_depends_on():
    cell = Cell(block=BlockRequest(target="BLADE"), length=64)
    identity = {"options": {"chunk_size": 512}, "source_hash": "a"}
    key = cell.key(identity=identity, device="cpu", threads=2)
    assert key == cell.key(identity=identity, threads=2, device="cpu")
    others = [
        cell.key(identity=identity, device="cpu", threads=4),
        cell.key(identity=identity | {"source_hash": "b"}, device="cpu", threads=2),
        cell.key(identity=identity | {"options": {"chunk_size": 64}}, device="cpu", threads=2),
        Cell(block=cell.block, length=128).key(identity=identity, device="cpu", threads=2),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("DPASSM:window_size=128,256,512", [f"DPASSM:window_size={n}" for n in (128, 256, 512)]),
        (
            "DPASSM:window_size=128,256,state_dim=32",
            ["DPASSM:state_dim=32,window_size=128", "DPASSM:state_dim=32,window_size=256"],
        ),
        ("A:b=1,2,c=3,4", ["A:b=1,c=3", "A:b=1,c=4", "A:b=2,c=3", "A:b=2,c=4"]),
        ("Dense:causal=true,false", ["Dense:causal=True", "Dense:causal=False"]),
        ("m.py:N:kind=x,y,x", ["N:kind=x", "N:kind=y"]),
    ],
)
def test_an_option_with_several_values_is_a_row_for_each(word, names):
    requests = parse_blocks([word])
    assert [request.name for request in requests] == names
    assert parse_blocks([str(request) for request in requests]) == requests


@pytest.mark.parametrize(
    "word", ["DPASSM:window_size=128,state_dim", "BLADE:chunk_size=8,DPASSM", "A:1,b=2", "A:b=1,b=2"]
)
def test_options_that_nobody_could_mean_are_refused(word):
    with pytest.raises(UsageError, match="cannot read"):
        parse_blocks([word])


def test_a_block_is_named_by_a_text():
    assert parse_blocks("BLADE") == parse_blocks(["BLADE"])

    class Mine:
        pass

    for blocks in ([Mine], Mine, [Mine()]):
        with pytest.raises(UsageError, match="named by a text") as caught:
            parse_blocks(blocks)
        assert "file.py:Mine" in caught.value.hint


def test_the_hint_of_an_error_stands_in_its_traceback():
    with pytest.raises(LongctxError) as caught:
        parse_length("4T")
    text = "".join(traceback.format_exception_only(caught.value))
    assert caught.value.hint in text and caught.value.hint not in str(caught.value)


def test_one_block_is_not_several():
    with pytest.raises(UsageError, match="several values"):
        BlockRequest.parse("BLADE:chunk_size=8,16")


def test_a_sweep_varies_what_it_is_told_and_all_of_it_together():
    config = BenchmarkConfig(sequence_lengths=[64])
    made = variants(config, {"batch_size": [1, 4, 4], "mode": ["forward", "train"]})
    assert [(each.mode, each.batch_size) for each in made] == [
        ("forward", 1),
        ("forward", 4),
        ("train", 1),
        ("train", 4),
    ]
    assert variants(config, None) == [config]
    for vary in ({"batchsize": [1]}, {"mode": []}, {"mode": ["backward"]}, {"n_heads": [8, 7]}):
        with pytest.raises(UsageError):
            variants(config, vary)


def test_the_command_names_all_values():
    vary = {"batch_size": [1, 4], "mode": ["forward", "train"], "dtype": ["fp32"]}
    config = BenchmarkConfig(dtype="fp32")
    line = command_line("sweep", config, ["BLADE"], defaults=BenchmarkConfig(), vary=vary)
    assert line == "longctx sweep --blocks BLADE --batch-size 1 4 --dtype fp32 --mode forward train"
