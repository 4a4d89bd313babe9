"""The shell's Triton kernels against fp64, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_feed_forward import call, make, plain

from longctx import blocks
from longctx.ops.layer_norm import kernels, layer_norm

WIDTHS = [48, 512, 640]
SHAPES = [(1, 1), (2, 63), (1, 65), (3, 130)]
needs_triton = pytest.mark.skipif(kernels is None, reason="Triton is not installed")


def errors(width, shape, *, dtype, device) -> dict[str, float]:
    """Relative error of everything that the kernels write, for rows of this width and shape, against fp64."""
    batch, tokens = shape
    found = {}

    def check(name, got, want):
        want = want.to(got.device)
        found[name] = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()

    def draw(*size):
        return torch.randn(size, device=device).to(dtype)

    # A slab of something longer, as inference gives it, and memory that shows what is not written.
    x, added = draw(batch, tokens + 3, width + 8)[:, 1 : tokens + 1, :width], draw(batch, tokens, width)
    gain, offset, shift = 1 + 0.1 * draw(width), draw(width), draw(width)
    out, total = (torch.full((batch, tokens, width), float("nan"), dtype=dtype, device=device) for _ in range(2))
    longer = torch.full((batch, tokens + 2, width), float("nan"), dtype=dtype, device=device)
    shifted = longer[:, 1:-1]
    kernels.layer_norm(x, gain, offset, 1e-5, out=out)
    check("norm", out, F.layer_norm(x.double(), (width,), gain.double(), offset.double()))
    kernels.add_layer_norm(x, added, gain, offset, shift, 1e-5, out=out, total=total, shifted=shifted)
    r = (x + added).double()
    check("total", total, r)
    check("norm of total", out, F.layer_norm(r, (width,), gain.double(), offset.double()))
    check("shifted", shifted, r + shift.double())
    assert longer[:, [0, -1]].isnan().all()

    rows, programs = batch * tokens, kernels.programs(batch * tokens)
    x, grad, beside = (t.reshape(rows, width).contiguous() for t in (x, draw(rows, width), added))
    dx = torch.full_like(x, float("nan"))
    partials = torch.zeros(programs, 3, width, device=device)
    kernels.layer_norm_backward(grad, x, gain, 1e-5, partials, out=dx, beside=beside)
    exact = [t.double().requires_grad_() for t in (x, gain, offset)]
    F.layer_norm(exact[0], (width,), *exact[1:]).backward(grad.double())
    check("dx", dx, exact[0].grad + beside.double())
    for name, got, want in zip(
        ("dgain", "doffset", "dbeside"),
        partials.sum(0),
        (exact[1].grad, exact[2].grad, beside.double().sum(0)),
        strict=True,
    ):
        check(name, got, want)

    wide, dh = 3 * draw(rows, width), draw(rows, width)
    after = torch.full_like(wide, float("nan"))
    kernels.gelu(wide, shift, out=after)
    exact_wide = (wide.double() + shift.double()).requires_grad_()
    want = F.gelu(exact_wide)
    want.backward(dh.double())
    check("gelu", after, want.detach())
    after.fill_(float("nan"))
    partials = torch.zeros(programs, width, device=device)
    kernels.gelu_backward(dh, wide, shift, partials, out=after)
    check("gelu again", after, want.detach())
    check("dgelu", dh, exact_wide.grad)
    check("sum of dgelu", partials.sum(0), exact_wide.grad.sum(0))
    return found


def assert_close(found: dict[str, float], dtype: torch.dtype) -> None:
    rounding = {torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    for name, error in found.items():
        assert error < (1e-5 if name.startswith(("dg", "do", "db", "sum")) and name != "dgelu" else rounding), found


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float16), (640, torch.bfloat16), (4096, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (2, 9000)], ids=str)
def test_on_a_gpu(width, shape, dtype):
    assert_close(errors(width, shape, dtype=dtype, device="cuda"), dtype)


@needs_triton
def test_under_the_interpreter(interpreted):
    """The same code on a CPU; in a process of its own, as the interpreter must be asked for early."""
    code = """
