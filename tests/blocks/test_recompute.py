"""recompute="block": the same numbers from the input alone, for every block there is."""

from __future__ import annotations

import pytest
import torch
from every_block import NAMES, OTHER, SMALL, WITH_CAUSAL, every_block, gradients, make, tokens

from longctx.blocks import _recompute
from longctx.blocks._states import tensors_of
from longctx.config import parse_blocks
from longctx.errors import LongctxError

IN_SLABS = [name for name in NAMES if name not in ("Dense", "BigBird")]


@pytest.fixture(autouse=True)
def short_slabs(monkeypatch):
    monkeypatch.setattr(_recompute, "CPU_LEAST", 21)


def pair(name, options=SMALL, **more):
    """The same block twice, without and with recomputation."""
    one, two = make(name, options, **more), make(name, options, recompute="block", **more)
    two.load_state_dict(one.state_dict())
    return one, two


def assert_same(got, want, tolerance=1e-9):
    scale = max(grad.norm() for grad in want.values())
    for key in want:
        assert (got[key] - want[key]).norm() <= tolerance * max(want[key].norm(), 1e-3 * scale), key


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize(("batch", "length"), [(1, 130), (2, 63), (1, 1)])
def test_gradients_are_the_same(name, options, batch, length):
    kept, recomputed = pair(name, options, num_kv_heads=2)
    x = tokens(length, batch=batch).requires_grad_()
    weights = torch.randn_like(x)
    want, _ = kept(x)
    y, state = recomputed(x, keep_state=False)
    assert state is None
    assert torch.allclose(y, want, rtol=1e-10, atol=1e-12)
    assert_same(gradients(recomputed, x, y, weights), gradients(kept, x, want, weights))


@pytest.mark.parametrize("name", WITH_CAUSAL)
def test_without_causality(name):
    kept, recomputed = pair(name, causal=False)
    x = tokens(63).requires_grad_()
    weights = torch.randn_like(x)
    assert_same(gradients(recomputed, x, recomputed(x)[0], weights), gradients(kept, x, kept(x)[0], weights))


@every_block
def test_a_stream_goes_on_and_gradients_flow_through_its_state(name):
    kept, recomputed = pair(name, OTHER)
    x = tokens(107).requires_grad_()
    weights = torch.randn_like(x)
    want = gradients(kept, x, kept(x)[0], weights)
    pieces, state = [], None
    for piece in x.split([50, 1, 56], dim=1):
        y, state = recomputed(piece, state)
        pieces.append(y)
    assert_same(gradients(recomputed, x, torch.cat(pieces, 1), weights), want)
    with torch.no_grad():
        _, state = recomputed(x[:, :50])
    y, _ = recomputed(x[:, 50:], state)
    assert torch.allclose(y, kept(x)[0][:, 50:], rtol=1e-9, atol=1e-11)
    y.sum().backward()


@every_block
def test_dropout_draws_the_same_mask_again(name):
    _, block = pair(name, dropout=0.3)
    x = tokens(70).requires_grad_()
    direction = torch.randn_like(x)
    weights = torch.randn_like(x)

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(5)
        return (block(x + step * direction)[0] * weights).sum()

    (grad,) = torch.autograd.grad(loss(0.0), x)
    # The loss under one mask, and so its slope: another mask in backward would give another one.
    with torch.no_grad():
        along = (grad * direction).sum()
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(slope - along) < 1e-4 * abs(slope)


@every_block
def test_backward_leaves_the_random_state_alone(name):
    _, block = pair(name, dropout=0.3)
    y, _ = block(tokens(70))
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@every_block
def test_only_the_input_waits_for_backward(name):
    _, block = pair(name, dtype=torch.float32)
    x = tokens(256, batch=1, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y, _ = block(x, keep_state=False)
        node = y.grad_fn
    waiting, *parameters = node.saved_tensors
    assert waiting.shape == x.shape
    assert {p.data_ptr() for p in parameters} == {p.data_ptr() for p in block.parameters()}
    carried = sum(t.numel() for start in node.call.starts for t in tensors_of(start))
    slabs = len(node.call.slabs)
    assert slabs == (8 if name in IN_SLABS else 1)
    assert carried <= slabs * 16 * 2 * 32 * 2


@every_block
def test_backward_is_of_the_weights_and_the_mode_of_its_forward(name):
    _, block = pair(name, dropout=0.2)
    _, as_given = pair(name, dropout=0.2)
    x = tokens(40).requires_grad_()
    others = {key: (1.1 * p.detach()).requires_grad_() for key, p in block.named_parameters()}
    as_given.load_state_dict(others)
    torch.manual_seed(0)
    y, _ = as_given(x)
    wanted = torch.autograd.grad(y.square().sum(), [x, *as_given.parameters()], allow_unused=True)
    torch.manual_seed(0)
    y, _ = torch.func.functional_call(block, others, (x,))
    block.eval()
    found = torch.autograd.grad(y.square().sum(), [x, *others.values()], allow_unused=True)
    assert not block.training
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    y, _ = block(x)
    with torch.no_grad():
        block.out_proj.weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_block
def test_autocast_and_half_precision(name):
    for dtype in (torch.float32, torch.bfloat16):
        kept, recomputed = pair(name, dtype=dtype)
        x = tokens(63, dtype=dtype).requires_grad_()
        found = []
        for block in (kept, recomputed):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                y, _ = block(x)
            assert y.dtype == dtype
            found.append(gradients(block, x, y, torch.ones_like(x)))
        assert_same(found[1], found[0], 5e-2)


@every_block
def test_frozen_parameters_and_inputs(name):
    kept, recomputed = pair(name)
    x, weights = tokens(63), torch.randn(2, 63, 32, dtype=torch.float64)
    found = []
    for block in (kept, recomputed):
        block.qkv_proj.weight.requires_grad_(False)
        (block(x)[0] * weights).sum().backward()
        assert block.qkv_proj.weight.grad is None
        found.append({key: p.grad for key, p in block.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert_same(found[1], found[0])


@every_block
def test_the_path_says_so(name):
    kept, recomputed = pair(name)
    assert "recompute" not in kept.path
    assert recomputed.path == f"{kept.path}, recompute=block"


def test_the_command_line_can_say_it():
    for word in ("norms", "block"):
        (request,) = parse_blocks([f"Identity:recompute={word}"])
        assert make("Identity", dict(request.options)).recompute == word


def test_another_word_is_refused():
    for word in ("all", "", None, True):
        with pytest.raises(LongctxError, match="recompute must be one of norms, block"):
            make("Identity", recompute=word)


@pytest.mark.cuda
@every_block
def test_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(_recompute, "GPU_LEAST", 150)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    kept, recomputed = pair(name, d_model=64, dropout=0.2, **shape)
    x = tokens(700, batch=1, d_model=64, **shape).requires_grad_()
    for block in (kept, recomputed):
        block.eval()
    weights = torch.randn_like(x)
    want = gradients(kept, x, kept(x)[0], weights)
    assert_same(gradients(recomputed, x, recomputed(x)[0], weights), want, 5e-2)
    recomputed.train()
    y, _ = recomputed(x)
    before = torch.cuda.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.cuda.get_rng_state(), before)
