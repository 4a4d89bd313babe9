"""The chunked scan against the loop over tokens: values, gradients, whatever torch's precision flags say."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.errors import LongctxError
from longctx.ops import diagonal_scan as module
from longctx.ops.diagonal_scan import diagonal_scan, diagonal_scan_reference

DECAYS = [0.0, 0.5, -0.9, 0.9999, -0.9999, 1e-3, -1e-30, 0.07]


def case(length: int, *, batch: int = 2, dtype=torch.float64, device="cpu") -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, length, len(DECAYS), dtype=dtype, device=device)
    decay = torch.tensor(DECAYS, dtype=dtype, device=device)
    return x, decay, torch.randn(batch, len(DECAYS), dtype=dtype, device=device)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 1000, 64 * 64, 64 * 64 + 65])
def test_agrees_with_the_token_loop(length):
    x, decay, initial = case(length)
    for start in (initial, None):
        s, final = diagonal_scan(x, decay, start)
        want_s, want_final = diagonal_scan_reference(x, decay, start)
        torch.testing.assert_close(s, want_s, rtol=0, atol=1e-11)
        torch.testing.assert_close(final, want_final, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [7, 64, 1000, 9001])
def test_fp32_is_as_exact_as_fp32_can_be(length):
    x, decay, initial = case(length, dtype=torch.float32)
    s, _ = diagonal_scan(x, decay, initial)
    want, _ = diagonal_scan_reference(x.double(), decay.double(), initial.double())
    assert s.dtype == torch.float32
    assert relative(s, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_summed_in_fp32(dtype):
    x, decay, initial = case(300)
    x = x.to(dtype)
    s, final = diagonal_scan(x, decay.float(), initial.float())
    want, _ = diagonal_scan_reference(x.double(), decay.float().double(), initial)
    assert s.dtype == final.dtype == torch.float32
    assert relative(s, want) < 1e-6


def test_rows_in_another_precision_and_an_end_in_that_of_the_scan():
    x, decay, initial = (t.requires_grad_() for t in case(300, dtype=torch.float32))
    want, want_final = diagonal_scan(x, decay, initial)
    weights = torch.randn_like(want)
    exact = torch.autograd.grad((want * weights).sum() + want_final.sum(), (x, decay, initial))
    s, final = diagonal_scan(x, decay, initial, dtype=torch.bfloat16)
    grads = torch.autograd.grad((s * weights).sum() + final.sum(), (x, decay, initial))
    assert s.dtype == torch.bfloat16 and torch.equal(s, want.bfloat16())
    assert torch.equal(final, want_final)
    for got, expected in zip(grads, exact, strict=True):
        assert got.dtype == torch.float32 and relative(got, expected) < 1e-2
    s, final = diagonal_scan(x[:, :1], decay, initial, dtype=torch.bfloat16)
    assert s.dtype == torch.bfloat16 and final.dtype == torch.float32


def test_zero_decay_copies_the_input():
    x, _, initial = case(200)
    s, _ = diagonal_scan(x, torch.zeros(len(DECAYS), dtype=x.dtype), initial)
    torch.testing.assert_close(s, x, rtol=0, atol=0)


def test_a_stream_in_pieces_is_the_whole():
    x, decay, initial = case(500)
    whole, end = diagonal_scan(x, decay, initial)
    pieces, state = [], initial
    for piece in x.split([1, 7, 64, 129, 299], dim=1):
        s, state = diagonal_scan(piece, decay, state)
        pieces.append(s)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10])
def test_gradients_once_and_twice(length, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.0, 0.6, -0.8, 0.99], dtype=torch.float64, requires_grad=True)
    initial = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal_scan, (x, decay, initial))
    assert torch.autograd.gradgradcheck(diagonal_scan, (x, decay, initial))


@pytest.mark.parametrize("length", [65, 700])
def test_gradients_agree_with_those_of_the_loop_through_s_and_through_the_end(length):
    inputs = [t.requires_grad_() for t in case(length)]
    weights = torch.randn(2, length, len(DECAYS), dtype=torch.float64)
    end_weights = torch.randn(2, len(DECAYS), dtype=torch.float64)
    grads = []
    for scan in (diagonal_scan, diagonal_scan_reference):
        s, final = scan(*inputs)
        grads.append(torch.autograd.grad((s * weights).sum() + (final * end_weights).sum(), inputs))
    for got, want in zip(*grads, strict=True):
        assert relative(got, want) < 1e-12


def test_gradient_of_a_bf16_input_has_its_dtype():
    x, decay, _ = case(70)
    x = x.bfloat16().requires_grad_()
    diagonal_scan(x, decay.float())[0].sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_any_strides(poisoned_memory):
    x, decay, initial = case(130, batch=3)
    want, _ = diagonal_scan_reference(x, decay, initial)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread = torch.stack([x, x], dim=-1)[..., 0]
    for other in (strided, spread):
        s, _ = diagonal_scan(other, decay, initial.t().contiguous().t())
        torch.testing.assert_close(s, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_and_autocast_do_not_reach_the_scan(precision, global_state, monkeypatch):
    x, decay, initial = case(1000, dtype=torch.float32)
    plain, _ = diagonal_scan(x, decay, initial)
    torch.set_float32_matmul_precision(precision)
    before = global_state()
    seen, bmm = [], torch.bmm

    def recording(*args):
        product = bmm(*args)
        seen.append((torch.get_float32_matmul_precision(), product.dtype))
        return product

    monkeypatch.setattr(torch, "bmm", recording)
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = diagonal_scan(x, decay, initial)
    assert torch.equal(fast, plain)
    assert seen and set(seen) == {("highest", torch.float32)}
    assert global_state() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="settings per backend came with torch 2.9")
@pytest.mark.parametrize("chosen", ["tf32", "bf16"])
def test_precision_set_for_one_backend_is_put_back(chosen):
    x, decay, initial = case(200, dtype=torch.float32)
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.mkldnn.matmul.fp32_precision = chosen
        set_so = [backend.fp32_precision for backend in backends]
        diagonal_scan(x, decay, initial)
        assert [backend.fp32_precision for backend in backends] == set_so
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def test_flags_come_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ZeroDivisionError), module.full_precision("cpu"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high"


def test_inference_mode_and_no_grad():
    x, decay, initial = case(200)
    want, _ = diagonal_scan(x, decay, initial)
    with torch.inference_mode():
        assert torch.equal(diagonal_scan(x, decay, initial)[0], want)
    with torch.no_grad():
        assert not diagonal_scan(x.clone().requires_grad_(), decay, initial)[0].requires_grad


def test_the_operator_is_registered_as_torch_expects():
    x, decay, initial = case(70)
    inputs = [t.requires_grad_() for t in (x, decay, initial)]
    for dtype in (torch.float64, torch.float32):
        torch.library.opcheck(torch.ops.longctx.diagonal_scan.default, (*inputs, dtype))


def test_work_and_memory_are_linear_in_the_length():
    class Elements(TorchDispatchMode):
        calls = elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.calls += 1
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    counts = []
    for length in (4096, 16384):
        x, decay, initial = case(length)
        with Elements() as mode:  # below the registered operator, into which a mode does not see
            module._scan_rows(x.permute(2, 0, 1), decay, initial.t())
        counts.append(mode)
    assert counts[1].elements <= 4 * counts[0].elements < 8 * x.numel()
    assert counts[1].calls < 2 * counts[0].calls


def test_the_end_does_not_keep_the_sequence_alive():
    x, decay, initial = case(200)
    _, final = diagonal_scan(x, decay, initial)
    assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


@pytest.mark.parametrize(
    "shapes",
    [((2, 5), (5,), None), ((2, 0, 3), (3,), None), ((2, 4, 3), (4,), None), ((2, 4, 3), (3,), (1, 3))],
)
def test_shapes_that_do_not_belong_together(shapes):
    x, decay, initial = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(LongctxError):
        diagonal_scan(x, decay, initial)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_on_a_gpu_with_and_without_tf32(precision):
    torch.set_float32_matmul_precision(precision)
    x, decay, initial = case(5000, dtype=torch.float32, device="cuda")
    s, _ = diagonal_scan(x, decay, initial)
    want, _ = diagonal_scan_reference(*(t.double().cpu() for t in (x, decay, initial)))
    assert relative(s.cpu(), want) < 1e-6
    assert torch.get_float32_matmul_precision() == precision
