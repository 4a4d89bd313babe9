"""Window attention against a dense mask in fp64: values, gradients, odd sizes, globals, dropout, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longctx.errors import UsageError
from longctx.ops import _window_blocks as blocks
from longctx.ops import _window_flash as flash
from longctx.ops.window_attention import window_attention, window_attention_path

LENGTHS = (1, 2, 63, 64, 65, 257)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads only cost time on tensors this small."""
    torch.set_num_threads(1)


def visible_keys(q, k, *, window, dilation=1, causal=True, global_k=None, key_offset=0) -> Tensor:
    """The definition: bool `[T, S + g]`, over all keys with the globals behind them."""
    queries, keys = q.shape[1], k.shape[1]
    at = torch.arange(queries, device=q.device)[:, None] + keys - queries
    distance = at - torch.arange(keys, device=q.device)
    most = window - 1 if causal else window // 2
    visible = (distance % dilation == 0) & (distance.abs() <= most * dilation)
    if causal:
        visible &= distance >= 0
    if global_k is not None:
        first = torch.arange(global_k.shape[1], device=q.device)
        visible &= torch.arange(keys, device=q.device) + key_offset >= len(first)
        visible = torch.cat([visible, (first <= at + key_offset) | (not causal)], dim=1)
    return visible


def dense(q, k, v, *, global_k=None, global_v=None, **how) -> Tensor:
    """Attention by one mask."""
    visible = visible_keys(q, k, global_k=global_k, **how)
    if global_k is not None:
        k, v = torch.cat([k, global_k], dim=1), torch.cat([v, global_v], dim=1)
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[3] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def tensors(*, queries, keys, heads=4, groups=4, width=8, count=0, batch=2, dtype=torch.float64, device="cpu"):
    """q, k, v and `count` global keys and values, all requiring gradients."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(queries, heads), (keys, groups), (keys, groups), (count, groups), (count, groups)]
    made = [torch.randn(batch, n, h, width, generator=generator, dtype=torch.float64) for n, h in shapes]
    q, k, v, gk, gv = (t.to(device, dtype).requires_grad_() for t in made)
    return [q, k, v], {"global_k": gk, "global_v": gv} if count else {}


def assert_same(inputs: list[Tensor], ours: Tensor, expected: Tensor) -> None:
    """Values and gradients with respect to every input, in fp64."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(ours, inputs, upstream, materialize_grads=True, allow_unused=True)
    want = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("queries", LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 70, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_dense_mask(queries, window, causal):
    for halo, dilation, groups in ((0, 1, 4), (1, 3, 2), (40, 1, 2), (40, 3, 4)) if causal else ((0, 3, 2),):
        inputs, _ = tensors(queries=queries, keys=queries + halo, groups=groups)
        how = {"window": window, "dilation": dilation, "causal": causal}
        expected = dense(*inputs, **how)
        assert_same(inputs, window_attention(*inputs, **how), expected)
        with torch.no_grad():
            torch.testing.assert_close(window_attention(*inputs, **how), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("queries", [1, 2, 65, 200])
@pytest.mark.parametrize("count", [1, 5])
def test_globals_are_seen_by_all_and_counted_once(queries, count):
    for halo, offset in ((0, 0), (0, 3), (40, 0), (40, 70)):
        for dilation in (1, 3):
            known = min(count, offset + queries + halo)
            inputs, far = tensors(queries=queries, keys=queries + halo, groups=2, count=known)
            how = {"window": 16, "dilation": dilation, "key_offset": offset, **far}
            expected = dense(*inputs, **how)
            assert_same(inputs + list(far.values()), window_attention(*inputs, **how), expected)
            with torch.no_grad():
                torch.testing.assert_close(window_attention(*inputs, **how), expected, rtol=0, atol=1e-9)


def test_globals_without_causality():
    inputs, far = tensors(queries=131, keys=131, groups=2, count=5)
    how = {"window": 20, "dilation": 2, "causal": False, "key_offset": 5, **far}
    assert_same(inputs + list(far.values()), window_attention(*inputs, **how), dense(*inputs, **how))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_other_dtypes(dtype, tolerance):
    inputs, far = tensors(queries=257, keys=300, groups=2, width=16, count=3, dtype=dtype)
    exact = [t.detach().double() for t in inputs]
    exact_far = {name: t.detach().double() for name, t in far.items()}
    out = window_attention(*inputs, window=70, key_offset=9, **far)
    expected = dense(*exact, window=70, key_offset=9, **exact_far)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < tolerance * expected.norm()
    (gradient,) = torch.autograd.grad(out.float().sum(), inputs[1])
    assert gradient.dtype == dtype


def test_gradcheck():
    inputs, far = tensors(queries=5, keys=7, heads=2, groups=1, width=4, count=2, batch=1)
    check = lambda *t: window_attention(*t[:3], window=3, key_offset=4, global_k=t[3], global_v=t[4])  # noqa: E731
    assert torch.autograd.gradcheck(check, (*inputs, *far.values()))


def test_strided_views_of_one_projection():
    qkv = torch.randn(2, 150, 3 * 4 * 8, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (4, 8)) for t in qkv.chunk(3, dim=-1))
    torch.testing.assert_close(window_attention(q, k, v, window=33), dense(q, k, v, window=33), rtol=0, atol=1e-9)


def test_unwritten_memory_is_never_read(poisoned_memory):
    inputs, far = tensors(queries=150, keys=190, groups=2, count=3)
    out = window_attention(*inputs, window=70, key_offset=5, **far)
    out.sum().backward()
    for t in (out, *(t.grad for t in (*inputs, *far.values()))):
        assert t.isfinite().all()


def test_inputs_are_left_alone():
    inputs, far = tensors(queries=100, keys=180, count=4)
    before = [t.detach().clone() for t in (*inputs, *far.values())]
    with torch.no_grad():
        window_attention(*inputs, window=30, key_offset=50, **far)
    for t, old in zip((*inputs, *far.values()), before, strict=True):
        assert torch.equal(t, old)


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_its_own_draw():
    inputs, far = tensors(queries=40, keys=40, count=2, batch=1)
    how = {"window": 9, "key_offset": 60, **far}
    plain = window_attention(*inputs, **how)
    with torch.no_grad():
        draws = torch.stack([window_attention(*inputs, dropout_p=0.3, **how) for _ in range(300)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).abs().mean() < 0.1 * plain.abs().mean()

    # The same seed draws the same mask, so a difference quotient of the dropped output checks the gradient.
    def drawn(t):
        torch.manual_seed(3)
        return window_attention(t, *inputs[1:], dropout_p=0.3, **how)

    assert torch.autograd.gradcheck(drawn, (inputs[0],), fast_mode=True)


def test_nothing_of_size_window_times_length_is_kept_for_backward():
    inputs, _ = tensors(queries=4096, keys=4096, heads=2, groups=2, dtype=torch.float32, batch=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        window_attention(*inputs, window=512)
    assert sum(t.numel() for t in saved) <= sum(t.numel() for t in inputs)


def test_scratch_memory_does_not_grow_with_the_length():
    def scratch(length: int) -> int:
        q = torch.empty(length, 2, 8)
        return blocks._Walk(q, q, None, 127, 0, 0.0, 0).buffer.numel()

    assert scratch(1024) == scratch(1 << 20)


@pytest.mark.parametrize(
    ("shape_q", "shape_k", "how"),
    [
        ((1, 4, 2, 8), (1, 3, 2, 8), {"window": 2}),
        ((1, 4, 3, 8), (1, 4, 2, 8), {"window": 2}),
        ((1, 4, 2, 8), (2, 4, 2, 8), {"window": 2}),
        ((1, 4, 2, 8), (1, 5, 2, 8), {"window": 2, "causal": False}),
        ((1, 4, 2, 8), (1, 4, 2, 8), {"window": 0}),
        ((1, 4, 2, 8), (1, 4, 2, 8), {"window": 2, "dilation": 0}),
        ((4, 2, 8), (4, 2, 8), {"window": 2}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape_q, shape_k, how):
    with pytest.raises(UsageError):
        window_attention(torch.randn(shape_q), torch.randn(shape_k), torch.randn(shape_k), **how)


def test_queries_among_globals_are_refused_without_causality():
    inputs, far = tensors(queries=9, keys=9, count=2)
    with pytest.raises(UsageError, match="behind the global"):
        window_attention(*inputs, window=4, causal=False, **far)


def test_path_names_what_runs():
    assert window_attention_path(torch.device("cpu"), torch.float32, 64) == "blocked window products"


@pytest.mark.cuda
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_kernels_on_cuda(count, groups, causal):
    made, far = tensors(queries=700, keys=700, groups=groups, width=64, count=count, device="cuda")
    inputs = [*made, *far.values()]
    exact = [t.detach().bfloat16().double().requires_grad_() for t in inputs]
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]
    assert flash.fits(half[0].device, half[0].dtype, 64)
    how = {"window": 128, "dilation": 2, "causal": causal, "key_offset": 900}
    named = lambda t: dict(zip(("global_k", "global_v"), t[3:], strict=False))  # noqa: E731
    expected = dense(*exact[:3], **how, **named(exact))
    out = window_attention(*half[:3], **how, **named(half))
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(out, half, upstream.bfloat16())
    for a, b in zip(got, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_the_blocked_products_are_one_operator_to_torch():
    q, k, v, global_k, global_v = (torch.randn(1, n, 2, 4, requires_grad=True) for n in (9, 12, 12, 3, 3))
    op = torch.ops.longctx.blocked_window_attention.default
    torch.library.opcheck(op, (q, k, v, global_k, global_v, 5, 0, 0.3, torch.tensor(7)))
    torch.library.opcheck(op, (q, k, v, None, None, 5, 0, 0.0, None))
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    for dropout_p in (0.0, 0.3):
        results = []
        for call in (window_attention, compiled):
            torch.manual_seed(3)
            out = call(q, k, v, window=6, dropout_p=dropout_p)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
