"""The fused kernels of BLADE's chain against torch's own, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from longctx import blocks
from longctx.ops.blade_chain import chain

CASES = [
    {},
    {"chunk": 1},
    {"chunk": 63},
    {"chunk": 65},
    {"chunk": 130, "batch": 2},
    {"n_heads": 4, "num_kv_heads": 2, "batch": 2},
    {"n_heads": 4, "num_kv_heads": 1, "state_dim": 5},
    {"d_model": 128, "n_heads": 2, "state_dim": 70, "count": 2},
]


def case(*, device, dtype, count=3, batch=1, chunk=64, d_model=64, n_heads=4, num_kv_heads=None, state_dim=16):
    """(weights of a block, inputs of a chain) with a state that matters and a norm that does something."""
    shape = {"d_model": d_model, "n_heads": n_heads, "num_kv_heads": num_kv_heads, "state_dim": state_dim}
    block = blocks.build("BLADE", **shape, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            # Less of it in wider blocks: half precision has to hold what the chain grows to.
            scale = (0.3 if "state" in name else 0.1) * (64 / d_model) ** 0.5
            parameter.add_(scale * torch.randn_like(parameter))
    weights = block._chain_weights()
    x = torch.randn(count, batch, chunk, d_model, device=device, dtype=dtype) + 1.0
    qkv = torch.randn(count, batch, chunk, weights.qkv.shape[0], device=device, dtype=dtype)
    return weights, (x, qkv, torch.randn(batch, state_dim, device=device))


def exact(weights, x, qkv, s):
    """out, hidden and s of the same chain in fp64: out is what W_down's product with hidden is added to."""
    weights = weights.each(torch.Tensor.double)
    x, qkv, s = (t.double() for t in (x, qkv, s))
    hidden = x.new_empty(x.shape[0], x.shape[1] * x.shape[2], weights.up[0].shape[0])
    s = chain(weights, x, qkv, s, residual=x, hidden=hidden)
    return x + weights.down[1], hidden, s


def fused(module, weights, x, qkv, s):
    from longctx.ops import blade_composed, blade_table

    composed = blade_composed.Composed(weights)
    composed.compose()
    out, s = x.clone(), s.clone()
    hidden = x.new_full((x.shape[0], x.shape[1] * x.shape[2], weights.up[0].shape[0]), float("nan"))
    residual, attended, states = torch.empty_like(x[0]), torch.empty_like(x[0]), torch.empty_like(s)
    rows = module.Rows(
        x=out, out=out, residual=residual, qkv=qkv, hidden=hidden, attended=attended, states=states, lse=s, wide=hidden
    )
    table = blade_table.new_table(x.device)
    blade_table.point(table, rows.entries)
    module.Forward(composed, *x.shape[1:3]).run(table, s, len(x))
    return out, hidden, s


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.cuda
@pytest.mark.parametrize("options", [*CASES, {"d_model": 512, "n_heads": 8, "chunk": 512, "state_dim": 64}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_the_kernels_agree_with_the_definition(options, dtype, tolerance):
    from longctx.ops import blade_composed, blade_kernels

    with torch.inference_mode():
        weights, inputs = case(device="cuda", dtype=dtype, **options)
        assert blade_composed.fits(weights)
        found, again = (fused(blade_kernels, weights, *inputs) for _ in range(2))
        for got, same, want in zip(found, again, exact(weights, *inputs), strict=True):
            assert relative(got, want) < tolerance
            assert torch.equal(got, same)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{"chunk": 130, "batch": 2}, {"d_model": 512, "n_heads": 8, "chunk": 512}], ids=str)
def test_early_launches_change_nothing(options, monkeypatch):
    from longctx.ops import blade_kernels, launch

    with torch.inference_mode():
        weights, inputs = case(device="cuda", dtype=torch.bfloat16, count=40, **options)
        with monkeypatch.context() as late:
            late.setattr(launch, "EARLY", False)
            want = fused(blade_kernels, weights, *inputs)
        for _ in range(5):
            for got, expected in zip(fused(blade_kernels, weights, *inputs), want, strict=True):
                assert relative(got, expected.double()) < 1e-3


def test_the_kernels_under_the_interpreter(interpreted):
    code = """
import torch
from test_blade_kernels import CASES, case, exact, fused, relative
from longctx.ops import blade_kernels
with torch.inference_mode():
    for options in CASES:
        weights, inputs = case(device="cpu", dtype=torch.float16, **options)
        for most in (blade_kernels.MOST_PARTS, 1):
            blade_kernels.MOST_PARTS = most
            for got, want in zip(fused(blade_kernels, weights, *inputs), exact(weights, *inputs)):
                error = relative(got, want)
                assert error < 3e-3, (options, most, error)
print("ok")
"""
    interpreted(code)


def test_a_call_reads_and_writes_rows_where_they_lie_or_through_a_buffer(interpreted):
    code = """
import contextlib
import torch
from longctx import blocks
from longctx.blocks.blade import reference
from longctx.ops import blade_composed
from longctx.ops.blade_graph import Prepared
from test_blade_kernels import relative
torch.cuda.device = lambda device: contextlib.nullcontext()
shape = {"d_model": 64, "n_heads": 4, "num_kv_heads": 2, "chunk_size": 32, "state_dim": 16}
block = blocks.build("BLADE", **shape, dtype=torch.float16).eval()
weights = block._chain_weights()
with torch.inference_mode():
    composed = blade_composed.Composed(weights)
    composed.compose()
    calls = Prepared(graphs=None, weights=weights, key=(), captured=True, composed=composed)
    for batch in (1, 3):
        x = torch.randn(batch, 160, 64, dtype=torch.float16)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
        want, end = reference(block.double(), x.double())
        block.half()
        for given in (x.clone(), shifted):
            y = torch.full_like(x, float("nan"))
            slabs = [
                tuple(t[:, span].unflatten(1, (-1, 32)).transpose(0, 1) for t in (given, y))
                for span in (slice(0, 96), slice(96, 160))
            ]
            s = calls.run(slabs, torch.zeros(batch, 16), block._project)
            assert relative(y, want) < 3e-3, (batch, relative(y, want))
            assert relative(s, end) < 3e-3
            assert torch.equal(given, x)
print("ok")
"""
    interpreted(code)
