"""DPASSM's mixer as one function against its parts, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch

from longctx import blocks
from longctx.blocks import dpassm
from longctx.blocks.dpassm import DPASSMState

dual = dpassm.dual
# Tokens, keys carried on, batch, key-value heads.
CASES = [(1, 0, 1, 4), (70, 0, 2, 2), (33, 15, 1, 4), (20, 7, 2, 1), (5, 15, 2, 4)]


def run(block, u, kv, s, upstream):
    """[mixed, s, last keys and values] and the gradients of u, what is carried on and the mixer's weights, in fp64."""
    kind = block.qkv_proj.weight.dtype
    carried = [t.detach().to(kind if t is kv else torch.promote_types(kind, torch.float32)) for t in (kv, s)]
    inputs = [u.detach().to(kind), *carried]
    for t in inputs:
        t.requires_grad_()
    mixed, state = block.mix(inputs[0], DPASSMState(kv=inputs[1], s=inputs[2]), True)
    found = [mixed, state.s, state.kv]
    inputs += block._mixer_weights
    above = [g.to(t) for g, t in zip(upstream, found, strict=True)]
    grads = torch.autograd.grad(found, inputs, above, allow_unused=True, materialize_grads=True)
    return [t.detach().double().cpu() for t in (*found, *grads)]


def check(tokens, halo, batch, groups, *, device, dtype, width, tolerance):
    torch.manual_seed(0)
    block = blocks.build("DPASSM", d_model=4 * width, n_heads=4, num_kv_heads=groups, window_size=16, state_dim=8)
    block = block.to(device, dtype)
    torch.nn.init.uniform_(block.ssm_decay, -1.5, 1.5)
    exact = copy.deepcopy(block).double().cpu()
    u = torch.randn(batch, tokens, 4 * width).to(device, dtype)
    kv = torch.randn(batch, halo, 2 * groups * width).to(device, dtype)
    s = torch.randn(batch, 8).to(device)
    kept = min(tokens + halo, 15)
    upstream = [
        torch.randn(batch, *shape).to(device, dtype) for shape in ((tokens, 4 * width), (8,), (kept, kv.shape[2]))
    ]
    wanted = run(exact, u.cpu(), kv.cpu(), s.cpu(), [t.cpu() for t in upstream])
    found = run(block, u, kv, s, upstream)
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        # A gradient that is zero by nature is measured by what it is summed up from.
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-2 * wanted[0].norm())
        assert error < tolerance, (tokens, halo, batch, groups, index, error)
    return block, u, kv, s


def check_all(device, dtype, width, tolerance):
    called, plain = [], dual.dual_path
    dual.dual_path = lambda *arguments, **how: (called.append(how), plain(*arguments, **how))[1]
    try:
        for case in CASES:
            check(*case, device=device, dtype=dtype, width=width, tolerance=tolerance)
        assert [how["kv"] is None for how in called] == [case[1] == 0 for case in CASES]
    finally:
        dual.dual_path = plain
    check_dropout(*check(*CASES[2], device=device, dtype=dtype, width=width, tolerance=tolerance))
    check_operator(*check(*CASES[3], device=device, dtype=dtype, width=width, tolerance=tolerance))


def check_dropout(block, u, kv, s):
    """The same draw as in the parts, by seed."""
    block.dropout = 0.3
    upstream = [torch.randn_like(u), torch.randn_like(s), torch.randn_like(kv)]
    fits, results = dual.fits, []
    for used in (True, False):
        dual.fits = lambda *_, used=used: used
        torch.manual_seed(5)
        results.append(run(block, u, kv, s, upstream))
    dual.fits = fits
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm() + 1e-3
    assert not torch.allclose(results[0][0], run(block, u, kv, s, upstream)[0], rtol=1e-3)


def check_operator(block, u, kv, s):
    """What autograd, compilation and functional transforms ask of an operator."""
    weights = [t.detach().requires_grad_() for t in block._mixer_weights]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    u, kv, s = (t.detach().requires_grad_() for t in (u, kv, s))
    op = torch.ops.longctx.dual_path.default
    seed = torch.tensor([3], device=u.device)
    torch.library.opcheck(op, (u, kv, s, *weights, 4, 16, 0.25, seed, True), test_utils=tests)
    torch.library.opcheck(op, (u, None, None, *weights, 4, 16, 0.0, None, False), test_utils=tests)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_agrees_with_its_parts(dtype):
    check_all("cuda", dtype, 64, 3e-2)


def test_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    interpreted()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dual.fits = dual.window_kernel.fits = lambda x, *_: x.dtype == torch.float32
    check_all("cpu", torch.float32, 16, 1e-5)
    print("ok")
