"""What every block promises of training: gradients, through states too, and dropout."""

from __future__ import annotations

import functools

import pytest
import torch
from every_block import OTHER, SMALL, MadeTensors, every_block, gradients, make, relative, tokens
from torch.utils.checkpoint import checkpoint

from longctx import blocks


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("length", [1, 63])
def test_gradients_are_those_of_the_reference(name, options, length):
    block, x = make(name, options, num_kv_heads=2), tokens(length).requires_grad_()
    weights = torch.randn_like(x)
    want = gradients(block, x, blocks.load(name).reference(block, x)[0], weights)
    pieces, state = [], None
    for piece in x.split([1, *([20, 42] if length > 1 else [])], dim=1):
        y, state = block(piece, state)
        pieces.append(y)
    for y in (block(x)[0], torch.cat(pieces, 1)):
        got = gradients(block, x, y, weights)
        scale = max(grad.norm() for grad in want.values())
        for key in want:
            assert (got[key] - want[key]).norm() < 1e-7 * max(want[key].norm(), 1e-3 * scale), key


@every_block
def test_gradients_flow_through_a_state_until_it_is_detached(name):
    block = make(name)
    first, second = tokens(20).requires_grad_(), tokens(17)
    weights = torch.randn_like(second)

    def reach(y):
        (grad,) = torch.autograd.grad((y * weights).sum(), first, allow_unused=True)
        return torch.zeros_like(first) if grad is None else grad

    want = reach(block(torch.cat([first, second], 1))[0][:, 20:])
    _, state = block(first)
    y, _ = block(second, state)
    assert torch.allclose(reach(y), want, rtol=1e-7, atol=1e-9)
    _, state = block(first)
    cut, _ = block(second, state.detach())
    assert relative(cut, y) < 1e-12
    assert reach(cut).count_nonzero() == 0


@every_block
@pytest.mark.parametrize("recompute", ["norms", "block"])
def test_gradients_of_gradients_are_refused_whatever_they_are_asked_for(name, recompute):
    block, x = make(name, recompute=recompute), tokens(20).requires_grad_()
    for wanted in (x, block.attn_norm.weight, block.qkv_proj.weight, block.ffn_up.weight):
        (grad,) = torch.autograd.grad(block(x)[0].square().sum(), x, create_graph=True)
        # Autograd goes only where what is asked for lies behind, which no way around the refusal may lead to.
        with pytest.raises(RuntimeError, match=r"first order|not implemented"):
            torch.autograd.grad(grad.square().sum(), wanted, allow_unused=True)


@every_block
def test_forward_and_backward_are_the_same_twice(name):
    block, x = make(name, dtype=torch.float32), tokens(130, dtype=torch.float32).requires_grad_()
    weights = torch.randn_like(x)
    one, two = (gradients(block, x, block(x)[0], weights) for _ in range(2))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(block(x)[0], block(x)[0])


@every_block
@pytest.mark.parametrize("recompute", ["norms", "block"])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward-alone"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_nothing_is_held_when_a_step_is_over(name, recompute, backward, device):
    """A loss that is only looked at, say, or the pass that recompute="block" takes without a graph to keep."""
    shape = {"d_model": 64, "device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    # Blocks of keys that the kernel of BigBird takes.
    block = make(name, {**SMALL, "block_size": 16}, recompute=recompute, **shape).train()

    def step():
        x = tokens(130, **shape).requires_grad_()
        y, _ = block(x, keep_state=False)
        if backward:
            torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)

    # What a block keeps for good, it keeps from the first time on.
    step()
    with MadeTensors() as made:
        step()
    assert made.alive() == []


@every_block
def test_checkpointing_keeps_the_input_alone(name):
    block = make(name, dtype=torch.float32).train()
    x = tokens(256, dtype=torch.float32).requires_grad_()
    call = functools.partial(checkpoint, block, x, keep_state=False, use_reentrant=False)
    weights = torch.randn(x.shape)
    wanted = gradients(block, x, block(x, keep_state=False)[0], weights)
    call()
    with MadeTensors() as made:
        y, _ = call()
    # The result itself.
    assert len(made.alive(least=1)) == 1
    for key, grad in gradients(block, x, y, weights).items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-3, atol=1e-4)


@every_block
def test_a_stream_may_go_on_before_the_backward_of_its_beginning(name):
    block, x, further = make(name), tokens(37).requires_grad_(), tokens(5)
    weights = torch.randn_like(x)
    wanted = gradients(block, x, block(x)[0], weights)
    y, state = block(x)
    with torch.no_grad():
        _, state = block(further, state.detach())
        block.step(further[:, :1], state)
    for key, grad in gradients(block, x, y, weights).items():
        torch.testing.assert_close(grad, wanted[key])


@every_block
def test_training_compiles_as_one_graph(name):
    torch.compiler.reset()
    block = make(name, dtype=torch.float32).train()
    x, weights = (tokens(130, dtype=torch.float32) for _ in range(2))
    x.requires_grad_()
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        found.append(gradients(block, x, call(x, keep_state=False)[0], weights))
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-3, atol=1e-4)


# -- dropout -------------------------------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_dropout_acts_in_training_and_is_silent_in_eval(name, grad):
    plain, block, x = make(name), make(name, dropout=0.25), tokens(63)
    block.load_state_dict(plain.state_dict())
    with torch.set_grad_enabled(grad):
        want, _ = plain(x)
        one, two = block(x)[0], block(x)[0]
        assert one.isfinite().all() and not torch.allclose(one, two)
        torch.manual_seed(7)
        again = block(x)[0]
        torch.manual_seed(7)
        assert torch.equal(block(x)[0], again)
        block.eval()
        random_state = torch.get_rng_state()
        assert relative(block(x)[0], want) < 1e-12
        assert torch.equal(torch.get_rng_state(), random_state)
