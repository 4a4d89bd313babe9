"""The fused kernel of window attention against the dense mask, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_window_attention import dense

from longctx.ops.window_attention import kernel, window_attention

CASES = [
    {"queries": 1, "keys": 1},
    {"queries": 2, "keys": 2},
    {"queries": 63, "keys": 63},
    {"queries": 64, "keys": 64},
    {"queries": 65, "keys": 65},
    {"queries": 200, "keys": 200},
    {"queries": 5, "keys": 200},
    {"queries": 130, "keys": 327},
    {"queries": 300, "keys": 300, "window": 1},
    {"queries": 300, "keys": 300, "window": 64},
    {"queries": 300, "keys": 300, "window": 65},
    {"queries": 300, "keys": 300, "window": 1000},
    {"queries": 300, "keys": 300, "dilation": 3},
    {"queries": 120, "keys": 301, "dilation": 2},
    {"queries": 300, "keys": 300, "count": 1, "key_offset": 1},
    {"queries": 300, "keys": 300, "count": 70, "key_offset": 70},
    {"queries": 300, "keys": 300, "count": 5, "key_offset": 0},
    {"queries": 40, "keys": 140, "count": 3, "key_offset": 900},
    {"queries": 200, "keys": 200, "causal": False},
    {"queries": 200, "keys": 200, "causal": False, "window": 2},
    {"queries": 200, "keys": 200, "causal": False, "count": 3, "key_offset": 3, "window": 150},
]


def case(*, device, dtype, queries, keys, width, count=0, groups=2, window=100, **how):
    """(inputs, the same in fp64 on a CPU, keywords): all but the globals strided views, as a projection gives them."""
    batch, heads = 2, 4
    rows = torch.randn(batch, keys, (heads + 2 * groups) * width).to(dtype)
    far = torch.randn(2, batch, count, groups, width).to(dtype)
    parts = rows.split([heads * width, groups * width, groups * width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
    inputs = [q[:, keys - queries :], k, v, *(far.unbind() if count else ())]
    return [x.to(device) for x in inputs], [x.double() for x in inputs], {"window": window, **how}


def named(inputs):
    return dict(zip(("global_k", "global_v"), inputs[3:], strict=False))


@pytest.mark.cuda
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float16, 32), (torch.bfloat16, 128)])
def test_the_kernel_agrees_with_the_definition(options, dtype, width):
    inputs, exact, how = case(device="cuda", dtype=dtype, width=width, **options)
    assert kernel.fits(*inputs[:3])
    out = window_attention(*inputs[:3], **how, **named(inputs))
    expected = dense(*exact[:3], **how, **named(exact))
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (out.double().cpu() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(out, window_attention(*inputs[:3], **how, **named(inputs)))


@pytest.mark.cuda
def test_gradients_and_dropout_do_without_the_kernel():
    (q, k, v), _, how = case(device="cuda", dtype=torch.bfloat16, width=64, queries=200, keys=200)
    q.requires_grad_()
    assert window_attention(q, k, v, **how).requires_grad
    with torch.no_grad():
        dropped = window_attention(q, k, v, **how, dropout_p=0.5)
        assert not torch.equal(dropped, window_attention(q, k, v, **how))


def test_the_kernel_under_the_interpreter():
    """The same code on a CPU, where Triton is installed at all; in a process of its own, as it must be told early."""
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernel on a CPU, is not installed")
    code = """
import torch
from test_window_attention_kernel import CASES, case, dense, named
from longctx.ops import window_attention as module
module.kernel.fits = lambda *tensors: True
for options in CASES:
    inputs, exact, how = case(device="cpu", dtype=torch.float16, width=16, **options)
    out = module.window_attention(*inputs[:3], **how, **named(inputs))
    expected = dense(*exact[:3], **how, **named(exact))
    error = ((out - expected).norm() / expected.norm()).item()
    assert error < 2e-3, (options, error)
print("ok")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr[-2000:]