import torch
from test_shell_kernels import SHAPES, WIDTHS, assert_close, errors
for width in WIDTHS:
    for shape in SHAPES:
        assert_close(errors(width, shape, dtype=torch.float16, device="cpu"), torch.float16)
print("ok")
"""
    interpreted(code)


@needs_triton
def test_gelu_is_exact(interpreted):
    """To what half precision can tell from the erf of fp64, in the tails as well."""
    code = """
import torch
from longctx.ops import shell_kernels
x = torch.linspace(-30, 30, 40_001)[:, None]
out = torch.empty_like(x)
shell_kernels.gelu(x, torch.zeros(1), out=out)
want = torch.nn.functional.gelu(x.double())
assert (out - want).abs().max() < 1e-6, (out - want).abs().max()
middle = (x.abs() < 4) & (x != 0)
assert ((out - want) / want)[middle].abs().max() < 5e-5
ends = torch.tensor([[float("inf")], [float("nan")], [-200.0]])
shell_kernels.gelu(ends, torch.zeros(1), out=ends)
assert ends[0] == float("inf") and ends[1].isnan() and ends[2] == 0
print("ok")
"""
    interpreted(code)


def product_errors(count, width, wide, *, dtype, device) -> dict[str, float]:
    """Relative error of the product with GELU behind it, and of its backward, against fp64."""
    rows, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((count, width), (wide, width), (wide,)))
    weight = weight / width**0.5
    out, before, alone, dh = (torch.full((count, wide), float("nan"), dtype=dtype, device=device) for _ in range(4))
    kernels.linear_gelu(rows, weight, bias, out=out, before=before)
    kernels.linear_gelu(rows, weight, bias, out=alone)
    product = rows.double() @ weight.double().T
    exact = (product + bias.double()).requires_grad_()
    want = F.gelu(exact)
    grad = torch.randn(count, width, device=device).to(dtype)
    down = weight.t().contiguous()
    total = kernels.linear_gelu_backward(grad, down, before, bias, out=dh)
    want.backward(grad.double() @ down.double())
    pairs = {"out": (out, want), "alone": (alone, want), "before": (before, product), "dh": (dh, exact.grad)}
    pairs["sum"] = (total, exact.grad.sum(0))
    return {name: ((got - right).norm() / right.norm()).item() for name, (got, right) in pairs.items()}


@needs_triton
def test_the_product_under_the_interpreter(interpreted):
    code = """
import torch
from test_shell_kernels import product_errors
found = product_errors(300, 64, 256, dtype=torch.float16, device="cpu")
assert max(found.values()) < 1e-3, found
print("ok")
"""
    interpreted(code)


@pytest.mark.cuda
@needs_triton
def test_the_product_on_a_gpu():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the product is made for compute capability 9.0")
    rows, weight = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((20_001, 512), (2048, 512)))
    assert kernels.product_fits(rows, weight, 2048)
    found = product_errors(20_001, 512, 2048, dtype=torch.bfloat16, device="cuda")
    assert max(found.values()) < 5e-3, found


@needs_triton
def test_chunks_of_a_batch_are_rows_like_any(interpreted):
    """x `[chunks, B, T, D]`, as BLADE has it."""
    code = """
import torch
from longctx.ops import layer_norm as norms
torch.manual_seed(0)
norms.kernels.fits = lambda x: True
x = torch.randn(3, 2, 5, 48).to(torch.bfloat16)
weight, bias = torch.randn(2, 48).to(torch.bfloat16)
for rows in (x, x.transpose(0, 1), x[:, :, 1:]):
    got = norms.layer_norm(rows, weight, bias, 1e-5)
    want = torch.nn.functional.layer_norm(rows, (48,), weight, bias)
    torch.testing.assert_close(got, want, rtol=2 ** -6, atol=2 ** -7)  # two units in the last place
