"""Two hundred steps of every block against the same steps of its reference implementation, from the same seed."""

from __future__ import annotations

import statistics

import pytest
import torch

from longctx import blocks
from longctx.training import LongContextLM
from longctx.training.data import SyntheticText

OPTIONS = {"chunk_size": 16, "window_size": 16, "block_size": 16, "num_random_blocks": 1}
STEPS, TOKENS, BATCH = 200, 40, 3


def losses(name: str, device: str, dtype: torch.dtype, *, reference: bool) -> list[float]:
    """Loss of every step, nats a token."""
    torch.manual_seed(3)
    shape = {"vocab_size": 64, "d_model": 64, "n_heads": 4, "n_layers": 1, "block_options": OPTIONS}
    lm = LongContextLM([name], **shape, learning_rate=3e-3).to(device=device, dtype=dtype)
    if reference:
        for block in lm.blocks:
            block.forward = lambda x, *rest, block=block, **more: blocks.load(name).reference(block, x)
    text = SyntheticText(vocab_size=64, sequence_length=TOKENS, count=64, seed=0)
    batches = torch.stack([text[index] for index in range(63)]).to(device).view(-1, BATCH, TOKENS + 1)
    optimizer = lm.configure_optimizers()
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = lm.loss(batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).float().tolist()


def assert_same_fall(ours: list[float], theirs: list[float], *, within: float) -> None:
    for at in (slice(0, 20), slice(90, 110), slice(-20, None)):
        assert statistics.mean(ours[at]) == pytest.approx(statistics.mean(theirs[at]), rel=within), at
    assert statistics.mean(ours[-20:]) < 0.7 * ours[0]


@pytest.mark.parametrize("name", blocks.names())
def test_on_a_cpu(name):
    ours, theirs = (losses(name, "cpu", torch.float32, reference=reference) for reference in (False, True))
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-4)
    assert_same_fall(ours, theirs, within=0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("name", blocks.names())
def test_on_a_gpu(name):
    """In bf16 throughout, the reference in fp32."""
    ours = losses(name, "cuda", torch.bfloat16, reference=False)
    theirs = losses(name, "cuda", torch.float32, reference=True)
    assert_same_fall(ours, theirs, within=0.1)
