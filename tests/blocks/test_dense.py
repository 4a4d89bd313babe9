"""Dense against its reference: values, gradients, streams, steps, memory, cost."""

from __future__ import annotations

import pytest
import torch
from every_block import LargestTensor

from longctx import blocks
from longctx.blocks.dense import SPEC, reference
from longctx.config import BlockRequest, Cell
from longctx.errors import UsageError


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads only cost time on tensors this small."""
    torch.set_num_threads(1)


def build(*, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return blocks.build("dense", d_model=32, n_heads=4, dtype=dtype, **options).eval()


def sequence(length, *, dtype=torch.float64, batch=2):
    return torch.randn(batch, length, 32, dtype=dtype, generator=torch.Generator().manual_seed(length))


def gradients(block, x, y):
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, [x, *block.parameters()], upstream)


@pytest.mark.parametrize("length", [1, 2, 63, 65, 257])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_reference(length, num_kv_heads, causal):
    block = build(num_kv_heads=num_kv_heads, causal=causal)
    x = sequence(length).requires_grad_()
    expected, _ = reference(block, x)
    y, _ = block(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    for a, b in zip(gradients(block, x, y), gradients(block, x, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(block(x, keep_state=False)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_within_the_tolerance(dtype):
    block = build(dtype=dtype, num_kv_heads=2)
    x = sequence(257, dtype=dtype)
    with torch.no_grad():
        y, _ = block(x)
        exact = build(num_kv_heads=2)
        exact.load_state_dict(block.state_dict())
        expected, _ = reference(exact, x.double())
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert (y.double() - expected).norm() < SPEC.tolerances[name] * expected.norm()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pieces", [[1, 1, 1, 60, 1, 30], [50, 44], [93, 1]])
def test_any_split_equals_one_call(grad, pieces):
    block, length = build(num_kv_heads=2), sum(pieces)
    x = sequence(length).requires_grad_(grad)
    whole, _ = block(x)
    state, outputs = None, []
    with torch.set_grad_enabled(grad):
        for piece in x.split(pieces, dim=1):
            y, state = block(piece, state)
            outputs.append(y)
    y = torch.cat(outputs, dim=1)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-9)
    if grad:
        for a, b in zip(gradients(block, x, y), gradients(block, x, whole), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@torch.no_grad()
def test_steps_equal_forward_and_seldom_move_the_cache():
    block, x = build(num_kv_heads=2), sequence(100)
    whole, _ = block(x)
    state, buffers = block.init_state(2), set()
    for t in range(100):
        y, state = block.step(x[:, t : t + 1], state)
        torch.testing.assert_close(y, whole[:, t : t + 1], rtol=0, atol=1e-9)
        buffers.add(state.cache.buffer.data_ptr())
    assert len(buffers) <= 8


@torch.no_grad()
def test_forward_leaves_the_state_it_is_given():
    block, x = build(), sequence(40)
    _, state = block(x[:, :20])
    first, _ = block(x[:, 20:], state)
    second, _ = block(x[:, 20:], state)
    assert torch.equal(first, second)


def test_detach_cuts_the_graph():
    block, x = build(), sequence(20).requires_grad_()
    _, state = block(x[:, :10])
    y, _ = block(x[:, 10:], state.detach())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not gradient[:, :10].any()
    assert gradient[:, 10:].any()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_forms_all_scores(dropout, num_kv_heads, dtype):
    block = build(dropout=dropout, num_kv_heads=num_kv_heads, dtype=dtype).train()
    x = sequence(3000, dtype=dtype, batch=1)
    with LargestTensor() as largest:
        y, state = block(x)
        y.float().sum().backward()
        block(x[:, :700], state.detach())
    assert largest.elements < 3000 * 3000 / 2


def test_dropout_acts_in_training_alone():
    block, x = build(dropout=0.3), sequence(30)
    assert torch.equal(block(x)[0], block(x)[0])
    block.train()
    assert not torch.equal(block(x)[0], block(x)[0])


def test_no_state_without_causality():
    block, x = build(causal=False), sequence(8)
    assert block(x)[1] is None
    for call in (lambda: block.init_state(1), lambda: block.step(x[:, :1], None)):
        with pytest.raises(UsageError, match="causal=False"):
            call()


@pytest.mark.parametrize("length", [1, 7, 64])
def test_cost_counts_the_pairs_that_the_mask_shows(length):
    options = SPEC.check_options({})
    cell = Cell(block=BlockRequest(target="Dense"), length=length, d_model=32, n_heads=4, num_kv_heads=2)
    pairs = torch.ones(length, length).tril().sum().item()
    weights = 32 * (32 + 2 * 2 * 8) + 9 * 32 * 32
    assert SPEC.cost(cell, options).flops == 2 * weights * length + 4 * 32 * pairs
    assert SPEC.cost(cell, options).state_bytes == length * 2 * 2 * 8 * 4
