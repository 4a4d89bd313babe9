"""Modules, data and loops that this package has not written: compiled, masked, manual, streamed, validated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from longctx.training import BenchmarkCallback, LightningBenchmarkRunner, LongContextLM, ThroughputCallback
from longctx.training.finding import find_blocks


class CausalSelfAttention(nn.Module):
    """As people write it: dropout, a mask that grows with the length, a map that is kept to be looked at."""

    def __init__(self, dim, heads=2, dropout=0.1):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        b, t, d = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        self.map = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return self.proj((self.drop(self.map) @ v).transpose(1, 2).reshape(b, t, d))


class Lines(IterableDataset):
    """A stream without a length, each item with a length of its own."""

    def __init__(self, lengths=(9, 5, 7, 9, 6, 8) * 3):
        self.lengths = lengths

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for length in self.lengths:
            yield torch.randint(11, (2, length), generator=generator)


def loader():
    return DataLoader(Lines(), batch_size=None)


def theirs(package, compiled=False):
    class Theirs(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.attn = CausalSelfAttention(16)
            if compiled == "around":
                self.attn = torch.compile(self.attn, backend="eager")
            elif compiled == "in place":
                self.attn.compile(backend="eager")
            self.head = nn.Linear(16, 11)

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(x + self.attn(x))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        def validation_step(self, batch, batch_idx):
            self.log("val", self.training_step(batch, batch_idx))

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    torch.manual_seed(2)
    return Theirs()


@pytest.mark.parametrize("compiled", [False, "around", "in place", "whole"])
def test_a_strangers_attention_trains_the_same_to_the_bit(package, make_trainer, config, compiled):
    config.sequence_lengths = [24, 33]
    ends, frames = [], []
    for benchmarked in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = theirs(package, compiled)
        given = torch.compile(model, backend="eager") if compiled == "whole" else model
        callback = BenchmarkCallback(config, 3)
        callbacks = [callback, ThroughputCallback(2)] if benchmarked else []
        torch.manual_seed(4)
        make_trainer(package, max_epochs=1, callbacks=callbacks).fit(given, loader())
        ends.append(({name: value.clone() for name, value in model.state_dict().items()}, torch.rand(3).tolist()))
        frames.append(dict(torch._dynamo.utils.counters["frames"]))
    torch._dynamo.reset()
    (weights, drawn), (weights_with, drawn_with) = ends
    assert drawn == drawn_with
    assert all(torch.equal(weights[name], weights_with[name]) for name in weights)
    assert frames[0] == frames[1], "the benchmark compiled something"
    assert bool(frames[0]) == bool(compiled)
    rows = callback.benchmark_results
    assert {(row.block_name, row.status) for row in rows} == {("attn", "ok")}, [row.error for row in rows]
    assert {row.path for row in rows} == ({"without torch.compile"} if compiled else {None})
    assert [row.training_step for row in rows[::2]] == [3, 6, 9, 12, 15, 18]


def test_a_compiled_block_of_ours_is_found_where_it_is():
    lm = LongContextLM("DPASSM", vocab_size=16, d_model=16, n_heads=2, n_layers=2)
    lm.blocks[1] = torch.compile(lm.blocks[1], backend="eager")
    first, second = find_blocks(lm)
    assert (first.path, first.compiled, second.path, second.compiled) == ("blocks.0", False, "blocks.1", True)
    assert first.spec is second.spec is not None
    assert second.options["window_size"] == 256
    (whole,) = find_blocks(torch.compile(LongContextLM("DPASSM", vocab_size=16, d_model=16, n_heads=2, n_layers=1)))
    assert (whole.path, whole.compiled) == ("blocks.0", True)


def test_the_runner_measures_a_compiled_block_compiled(config):
    torch._dynamo.utils.counters.clear()
    lm = LongContextLM("Identity", vocab_size=16, d_model=16, n_heads=2, n_layers=1)
    lm.blocks[0] = torch.compile(lm.blocks[0], backend="eager")
    rows = LightningBenchmarkRunner(config).benchmark_lightning_model(lm, "lm")
    assert [(row.block_name, row.status) for row in rows] == [("lm.blocks.0", "ok"), ("lm", "ok")]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()


def test_validation_test_and_predict_measure_nothing(package, make_trainer, config):
    model, callback, throughput = theirs(package), BenchmarkCallback(config, 1), ThroughputCallback(1)
    trainer = make_trainer(package, callbacks=[callback, throughput], num_sanity_val_steps=2)
    trainer.validate(model, loader(), verbose=False)
    trainer.test(model, loader(), verbose=False)
    assert len(trainer.predict(model, loader())) == 18
    assert callback.benchmark_results == throughput.history == []
    assert callback.results_path is None
    trainer = make_trainer(package, callbacks=[callback, throughput], max_steps=4, val_check_interval=2)
    trainer.fit(model, loader(), loader())
    assert [row.training_step for row in callback.benchmark_results] == [1, 2, 3, 4]
    assert [window.step for window in throughput.history] == [1, 2, 3, 4]


def test_a_block_that_needs_a_mask_says_so(package, make_trainer, config):
    class Masked(CausalSelfAttention):
        def forward(self, x, attention_mask, *, rotary, scale=1.0):
            return super().forward(x)

    model = theirs(package)
    model.attn, plain = Masked(16), model.attn
    model.forward = lambda tokens: model.head(plain.to(model.device)(model.embed(tokens)))
    callback = BenchmarkCallback(config, 9)
    make_trainer(package, max_epochs=1, callbacks=[callback]).fit(model, loader())
    assert [row.status for row in callback.benchmark_results] == ["unsupported"] * 2
    assert "attention_mask, rotary" in callback.benchmark_results[0].error["message"]
