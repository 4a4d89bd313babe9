"""The Triton kernels of list attention against gathered lists, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_window_attention_kernel import errors

from longctx.ops.block_plan import BlockPattern, draw_random_blocks, transposed_plan, visible_blocks
from longctx.ops.block_sparse_attention import (
    BlockSparse,
    block_sparse_attention,
    kernel,
    packed_block_sparse_attention,
)

CAUSAL = BlockPattern(block_size=64, num_window_blocks=3, num_random_blocks=3, num_global_blocks=2, causal=True)

KERNEL_CASES = [
    {},
    {"groups": 4},
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
# Few, and of small blocks, as the interpreter is slow.
INTERPRETED = [
    {"length": 120},
    {"length": 85, "start": 40, "groups": 1},
    {"length": 80, "num_random_blocks": 0, "num_window_blocks": 1},
    {"length": 70, "num_global_blocks": 0, "batch": 2},
    {"length": 17},
    {"length": 5},
]


def kernel_case(*, device, dtype, start=0, length=1500, width=64, groups=2, heads=4, batch=2, **pattern):
    """(q, k, v, sparse) at the end of a longer buffer, q a strided view as a projection gives it."""
    pattern = dataclasses.replace(CAUSAL, **pattern)
    length = max(length, start + 1)
    n_blocks = pattern.count(length)
    rows = torch.randn(batch, length - start, heads * width + 5).to(dtype)
    q = rows[..., 5:].unflatten(-1, (heads, width))
    k, v = torch.randn(2, batch, groups, (n_blocks + 2) * pattern.block_size, width).to(dtype)
    plan = draw_random_blocks(pattern, seed=3, n_heads=heads, n_blocks=n_blocks + 1)
    plan[:, 5:9, :1] = -1  # a plan that a user gave may have holes
    sparse = BlockSparse(pattern=pattern, plan=plan, complete=range(0), start=start, length=length)
    there = dataclasses.replace(sparse, plan=plan.to(device))
    exact = [x.double() for x in (q, k, v)]
    for x, y in zip(exact[1:], (k, v), strict=True):
        x[:, :, length:] = 0.0
        y[:, :, length:] = float("nan")  # which the kernels may not even hide behind a weight of zero
    return (*exact, sparse), (*(x.to(device) for x in (q, k, v)), there)


@pytest.mark.skipif(kernel is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("size", "width", "fits"), [(64, 64, True), (64, 128, True), (128, 64, True), (128, 128, False)]
)
def test_a_card_of_little_shared_memory_leaves_large_blocks_of_wide_heads_to_torch(size, width, fits, monkeypatch):
    def seen(shape):
        return SimpleNamespace(
            is_cuda=True,
            device=None,
            dtype=torch.bfloat16,
            shape=shape,
            stride=lambda axis: (1 << 20, width, width, 1)[axis],
        )

    sparse = SimpleNamespace(pattern=dataclasses.replace(CAUSAL, block_size=size))
    tensors = [seen((1, size, 1, width))] * 3
    monkeypatch.setattr(kernel, "capability", lambda device: (8, 9))
    monkeypatch.setattr(kernel, "shared_memory", lambda device: 99 << 10)
    assert kernel.fits(*tensors, sparse) == fits
    monkeypatch.setattr(kernel, "shared_memory", lambda device: 227 << 10)
    assert kernel.fits(*tensors, sparse)


def visible_keys(sparse):
    """Which keys each query sees: bool `[H, t, length]`."""
    pattern, size = sparse.pattern, sparse.pattern.block_size
    lists = visible_blocks(pattern, sparse.plan, 0, sparse.n_blocks, sparse.n_blocks)
    seen = torch.zeros(*lists.shape[:2], sparse.n_blocks + 1, dtype=torch.bool, device=lists.device)
    seen.scatter_(2, lists % (sparse.n_blocks + 1), True)
    seen = seen[..., :-1].repeat_interleave(size, 1).repeat_interleave(size, 2)
    return seen[:, : sparse.length, : sparse.length].tril()[:, sparse.start :]


def masked_sdpa(q, k, v, sparse):
    """torch's attention under a mask that is written out: what the kernels' errors are held against."""
    k, v = (x[:, :, : sparse.length].repeat_interleave(q.shape[2] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible_keys(sparse)).transpose(1, 2)


def results(attend, inputs, upstream):
    """(out, gradients of q, k, v) in fp64 on the CPU."""
    *tensors, sparse = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors, sparse)
    grads = torch.autograd.grad(out, tensors, upstream.to(out))
    return [x.detach().double().cpu() for x in (out, *grads)]


def operands(q, k, v, sparse, dropout, seed):
    """What the operator takes: keys by token, the plan both ways, numbers."""
    pattern = sparse.pattern
    numbers = (pattern.num_global_blocks, pattern.num_window_blocks, pattern.block_size, sparse.start, sparse.length)
    plans = (sparse.plan, *transposed_plan(sparse.plan, sparse.n_blocks))
    return q, k.transpose(1, 2), v.transpose(1, 2), *plans, *numbers, dropout, seed


def check_dropout(device, dtype, tolerance):
    """Output and gradients are those of the dense definition under the draw that the weights show."""
    op = torch.ops.longctx.list_attention.default
    size = {"length": 87, "start": 7, "block_size": 16, "batch": 1, "heads": 2, "groups": 1}
    (q, k, v, sparse), narrow = kernel_case(device=device, dtype=dtype, width=16, **size)
    seed, columns, wide = torch.tensor([1 << 40], device=device), k.shape[2], k.shape[3]
    units = torch.eye(columns, dtype=dtype, device=device).unflatten(1, (-1, wide)).transpose(0, 1)
    units = [u.expand_as(narrow[2]) for u in units]
    drawn = [op(*operands(*narrow[:2], u, narrow[3], 0.4, seed))[0] for u in units]
    drawn = torch.cat(drawn, dim=-1).transpose(1, 2)[..., : sparse.length].double().cpu()
    inputs = [x.detach().requires_grad_() for x in narrow[:3]]
    exact = [x.requires_grad_() for x in (q, k, v)]
    seen = visible_keys(sparse)
    keys, values = (x[:, :, : sparse.length].repeat_interleave(2, dim=1) for x in exact[1:])
    scores = (torch.einsum("bthk,bhsk->bhts", q, keys) / 4).masked_fill(~seen, float("-inf"))
    dropped = scores.softmax(-1) * (drawn != 0) / 0.6
    assert (dropped - drawn).abs().max() < tolerance
    share = (drawn[:, seen] == 0).double().mean().item()
    assert abs(share - 0.4) < 0.03, share
    out, sums = op(*operands(*inputs, narrow[3], 0.4, seed))
    torch.testing.assert_close(sums.double().cpu(), scores.logsumexp(-1).detach(), atol=1e-2, rtol=0)
    expected = torch.einsum("bhts,bhsk->bthk", dropped, values)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(out, inputs, upstream.to(out))
    wanted = torch.autograd.grad(expected, exact, upstream)
    found = [x.detach().double().cpu() for x in (out, *found)]
    assert max(errors(found, [expected.detach(), *wanted])) < tolerance


def check_packed(device, dtype, tolerance, **options):
    """A projection in one tensor: the same, and its gradient is that of its parts."""
    exact, (q, k, v, sparse) = kernel_case(device=device, dtype=dtype, **options)
    near = [q, *(x.transpose(1, 2)[:, : sparse.length] for x in (k, v))]
    upstream = torch.randn_like(q)
    expected = results(block_sparse_attention, exact, upstream)
    qkv = torch.cat(near, dim=2).requires_grad_()
    out = packed_block_sparse_attention(qkv, q.shape[2], sparse)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    parts = grad.split([x.shape[2] for x in near], dim=2)
    expected[2:] = (x.transpose(1, 2)[:, : sparse.length] for x in expected[2:])
    found = errors([x.detach().double().cpu() for x in (out, *parts)], expected)
    assert max(found) < tolerance, found


def check_operator(device, dtype):
    """What autograd, compilation and functional transforms ask of an operator."""
    _, (*tensors, sparse) = kernel_case(
        device=device, dtype=dtype, width=16, length=40, block_size=16, batch=1, heads=2, groups=1
    )
    tensors = [x.detach().requires_grad_() for x in tensors]
    arguments = operands(*tensors, sparse, 0.25, torch.tensor([7], device=device))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.longctx.list_attention.default, arguments, test_utils=tests)
    near = [tensors[0], *(x.transpose(1, 2)[:, : sparse.length] for x in tensors[1:])]
    qkv = torch.cat([x.detach() for x in near], dim=2).requires_grad_()
    arguments = (qkv, *arguments[3:6], 2, *arguments[6:9], *arguments[11:])
    torch.library.opcheck(torch.ops.longctx.packed_list_attention.default, arguments, test_utils=tests)


@pytest.mark.cuda
@pytest.mark.parametrize("options", KERNEL_CASES, ids=str)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float16, 32), (torch.bfloat16, 128)])
def test_errors_are_at_most_twice_those_of_sdpa(options, dtype, width):
    exact, (q, k, v, sparse) = kernel_case(device="cuda", dtype=dtype, width=width, **options)
    assert kernel.fits(q, k, v, sparse)
    upstream = torch.randn_like(exact[0]).to(dtype)
    found = results(block_sparse_attention, (q, k, v, sparse), upstream)
    wanted = results(block_sparse_attention, exact, upstream)
    others = errors(results(masked_sdpa, (q, k, v, sparse), upstream), wanted)
    small = {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    for ours, theirs in zip(errors(found, wanted), others, strict=True):
        assert ours <= 2 * theirs + small, (ours, theirs)
    for once, again in zip(found, results(block_sparse_attention, (q, k, v, sparse), upstream), strict=True):
        assert torch.equal(once, again)
    with torch.no_grad():
        assert torch.equal(block_sparse_attention(q, k, v, sparse).double().cpu(), found[0])


@pytest.mark.cuda
def test_views_of_a_projection_serve_as_well():
    _, (q, k, v, sparse) = kernel_case(device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn_like(q)
    expected = results(block_sparse_attention, (q, k, v, sparse), upstream)
    rows = torch.stack([k, v], dim=2)[:, :, :, : sparse.length].permute(0, 3, 2, 1, 4).contiguous()
    k, v = (x.transpose(1, 2) for x in rows.unbind(2))
    out, *grads = results(block_sparse_attention, (q, k, v, sparse), upstream)
    for found, wanted in zip((out, *grads), expected, strict=True):
        assert torch.equal(found, wanted[:, :, : sparse.length] if wanted.shape != found.shape else wanted)


@pytest.mark.cuda
def test_a_whole_projection():
    check_packed("cuda", torch.bfloat16, 1e-2)


@pytest.mark.cuda
def test_dropout_is_drawn_again_by_the_backward_pass():
    check_dropout("cuda", torch.bfloat16, 1.5e-2)


@pytest.mark.cuda
def test_the_operator_is_what_torch_asks_for():
    check_operator("cuda", torch.bfloat16)


@pytest.mark.cuda
def test_compiled_without_a_graph_break():
    _, (*tensors, sparse) = kernel_case(device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn_like(tensors[0])
    eager = results(block_sparse_attention, (*tensors, sparse), upstream)
    compiled = results(torch.compile(block_sparse_attention, fullgraph=True), (*tensors, sparse), upstream)
    torch.testing.assert_close(compiled, eager)


def test_the_kernels_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    interpreted()


def _interpreted():
    torch.set_num_threads(1)
    for options in INTERPRETED:
        options = {"heads": 2, "batch": 1, **options}
        exact, narrow = kernel_case(device="cpu", dtype=torch.float32, width=16, block_size=16, **options)
        upstream = torch.randn_like(exact[0])
        wanted = results(block_sparse_attention, exact, upstream)
        found = results(kernel.list_attention, narrow, upstream)
        assert max(errors(found, wanted)) < 1e-5, (options, errors(found, wanted))
    check_packed("cpu", torch.float32, 1e-5, width=16, block_size=16, length=70, batch=1, heads=2, groups=1)
    check_dropout("cpu", torch.float32, 1e-5)
    check_operator("cpu", torch.float32)
    print("ok")


if __name__ == "__main__":
    _interpreted()
