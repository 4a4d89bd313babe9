"""The gate of DPASSM in one kernel against torch's operations, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from longctx.ops import gated_mix as module
from longctx.ops.gated_mix import gated_mix

SHAPES = [(2, 65, 40, 5), (1, 130, 150, 64), (1, 1, 8, 1), (3, 64, 128, 17)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def case(batch, tokens, width, states, *, device, dtype):
    """attended, gate, recurrent and s as columns of one product, the bias of the gate, the weight of ssm_out."""
    rows = torch.randn(batch, tokens, 3 * width + states).to(device, dtype)
    parts = rows.split([width, width, width, states], dim=-1)
    return *parts, *(t.to(device, dtype) for t in (torch.randn(width), torch.randn(width, states)))


def close(got, want):
    want = want.detach().cpu()
    return (got.detach().double().cpu() - want).norm() <= TOLERANCE[got.dtype] * want.norm()


def check_all(device, dtypes):
    for shape in SHAPES:
        for dtype in dtypes:
            check(*case(*shape, device=device, dtype=dtype))


def check(attended, gate, recurrent, s, bias, weight):
    exact = [t.detach().double().cpu() for t in (attended, gate, recurrent, s, bias, weight)]
    want = torch.lerp(exact[3] @ exact[5].T, exact[0], torch.sigmoid(exact[1] + exact[4]))
    into = attended.clone()
    assert module.kernel.project_and_mix(into, gate, bias, s, weight, out=into) is into
    assert close(into, want)
    grad = torch.randn_like(attended)
    for_gate = torch.empty_like(gate)
    for_attended = attended.clone()
    for_recurrent, sums = module.kernel.project_and_mix_backward(
        grad, for_attended, gate, bias, s, weight, for_gate=for_gate
    )
    recurrent_exact = (exact[3] @ exact[5].T).requires_grad_()
    inputs = [exact[0].requires_grad_(), recurrent_exact, exact[1].requires_grad_()]
    want = torch.lerp(recurrent_exact, exact[0], torch.sigmoid(exact[1] + exact[4]))
    wanted = torch.autograd.grad(want, inputs, grad.double().cpu())
    for got, expected in zip((for_attended, for_recurrent, for_gate), wanted, strict=True):
        assert close(got, expected)
    for got, expected in zip(sums, (wanted[0], wanted[2]), strict=True):
        assert (got.double().cpu() - expected.sum((0, 1))).norm() <= 1e-5 * expected.norm()
    inputs = [t.detach().requires_grad_() for t in (attended, recurrent, gate)]
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    out, want = gated_mix(*inputs), torch.lerp(exact[1], exact[0], torch.sigmoid(exact[2]))
    assert close(out, want)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)
    for got, expected in zip(grads, torch.autograd.grad(want, exact, grad.double().cpu()), strict=True):
        assert close(got, expected)


def test_without_a_kernel_it_is_lerp():
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(gated_mix, inputs)
    assert torch.equal(gated_mix(*inputs), torch.lerp(inputs[1], inputs[0], torch.sigmoid(inputs[2])))


@pytest.mark.cuda
def test_the_kernels_agree_with_torch():
    check_all("cuda", TOLERANCE)


@pytest.mark.cuda
def test_the_operator_is_registered_as_torch_expects():
    inputs = [torch.randn(2, 5, 40, device="cuda", requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.longctx.gated_mix.default, inputs)
    with_kernel, without = [], []
    for found, mix in ((with_kernel, gated_mix), (without, lambda a, r, g: torch.lerp(r, a, torch.sigmoid(g)))):
        (first,) = torch.autograd.grad(mix(*inputs).square().sum(), inputs[0], create_graph=True)
        found += torch.autograd.grad(first.square().sum(), inputs)
    for got, want in zip(with_kernel, without, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_kernels_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    code = """
import torch
import test_gated_mix as tests
tests.module.kernel.fits = lambda *tensors: True
tests.check_all("cpu", (torch.float32, torch.float16))
print("ok")
"""
    interpreted(code)
