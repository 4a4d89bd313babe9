"""Finding and measuring the blocks of any LightningModule, and the model whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from longctx.blocks import build
from longctx.errors import LongctxError
from longctx.training import LightningBenchmarkRunner, LongContextLM
from longctx.training.finding import find_blocks


class OwnAttention(nn.Module):
    """A stranger's mixer, which keeps a tensor of the graph as people do to plot it."""

    def __init__(self, dim):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        q, k, v = self.to_qkv(x).chunk(3, -1)
        self.last = torch.softmax(q @ k.transpose(-1, -2), -1)
        return self.last @ v


class Shuffler(OwnAttention):
    """One whose name says nothing."""


def third_party(package, **layers):
    class Theirs(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, x):
            return self.inner(x)

    return Theirs()


def test_blocks_and_the_model_whole(config):
    runner = LightningBenchmarkRunner(config)
    model = LongContextLM(["Identity", "BLADE"], vocab_size=32, d_model=16, n_heads=2, n_layers=4)
    rows = runner.benchmark_lightning_model(model, "lm")
    assert [(row.block_name, row.status) for row in rows] == [
        ("lm.blocks.0", "ok"),
        ("lm.blocks.1", "ok"),
        ("lm", "ok"),
    ], [row.error for row in rows]
    assert rows[0].training_step is None
    assert rows[0].flops > 0
    assert rows[0].throughput_tokens_per_sec > 0
    assert rows[0].allocated_memory_mb > 0
    assert model.training


@pytest.mark.parametrize("mode", ["train", "decode", "prefill"])
def test_other_modes(config, mode):
    config.mode = mode
    model = LongContextLM("DPASSM", vocab_size=32, d_model=16, n_heads=2)
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(model, "lm")
    assert [row.status for row in rows] == ["ok", "ok" if mode == "train" else "unsupported"]
    assert rows[0].mode == mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_strangers_attention_is_found_by_the_name_of_its_class():
    found = find_blocks(nn.Sequential(nn.Linear(4, 4), OwnAttention(4)))
    assert [block.path for block in found] == ["1"]


@pytest.mark.parametrize("name", ["attention_block", "attention", "block", "model", "attn", "my_blade_mixer"])
def test_a_strangers_attention_is_found_by_its_name(package, config, name):
    model = third_party(package, **{name: OwnAttention(16)})
    model(torch.ones(1, 3, 16))
    getattr(model, name)(torch.ones(1, 3, 16))
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(model, "theirs")
    assert rows[0].block_name == f"theirs.{name}"
    assert rows[0].status == "ok", rows[0].error
    assert rows[1].status == "unsupported"
    assert "input_generator" in rows[1].error["message"]
    assert getattr(model, name).calls == 1


def test_torch_attention_is_found_by_its_type(package, config):
    model = third_party(package, odd_name=nn.MultiheadAttention(16, 2, batch_first=True))
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(model, "m")
    assert (rows[0].block_name, rows[0].status) == ("m.odd_name", "ok"), rows[0].error
    assert rows[0].config["n_heads"] == 2


def test_an_input_generator_feeds_model_and_blocks(package, config):
    seen = []

    def generator(sequence_length, batch_size, d_model):
        seen.append((sequence_length, batch_size, d_model))
        return [torch.zeros(batch_size, sequence_length, d_model)]

    model = third_party(package, attention=OwnAttention(16))
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(model, "m", generator)
    assert [row.status for row in rows] == ["ok", "ok"], [row.error for row in rows]
    assert set(seen) == {(24, 1, 16)}


def test_an_example_of_one_size_is_one_row_of_that_size(package, config):
    model = third_party(package, attention=OwnAttention(16))
    model.example_input_array = torch.zeros(3, 10, 16)
    asked = dataclasses.replace(config, sequence_lengths=[24, 48])
    *blocks, whole = LightningBenchmarkRunner(asked).benchmark_lightning_model(model, "m")
    assert [row.sequence_length for row in blocks] == [24, 48]
    assert (whole.block_name, whole.status, whole.batch_size, whole.sequence_length) == ("m", "ok", 3, 10), whole.error
    assert whole.throughput_tokens_per_sec == pytest.approx(30 / whole.forward_time_mean)


def test_a_selector_says_what_a_block_is(package, config):
    model = third_party(package, strange=Shuffler(16))
    with pytest.raises(LongctxError, match="strange \\(Shuffler\\)"):
        LightningBenchmarkRunner(config).benchmark_lightning_model(model, "m")
    runner = LightningBenchmarkRunner(config)
    rows = runner.benchmark_lightning_model(model, "m", block_selector=lambda path, module: path == "strange")
    assert [row.block_name for row in rows] == ["m.strange", "m"]


def test_blocks_of_both_kinds_in_one_list_are_found_and_a_selector_is_heard():
    ours = build("Identity", d_model=16, n_heads=2)
    model = nn.ModuleDict({"blocks": nn.ModuleList([ours, nn.Dropout(), Shuffler(16)]), "head": nn.Linear(16, 16)})
    assert [block.path for block in find_blocks(model)] == ["blocks.0", "blocks.2"]
    assert [block.path for block in find_blocks(model, lambda path, module: path == "blocks.2")] == ["blocks.2"]


def test_each_distinct_shape_is_found_once_and_nothing_inside_a_block():
    layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3)])
    layers.append(nn.TransformerEncoderLayer(16, 2, 64))
    found = find_blocks(nn.ModuleDict({"layers": layers}))
    assert [(block.path, block.also) for block in found] == [
        ("layers.0", ["layers.1", "layers.2"]),
        ("layers.3", []),
    ]


def test_a_layer_that_knows_its_place_is_no_other_shape():
    layers = nn.ModuleList([OwnAttention(16) for _ in range(4)])
    for index, layer in enumerate(layers):
        layer.layer_idx = index
    layers[3].scale = 0.5
    found = find_blocks(nn.ModuleDict({"layers": layers}))
    assert [(block.path, block.also) for block in found] == [("layers.0", ["layers.1", "layers.2"]), ("layers.3", [])]


def test_a_parameter_without_elements_is_not_taken_for_a_part_of_one(package, config):
    block = OwnAttention(16)
    block.prompts = nn.Parameter(torch.zeros(0, 16))
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(third_party(package, attn=block), "m")
    assert (rows[0].block_name, rows[0].status) == ("m.attn", "ok"), rows[0].error


def test_a_block_that_fails_is_a_row(package, config):
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("not today")

    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(third_party(package, block=Broken()), "m")
    assert rows[0].status == "failed"
    assert "not today" in rows[0].error["message"]