print("ok")
"""
    interpreted(code)


@needs_triton
def test_the_functions_under_the_interpreter(interpreted):
    """What trains and infers with them, from the kernels' side, batches and slabs included."""
    code = """
import torch
from test_feed_forward import call, make, plain
from longctx.ops import feed_forward, layer_norm
layer_norm.kernels.fits = lambda x: x.dtype == torch.float16
feed_forward.CPU_TOKENS = 50
for product in (False, True):
    layer_norm.kernels.product_fits = lambda rows, weight, width: product
    tensors = [t.detach().half().requires_grad_() for t in make(tokens=70, width=64, wide=256)]
    y = call(*tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = plain(*exact)
    assert (y.double() - want).norm() < 1e-3 * want.norm()
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(want, exact, grad.double())
    for got, right in zip(torch.autograd.grad(y, tensors, grad), expected, strict=True):
        assert (got.double() - right).norm() < 4e-3 * right.norm()
print("ok")
"""
    interpreted(code)


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("tokens", [1, 300, 20_000])
def test_gradients_on_a_gpu(tokens):
    shape = {"batch": 1, "tokens": tokens, "width": 512, "wide": 2048}
    tensors = [t.detach().requires_grad_() for t in make(dtype=torch.bfloat16, device="cuda", **shape)]
    with torch.no_grad():
        for matrix in tensors[4:]:
            matrix *= 0.05
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn_like(tensors[0])
    y, want = call(*tensors), plain(*exact)
    assert (y.double() - want).norm() < 5e-3 * want.norm()

    def found(y, tensors):
        return torch.autograd.grad(y, tensors, grad.to(y.dtype))

    expected = found(want, exact)
    for got, other, right in zip(found(y, tensors), found(plain(*tensors), tensors), expected, strict=True):
        assert (got.double() - right).norm() <= 2 * (other.double() - right).norm() + 1e-3 * right.norm()
    one, two = (found(call(*tensors), tensors) for _ in range(2))
    assert all(map(torch.equal, one, two))


@pytest.mark.cuda
@needs_triton
def test_the_norm_on_a_gpu_under_torchs_tools():
    x, gain, offset = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((2, 65, 48), (48,), (48,)))
    tensors = [t.requires_grad_() for t in (x, gain, offset)]
    assert kernels.fits(x)
    torch.library.opcheck(torch.ops.longctx.layer_norm, (*tensors, 1e-5))
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, 1e-5), layer_norm(*tensors, 1e-5))


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("grad", [True, False])
def test_a_block_compiles_without_a_graph_break(grad):
    block = blocks.build("Identity", d_model=48, n_heads=3, device="cuda", dtype=torch.bfloat16)
    assert "Triton" in block.path
    x = torch.randn(2, 65, 48, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x)[0], block(x)[0])


@pytest.mark.cuda
@needs_triton
def test_a_launch_finds_the_variant_that_triton_would():
    """One kernel on rows of other widths, alignments, formats and lengths in turns, again and again."""
    for _ in range(3):
        for width in (1, 16, 48, 50, 512):
            for dtype in (torch.float16, torch.bfloat16):
                for first in (0, 1):
                    x = torch.randn(3 * width + first, device="cuda").to(dtype)[first:].view(3, width)
                    out, bias = torch.empty_like(x), torch.randn(width, device="cuda").to(dtype)
                    kernels.gelu(x, bias, out=out)
                    torch.testing.assert_close(out, F.gelu(x.float() + bias.float()).to(dtype))


@pytest.mark.cuda
@needs_triton
def test_rows_beyond_2_to_the_31_elements():
    rows = (1 << 20) + 5
    hidden = torch.zeros(rows, 2048, device="cuda", dtype=torch.bfloat16)
    hidden[-3:] = 1.0
    kernels.gelu(hidden, torch.zeros(2048, device="cuda"), out=hidden)
    assert hidden[:-3].count_nonzero() == 0
    assert torch.allclose(hidden[-3:].float(), torch.tensor(0.8413, device="cuda"), atol=4e-3)
    kernels.layer_norm(hidden[None, :, :2048], *(torch.ones(2048, device="cuda"),) * 2, 1e-5, out=hidden[None])
    assert (hidden == 1).all()
