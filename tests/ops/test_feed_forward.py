"""The shell's second half against plain torch: values, gradients, what it keeps, and how it goes with torch's tools."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longctx.ops import feed_forward
from longctx.ops.feed_forward import infer, residual_feed_forward


def make(*, batch=2, tokens=37, width=12, wide=40, dtype=torch.float64, device=None):
    """(x, mixed, [norm weight, norm bias], up, down): every parameter away from 0 and 1."""
    shapes = [(batch, tokens, width)] * 2 + [(width,)] * 2 + [(wide, width), (wide,), (width, wide), (width,)]
    x, mixed, gain, offset, *rest = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return [t.requires_grad_() for t in (x, mixed, gain, offset, *rest)]


def call(x, mixed, gain, offset, up, up_bias, down, down_bias, **more):
    return residual_feed_forward(x, mixed, (gain, offset, 1e-5), (up, up_bias), (down, down_bias), **more)


def plain(x, mixed, gain, offset, up, up_bias, down, down_bias):
    r = x + mixed
    hidden = F.gelu(F.linear(F.layer_norm(r, (r.shape[-1],), gain, offset, 1e-5), up, up_bias))
    return r + F.linear(hidden, down, down_bias)


def gradients(y, tensors):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return torch.autograd.grad((y * weights).sum(), tensors)


@pytest.fixture(params=[1024, 16, 1])
def slabs(request, monkeypatch):
    monkeypatch.setattr(feed_forward, "CPU_TOKENS", request.param)


@pytest.mark.parametrize("shape", [{}, {"tokens": 1, "batch": 1}, {"batch": 3, "tokens": 65, "width": 48, "wide": 192}])
def test_values_and_gradients_are_those_of_plain_torch(shape, slabs):
    tensors = make(**shape)
    y, want = call(*tensors), plain(*tensors)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(gradients(y, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_gradcheck(keep_hidden, monkeypatch):
    monkeypatch.setattr(feed_forward, "CPU_TOKENS", 2)
    tensors = make(batch=1, tokens=3, width=4, wide=6)
    assert torch.autograd.gradcheck(lambda *args: call(*args, keep_hidden=keep_hidden), tensors)


def test_what_needs_no_gradient_gets_none():
    x, mixed, *parameters = (t.detach() for t in make())
    mixed.requires_grad_()
    y = call(x, mixed, *parameters)
    (grad,) = torch.autograd.grad(y.sum(), mixed)
    (want,) = torch.autograd.grad(plain(x, mixed, *parameters).sum(), mixed)
    torch.testing.assert_close(grad, want)


def test_strided_input_and_gradient():
    x, mixed, *parameters = make(tokens=5)
    swapped = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (x, mixed)]
    want, y = plain(x, mixed, *parameters), call(*swapped, *parameters)
    torch.testing.assert_close(y, want)
    grad = torch.randn(5, 2, 12, dtype=torch.float64).transpose(0, 1)
    expected = torch.autograd.grad(want, x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(y, swapped[0], grad)[0], expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_inference_writes_a_slab_of_a_longer_output(batch):
    tensors = [t.detach() for t in make(batch=batch)]
    x, mixed, gain, offset, up, up_bias, down, down_bias = tensors
    longer = torch.full((batch, 50, 12), 7.0, dtype=torch.float64)
    hidden = torch.empty(batch * 37, 40, dtype=torch.float64)
    infer(x, mixed, (gain, offset, 1e-5), (up, up_bias), (down, down_bias), out=longer[:, 5:42], hidden=hidden)
    torch.testing.assert_close(longer[:, 5:42], plain(*tensors))
    assert (longer[:, :5] == 7).all() and (longer[:, 42:] == 7).all()


@pytest.mark.parametrize(("keep_hidden", "width"), [(True, 16 + 64), (False, 16)])
def test_neither_the_norm_nor_the_rows_behind_gelu_are_kept(keep_hidden, width):
    tensors = make(batch=1, tokens=256, width=16, wide=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        call(*tensors, keep_hidden=keep_hidden)
    assert sum(count for count in kept if count >= 256 * 16) == 256 * width


def test_dropout_has_the_right_scale_and_the_same_mask_in_backward():
    x, mixed, *parameters = make(batch=1, tokens=400)
    torch.manual_seed(3)
    y = call(x, mixed, *parameters, dropout_p=0.25)
    r, want = x + mixed, plain(x, mixed, *parameters)
    let_through = (y - r).abs() > 1e-12
    assert 0.7 < let_through.double().mean() < 0.8
    masked = r + (want - r) * let_through / 0.75
    torch.testing.assert_close(y, masked)
    tensors = (x, mixed, *parameters)
    for got, expected in zip(gradients(y, tensors), gradients(masked, tensors), strict=True):
        torch.testing.assert_close(got, expected)


def test_dropout_is_the_same_in_a_recomputation():
    tensors = make()

    def run(*args):
        return call(*args, dropout_p=0.5)

    torch.manual_seed(1)
    want = gradients(run(*tensors), tensors)
    torch.manual_seed(1)
    for got, expected in zip(gradients(checkpoint(run, *tensors, use_reentrant=False), tensors), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_opcheck():
    tensors = make(batch=1, tokens=5)
    x, mixed, gain, offset, *rest = tensors
    kept = torch.rand_like(x) < 0.5
    for mask, scale in ((None, 1.0), (kept, 2.0)):
        torch.library.opcheck(
            torch.ops.longctx.residual_feed_forward, (x, mixed, mask, scale, mask is None, 3, gain, offset, 1e-5, *rest)
        )


@pytest.mark.parametrize("drops", [False, True])
def test_under_torch_compile_without_a_graph_break(drops):
    tensors = make()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = compiled(*tensors, dropout_p=0.5 * drops)
    torch.manual_seed(0)
    want = call(*tensors, dropout_p=0.5 * drops)
    torch.testing.assert_close(y, want)
    for got, expected in zip(gradients(y, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(got, expected)


def test_under_autocast_products_are_in_half_precision():
    tensors = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*tensors)
    want = plain(*tensors)
    assert y.dtype == torch.float32
    assert 1e-5 < (y - want).norm() / want.norm() < 2e-2
    assert all(grad.isfinite().all() for grad in gradients(y, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_plain_torch(dtype):
    exact = [t.detach().to(dtype).double().requires_grad_() for t in make(tokens=300, width=64, wide=256)]
    tensors = [t.detach().to(dtype).requires_grad_() for t in exact]
    want = gradients(plain(*exact), exact)
    got, torch_own = (gradients(f(*tensors), tensors) for f in (call, plain))
    for mine, other, expected in zip(got, torch_own, want, strict=True):
        assert (mine.double() - expected).norm() <= 2 * (other.double() - expected).norm() + 1e-3 * expected.norm()
