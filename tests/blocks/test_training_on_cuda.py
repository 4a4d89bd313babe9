"""Training of the blocks whose attention is in Triton kernels, on a GPU: gradients, autocast, compilation."""

from __future__ import annotations

import copy

import pytest
import torch

from longctx import blocks

NAMES = ["DPASSM", "Longformer", "BigBird"]
pytestmark = pytest.mark.cuda


def make(name, **options):
    """A small block in fp32 with two key-value heads of width 32."""
    torch.manual_seed(0)
    return blocks.build(name, d_model=128, n_heads=4, num_kv_heads=2, device="cuda", dtype=torch.float32, **options)


def gradients(call, block, x, upstream):
    """(y, gradients of the input and of every parameter) in fp64."""
    x = x.detach().to(block.attn_norm.weight.dtype).requires_grad_()
    y = call(x, keep_state=False)[0]
    inputs = [x, *block.parameters()]
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype)))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["bf16", "autocast", "autocast, checkpointed"])
def test_a_training_step_is_that_of_the_reference_in_fp64(name, how):
    block = make(name)
    x, upstream = torch.randn(2, 2, 700, 128, device="cuda").unbind()
    if how == "bf16":
        block = block.bfloat16()
        x = x.bfloat16()
    exact = copy.deepcopy(block).double()
    with torch.inference_mode():  # what it leaves behind must not stand in the way of autograd
        block(x[:, :300])

    def call(x, *, keep_state):
        if "checkpointed" in how:
            return torch.utils.checkpoint.checkpoint(block, x, keep_state=keep_state, use_reentrant=False)
        return block(x, keep_state=keep_state)

    with torch.autocast("cuda", dtype=torch.bfloat16, enabled="autocast" in how):
        found = gradients(call, block, x, upstream)
    wanted = gradients(exact, exact, x, upstream)
    assert "Triton" in block.path or how != "bf16"
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 6e-2 * theirs.norm() + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_block_trains_without_a_graph_break(name):
    block = make(name).bfloat16()
    x, upstream = torch.randn(2, 1, 512, 128, device="cuda", dtype=torch.bfloat16).unbind()
    eager = gradients(block, block, x, upstream)
    compiled = gradients(torch.compile(block, fullgraph=True), block, x, upstream)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_follows_the_seed_of_torch(name):
    block = make(name, dropout=0.2).bfloat16()
    x, upstream = torch.randn(2, 1, 500, 128, device="cuda", dtype=torch.bfloat16).unbind()
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        steps.append(gradients(block, block, x, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*steps[:2], strict=True))
    assert not torch.equal(steps[0][0], steps[2][0])
