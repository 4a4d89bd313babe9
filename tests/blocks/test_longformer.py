"""Longformer against its reference and the published one: values, gradients, streams, steps, globals, cost."""

from __future__ import annotations

import random

import pytest
import torch
from every_block import LargestTensor

from longctx import blocks
from longctx.blocks.longformer import SPEC, reference, visible_pairs
from longctx.config import BlockRequest, Cell
from longctx.errors import UsageError

LENGTHS = (1, 2, 63, 64, 65, 257)
SHAPES = [
    {},
    {"window_size": 16, "num_global_tokens": 0},
    {"window_size": 16, "num_global_tokens": 5, "dilation": 3, "num_kv_heads": 2},
    {"window_size": 70, "num_kv_heads": 1},
    {"window_size": 2, "num_global_tokens": 70},
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads only cost time on tensors this small."""
    torch.set_num_threads(1)


def build(*, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return blocks.build("longformer", d_model=32, n_heads=4, dtype=dtype, **options).eval()


def sequence(length, *, dtype=torch.float64, batch=2):
    return torch.randn(batch, length, 32, dtype=dtype, generator=torch.Generator().manual_seed(length))


def assert_same_gradients(block, x, ours, expected):
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    inputs = [x, *block.parameters()]
    how = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(ours, inputs, upstream, **how)
    for a, b in zip(got, torch.autograd.grad(expected, inputs, upstream, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_reference(length, shape, causal):
    block = build(causal=causal, **shape)
    x = sequence(length).requires_grad_()
    expected, _ = reference(block, x)
    y, _ = block(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    assert_same_gradients(block, x, y, expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x, keep_state=False)[0], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_slabs_of_inference_equal_the_reference():
    block = build(window_size=100, num_global_tokens=3, num_kv_heads=2)
    x = sequence(2500, batch=1)
    torch.testing.assert_close(block(x)[0], reference(block, x)[0], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False])
def test_other_dtypes_stay_within_the_tolerance(dtype, causal):
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    options = {"window_size": 64, "num_global_tokens": 3, "num_kv_heads": 2, "causal": causal}
    block, exact = build(dtype=kind, **options), build(**options)
    exact.load_state_dict(block.state_dict())
    x = sequence(257, dtype=kind)
    expected, _ = reference(exact, x.double())
    assert (block(x)[0].double() - expected).norm() < SPEC.tolerances[dtype] * expected.norm()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_split_equals_one_call(grad, shape):
    block = build(**shape)
    x = sequence(200).requires_grad_(grad)
    for seed in range(3):
        whole, _ = reference(block, x)
        sizes, draw = [], random.Random(seed)
        while sum(sizes) < 200:
            sizes.append(min(draw.choice([1, 1, 2, 3, 30, 77]), 200 - sum(sizes)))
        state, outputs = None, []
        with torch.set_grad_enabled(grad):
            for piece in x.split(sizes, dim=1):
                y, state = block(piece, state)
                outputs.append(y)
        y = torch.cat(outputs, dim=1)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-9)
        if grad:
            assert_same_gradients(block, x, y, whole)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefill", [0, 1, 50])
def test_steps_equal_the_reference(shape, prefill):
    block, x = build(**shape), sequence(150)
    whole, _ = reference(block, x)
    state = block(x[:, :prefill])[1] if prefill else block.init_state(2)
    for t in range(prefill, 150):
        y, state = block.step(x[:, t : t + 1], state)
        torch.testing.assert_close(y, whole[:, t : t + 1], rtol=0, atol=1e-9)
    assert state.seen == 150


@torch.no_grad()
def test_steps_seldom_move_the_window():
    block, x = build(window_size=32), sequence(1)
    state, buffers = block.init_state(2), set()
    for _ in range(320):
        _, state = block.step(x, state)
        buffers.add(state.recent.buffer.data_ptr())
    assert state.recent.buffer.shape[1] <= 2 * 32
    assert len(buffers) <= 8


@torch.no_grad()
def test_forward_leaves_the_state_it_is_given():
    block, x = build(window_size=16), sequence(90)
    for cut in (1, 40):
        _, state = block(x[:, :cut])
        first, _ = block(x[:, cut:], state)
        second, later = block(x[:, cut:], state)
        assert torch.equal(first, second)
        block.step(x[:, :1], later)
        assert torch.equal(first, block(x[:, cut:], state)[0])


def test_a_step_after_training_leaves_its_graph_usable():
    block, x = build(window_size=16), sequence(60).requires_grad_()
    y, state = block(x)
    with torch.no_grad():
        for _ in range(40):
            _, state = block.step(x[:, :1], state)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_detach_cuts_the_graph():
    block, x = build(window_size=16, num_global_tokens=4), sequence(60).requires_grad_()
    for cut in (2, 30):
        _, state = block(x[:, :cut])
        y, _ = block(x[:, cut:], state.detach())
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not gradient[:, :cut].any()
        assert gradient[:, cut:].any()


@torch.no_grad()
@pytest.mark.parametrize("num_global_tokens", [0, 1, 9])
def test_later_tokens_change_nothing_earlier(num_global_tokens):
    block, x = build(window_size=16, num_global_tokens=num_global_tokens), sequence(80)
    for cut in (4, 50):
        changed = x.clone()
        changed[:, cut:] += 1
        assert torch.equal(block(x)[0][:, :cut], block(changed)[0][:, :cut])


@torch.no_grad()
def test_only_the_window_and_the_globals_are_seen():
    block, x = build(window_size=8, dilation=2, num_global_tokens=2), sequence(60)
    y = block(x)[0]
    seen = []
    for t in range(60):
        changed = x.clone()
        changed[:, t] += 1
        if not torch.equal(block(changed)[0][:, 50], y[:, 50]):
            seen.append(t)
    assert seen == [0, 1, *range(36, 51, 2)]


def test_globals_have_a_projection_of_their_own():
    assert "qkv_global_proj.weight" not in build(num_global_tokens=0).state_dict()
    block = build(num_kv_heads=2)
    assert block.qkv_global_proj.weight.shape == block.qkv_proj.weight.shape
    assert block.qkv_global_proj.bias is None


def test_dropout_acts_in_training_alone():
    block, x = build(dropout=0.3, window_size=8), sequence(30)
    assert torch.equal(block(x)[0], block(x)[0])
    block.train()
    for causal in (True, False):
        block.causal = causal
        assert not torch.equal(block(x)[0], block(x)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_grows_faster_than_the_sequence(dropout, causal):
    block = build(window_size=32, dropout=dropout, causal=causal, dtype=torch.float32).train()

    def largest(length):
        with LargestTensor() as seen:
            block(sequence(length, dtype=torch.float32, batch=1))[0].sum().backward()
        return seen.elements

    assert largest(4096) <= 2.1 * largest(2048)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 0},
        {"window_size": 2.5},
        {"dilation": 0},
        {"num_global_tokens": -1},
        {"window_size": 5, "causal": False},
        {"causal": 1},
        {"dropout": 1.0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError):
        build(**options)


def test_no_state_without_causality():
    block, x = build(causal=False), sequence(8)
    assert block(x)[1] is None
    for call in (lambda: block.init_state(1), lambda: block.step(x[:, :1], None)):
        with pytest.raises(UsageError, match="causal=False"):
            call()


@pytest.mark.parametrize("causal", [True, False])
def test_cost_counts_the_pairs_that_the_mask_shows(causal):
    for length in (1, 2, 7, 40):
        for window, dilation, head in ((2, 1, 0), (6, 1, 1), (6, 3, 5), (100, 2, 3)):
            options = SPEC.check_options(
                {"window_size": window, "dilation": dilation, "num_global_tokens": head, "causal": causal}
            )
            at = torch.arange(length)
            distance = at[:, None] - at
            most = (window - 1 if causal else window // 2) * dilation
            visible = (distance.abs() <= most) & (distance % dilation == 0) | (at < head)
            if causal:
                visible &= distance >= 0
                assert visible_pairs(length, options, last_only=True) == visible[-1].sum()
            else:
                visible |= at[:, None] < head
            assert visible_pairs(length, options) == visible.sum()


def test_cost_of_state_is_what_the_state_holds():
    cell = Cell(block=BlockRequest(target="Longformer"), length=300, d_model=32, n_heads=4, dtype="fp64")
    block = build(window_size=50, dilation=2, num_global_tokens=3)
    with torch.no_grad():
        _, state = block(sequence(300, batch=1))
    rows = min(state.recent.alive, state.recent.reach) + state.first.shape[1]
    options = SPEC.check_options({"window_size": 50, "dilation": 2, "num_global_tokens": 3})
    assert SPEC.cost(cell, options).state_bytes == rows * 2 * 32 * 8


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3])
def test_equals_the_published_attention_without_causality(count):
    reason = "transformers is not installed: the published Longformer attention is not there to compare with"
    pytest.importorskip("transformers", reason=reason)
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    half, length, width = 8, 64, 32
    config = LongformerConfig(
        hidden_size=width,
        num_attention_heads=4,
        attention_window=[2 * half],
        attention_probs_dropout_prob=0.0,
    )
    theirs = LongformerSelfAttention(config, 0).eval().double()
    block = build(window_size=2 * half, num_global_tokens=count, causal=False)
    names = ("query", "key", "value")
    for projection, suffix in ((block.qkv_proj, ""), (getattr(block, "qkv_global_proj", None), "_global")):
        for name in names:
            getattr(theirs, name + suffix).bias.zero_()
        if projection is not None:
            parts = projection.weight.split(width)
            for name, rows in zip(names, parts, strict=True):
                getattr(theirs, name + suffix).weight.copy_(rows)
    u = sequence(length)
    is_global = (torch.arange(length) < count).expand(2, -1)
    mask = torch.where(is_global, 10000.0, 0.0).double()
    expected = theirs(
        u,
        attention_mask=mask,
        is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global,
        is_global_attn=bool(count),
    )[0]
    block.out_proj = torch.nn.Identity()
    # Theirs rounds its softmax to fp32.
    torch.testing.assert_close(block.mix(u, None, False)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_cuda(causal, dtype):
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    options = {"window_size": 64, "num_global_tokens": 3, "num_kv_heads": 2, "causal": causal}
    block, exact = build(dtype=kind, **options).cuda(), build(**options).cuda()
    exact.load_state_dict(block.state_dict())
    x = sequence(700, dtype=kind).cuda()
    expected, _ = reference(exact, x.double())
    y, _ = block(x)
    assert (y.double() - expected).norm() < SPEC.tolerances[dtype] * expected.norm()
    if causal:
        with torch.no_grad():
            _, state = block(x[:, :699])
            last, _ = block.step(x[:, 699:], state)
        assert (last.double() - expected[:, 699:]).norm() < SPEC.tolerances[dtype] * expected[:, 699:].norm()
