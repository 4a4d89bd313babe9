"""The fused kernel of list attention against gathered lists, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longctx.ops.block_plan import BlockPattern, draw_random_blocks
from longctx.ops.block_sparse_attention import BlockSparse, block_sparse_attention, kernel

CAUSAL = BlockPattern(block_size=64, num_window_blocks=3, num_random_blocks=3, num_global_blocks=2, causal=True)

KERNEL_CASES = [
    {},
    {"start": 1},
    {"start": 100},
    {"start": 128},
    {"start": 1499},
    {"num_random_blocks": 0},
    {"num_global_blocks": 0},
    {"num_window_blocks": 1},
    {"num_global_blocks": 5},
    {"block_size": 32},
    {"block_size": 16},
    {"length": 1},
    {"length": 63},
    {"length": 64},
    {"length": 65},
]


def kernel_case(*, device, dtype, start=0, length=1500, width=64, groups=2, **pattern):
    """(q, k, v, sparse) at the end of a longer buffer, q a strided view as a projection gives it."""
    pattern = dataclasses.replace(CAUSAL, **pattern)
    length = max(length, start + 1)
    n_blocks, heads, batch = pattern.count(length), 4, 2
    rows = torch.randn(batch, length - start, heads * width + 5, dtype=torch.float64)
    q = rows[..., 5:].unflatten(-1, (heads, width))
    k, v = torch.randn(2, batch, groups, (n_blocks + 2) * pattern.block_size, width, dtype=torch.float64)
    plan = draw_random_blocks(pattern, seed=3, n_heads=heads, n_blocks=n_blocks + 1)
    plan[:, 5:9, :1] = -1  # a plan that a user gave may have holes
    sparse = BlockSparse(pattern=pattern, plan=plan, complete=range(0), start=start, length=length)
    for x in (k, v):
        x[:, :, length:] = 0.0
    there = dataclasses.replace(sparse, plan=plan.to(device))
    return (q, k, v, sparse), (*(x.to(device, dtype) for x in (q, k, v)), there)


@pytest.mark.cuda
@pytest.mark.parametrize("options", KERNEL_CASES, ids=str)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float16, 32), (torch.bfloat16, 128)])
def test_the_kernel_agrees_with_gathered_lists(options, dtype, width):
    exact, (q, k, v, sparse) = kernel_case(device="cuda", dtype=dtype, width=width, **options)
    assert kernel.fits(q, sparse)
    out = block_sparse_attention(q, k, v, sparse)
    expected = block_sparse_attention(*exact)
    assert out.shape == expected.shape and out.is_contiguous()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (out.cpu() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(out, block_sparse_attention(q, k, v, sparse))


@pytest.mark.cuda
def test_gradients_and_dropout_do_without_the_kernel():
    _, (q, k, v, sparse) = kernel_case(device="cuda", dtype=torch.bfloat16)
    q.requires_grad_()
    assert block_sparse_attention(q, k, v, sparse).requires_grad
    with torch.no_grad():
        dropped = block_sparse_attention(q, k, v, sparse, dropout=0.5)
        assert not torch.equal(dropped, block_sparse_attention(q, k, v, sparse))


def test_the_kernel_under_the_interpreter():
    """The same code on a CPU, where Triton is installed at all; in a process of its own, as it must be told early."""
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernel on a CPU, is not installed")
    code = """
import torch
from test_list_attention_kernel import KERNEL_CASES, kernel_case
from longctx.ops.block_sparse_attention import block_sparse_attention
from longctx.ops.list_attention_kernel import list_attention
for options in KERNEL_CASES:
    options = {"length": 300, **options, **({"start": 290} if options.get("start", 0) > 300 else {})}
    exact, narrow = kernel_case(device="cpu", dtype=torch.float16, width=16, **options)
    out, expected = list_attention(*narrow), block_sparse_attention(*exact)
    error = ((out - expected).norm() / expected.norm()).item()
    assert error < 2e-3, (options, error)
print("ok")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr[-2000:]
