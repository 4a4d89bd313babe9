"""The language model: learns, streams, generates, checkpoints; the text it learns from."""

from __future__ import annotations

import lightning.pytorch as lightning
import pytest
import torch

from longctx import blocks
from longctx.errors import UsageError
from longctx.training import LongContextLM, SyntheticTextDataModule

OPTIONS = {"chunk_size": 8, "window_size": 8, "block_size": 4, "num_global_blocks": 1}


def model(pattern="Dense", **values):
    shape = {"vocab_size": 32, "d_model": 32, "n_heads": 2, "block_options": OPTIONS, "learning_rate": 1e-2}
    return LongContextLM(pattern, **shape | values)


def data(**values):
    return SyntheticTextDataModule(vocab_size=32, sequence_length=32, batch_size=4, **values)


@pytest.mark.parametrize("name", blocks.names())
def test_every_block_learns(name, make_trainer):
    lm = model(name)
    text, losses = data(train_sequences=400, val_sequences=8), []

    class Losses(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val_loss"].item())

    trainer = make_trainer(max_steps=200, callbacks=[Losses()], num_sanity_val_steps=0)
    trainer.validate(lm, text, verbose=False)
    trainer.fit(lm, text)
    assert trainer.global_step == 200
    before, half, end = losses
    assert half < before - 0.5
    # Identity knows the last token alone, and is as good as that can be by then.
    assert end < half + (0.05 if name == "Identity" else 0.0)


def test_a_pattern_is_repeated_down_the_stack():
    lm = model(["Dense", "BLADE:chunk_size=16"], n_layers=5)
    assert [type(block).__name__ for block in lm.blocks] == [f"{n}Block" for n in ("Dense", "BLADE") * 2 + ("Dense",)]
    assert lm.blocks[1].chunk_size == 16
    assert model(["Dense", "Dense", "BLADE"], n_layers=3).requests[1].target == "Dense"


@pytest.mark.parametrize("name", blocks.names())
def test_streams_and_generates_as_a_forward_does(name):
    lm = model([name, "DPASSM"]).eval()
    tokens = torch.randint(32, (2, 21))
    with torch.no_grad():
        whole = lm(tokens)
        pieces = torch.cat(list(lm.stream([tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]])), dim=1)
        begun, _ = lm(tokens[:, :4], lm.init_states(2))
        torch.testing.assert_close(begun, whole[:, :4])
        torch.testing.assert_close(pieces, whole)
        longer = tokens
        for _ in range(6):
            longer = torch.cat([longer, lm(longer)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(lm.generate(tokens, 6), longer)
    drawn = [lm.generate(tokens, 6, temperature=1.0, top_k=5, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (2, 27)


@pytest.mark.parametrize("name", ["BLADE", "DPASSM"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        lm = model(name, gradient_checkpointing=checkpointed)
        lm.loss(torch.arange(34).remainder(32).view(2, 17)).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_head_is_the_embedding_and_a_checkpoint_brings_all_back(package, make_trainer, tmp_path):
    lm = model(["BLADE", "Identity"])
    assert sum(p.shape == (32, 32) and n == "embedding.weight" for n, p in lm.named_parameters()) == 1
    assert not [name for name in lm.state_dict() if "head" in name]
    trainer = make_trainer(package, max_steps=1, precision="bf16-mixed")
    trainer.fit(lm, data(train_sequences=8, val_sequences=0))
    trainer.save_checkpoint(tmp_path / "lm.ckpt")
    again = LongContextLM.load_from_checkpoint(tmp_path / "lm.ckpt", weights_only=False)
    tokens = torch.randint(32, (1, 12))
    assert torch.equal(again.eval()(tokens), lm.eval()(tokens))


def test_a_block_of_the_users_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, d_model):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Linear(d_model, d_model)\n"
        "    def forward(self, x):\n"
        "        return x + self.inner(x)\n"
    )
    lm = model(f"{path}:Mine")
    assert not torch.equal(lm.blocks[0].inner.weight, lm.blocks[1].inner.weight)
    assert lm(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 32)
    assert lm.training_flops(1, 4) is None
    with pytest.raises(UsageError, match="state"):
        lm.generate(torch.zeros(1, 4, dtype=torch.long), 2)


def test_mistakes_are_told():
    with pytest.raises(UsageError, match="DPASSM"):
        model("DPASM")
    with pytest.raises(UsageError, match="later tokens"):
        model("Dense:causal=false")
    with pytest.raises(UsageError, match="windw_size"):
        model("DPASSM", block_options={"windw_size": 3})
    with pytest.raises(UsageError, match="n_layers"):
        model(n_layers=0)


def test_data_with_more_tokens_than_the_model_has_is_refused(make_trainer):
    with pytest.raises(UsageError, match="512 different tokens"):
        make_trainer(max_steps=1).fit(model("Dense"), SyntheticTextDataModule(vocab_size=512, sequence_length=16))


def test_text_is_the_same_every_time_and_another_with_another_seed():
    batches = [next(iter(data(seed=seed).train_dataloader())) for seed in (0, 0, 1)]
    assert batches[0].shape == (4, 33)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    one = data()
    assert not torch.equal(next(iter(one.train_dataloader())), next(iter(one.val_dataloader())))
