"""The Triton kernels of the scan against the loop over tokens, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from longctx.ops import diagonal_scan as module
from longctx.ops.diagonal_scan import diagonal_scan, diagonal_scan_reference

DECAYS = [0.0, 0.5, -0.9, 0.9999, -0.999, 1e-3, -1e-30, 0.07, 1e-30, 0.99, -0.9999]
LENGTHS = [1, 2, 16, 17, 63, 64, 65, 256, 257]


def case(length, *, device="cpu", dtype=torch.float32, batch=2, decays=DECAYS):
    """x is a view of columns of something wider, as a projection gives it."""
    count = len(decays)
    x = torch.randn(batch, length + 3, count + 7).to(device, dtype)[:, 3:, 4 : 4 + count]
    return x, torch.tensor(decays, device=device), torch.randn(batch, count).to(device)


def relative(got, want):
    want = want.double().cpu()
    return ((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30)).item()


def exact(inputs, weights, end_weights):
    """(s, end, gradients to x, decay and initial) of the loop in fp64; of the chunked products where it is long."""
    inputs = [t.double().cpu().requires_grad_() for t in inputs]
    s, end = (diagonal_scan if inputs[0].shape[1] > 5000 else diagonal_scan_reference)(*inputs)
    loss = (s * weights.double().cpu()).sum() + (end * end_weights.double().cpu()).sum()
    return s.detach(), end.detach(), *torch.autograd.grad(loss, inputs)


def check(length, *, device, dtype=torch.float32, **options):
    inputs = case(length, device=device, dtype=dtype, **options)
    weights = torch.randn(inputs[0].shape, device=device)
    end_weights = torch.randn(inputs[2].shape, device=device)
    want = exact(inputs, weights, end_weights)
    with torch.no_grad():
        plain = diagonal_scan(*inputs)
    inputs = [t.requires_grad_() for t in inputs]
    s, end = diagonal_scan(*inputs)
    got = s, end, *torch.autograd.grad((s * weights).sum() + (end * end_weights).sum(), inputs)
    assert s.dtype == end.dtype == torch.float32 and got[2].dtype == dtype
    assert torch.equal(plain[0], s) and torch.equal(plain[1], end)
    for index, (mine, expected) in enumerate(zip(got, want, strict=True)):
        limit = 5e-3 if index == 2 and dtype != torch.float32 else 1e-6
        assert relative(mine, expected) < limit, (length, options, index, relative(mine, expected))


def check_all(device):
    """What both the GPU and the interpreter are put through."""
    for length in LENGTHS:
        check(length, device=device)
    check(300, device=device, dtype=torch.bfloat16)
    check(70, device=device, batch=1, decays=[0.5])
    check(40, device=device, decays=DECAYS * 7)
    run, most = module.kernel.RUN, module.kernel.MOST_CHUNKS
    try:
        module.kernel.RUN = 4
        check(64 * 35 + 3, device=device, batch=1, decays=[0.9999, -0.999, 0.0])  # more chunks than one sum takes
        module.kernel.MOST_CHUNKS = 2  # so that a chunk is of many tiles
        check(500, device=device)
    finally:
        module.kernel.RUN, module.kernel.MOST_CHUNKS = run, most
    check_options(device)


def check_options(device):
    """Bias, tanh, no initial state, rows in half precision."""
    x, raw, _ = case(300, device=device, dtype=torch.float16)
    raw = torch.cat([raw[:5] * 3, raw.new_tensor([1e-5, -2e-3, 9.0, -0.3, 0.0, 1e-30])])
    bias = torch.randn(len(DECAYS), device=device).half()
    s, end = module.kernel.scan_kernel(x, raw, None, dtype=torch.float16, bias=bias, tanh=True)
    decay = torch.tanh(raw.double()).float().double()
    want, want_end = diagonal_scan_reference((x.double() + bias.double()).cpu(), decay.cpu())
    assert s.dtype == torch.float16 and relative(s, want) < 5e-4
    assert end.dtype == torch.float32 and relative(end, want_end) < 1e-6


@pytest.mark.cuda
def test_the_kernels_agree_with_the_token_loop():
    assert module.kernel.fits(*case(3, device="cuda")[:2])
    check_all("cuda")
    for length in (1000, 4097, 64 * 4096 + 65):
        check(length, device="cuda", batch=1)


@pytest.mark.cuda
def test_gradients_of_gradients_and_compiled():
    x, decay, initial = (t.requires_grad_() for t in case(100, device="cuda"))
    grads = []
    for scan in (diagonal_scan, diagonal_scan_reference):
        s, end = scan(x, decay, initial)
        (first,) = torch.autograd.grad(s.square().sum() + end.sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), (x, decay, initial)))
    for got, want in zip(*grads, strict=True):
        assert relative(got, want) < 1e-5
    compiled = torch.compile(lambda *inputs: diagonal_scan(*inputs)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(x, decay, initial), diagonal_scan(x, decay, initial)[0] * 2)
    with torch.no_grad():
        assert torch.equal(compiled(x, decay, initial), diagonal_scan(x, decay, initial)[0] * 2)
    x, decay, initial = (t.detach().requires_grad_() for t in (x, decay, initial))
    torch.library.opcheck(torch.ops.longctx.diagonal_scan.default, (x, decay, initial, torch.bfloat16))


@pytest.mark.cuda
def test_the_same_bits_twice():
    x, decay, initial = (t.requires_grad_() for t in case(5000, device="cuda", dtype=torch.bfloat16))
    runs = []
    for _ in range(2):
        s, end = diagonal_scan(x, decay, initial)
        runs.append([s, end, *torch.autograd.grad(s.square().sum() + end.sum(), (x, decay, initial))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_the_kernels_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    code = """
import test_diagonal_scan_kernel as tests
tests.module.kernel.fits = lambda *tensors: True
tests.check_all("cpu")
print("ok")
"""
    interpreted(code)
