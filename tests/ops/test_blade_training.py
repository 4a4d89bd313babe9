"""Whole chunks of BLADE with gradients: against finite differences, in any slabs, as an operator torch knows."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.utils.checkpoint

from longctx import blocks
from longctx.blocks.blade import reference
from longctx.ops import blade_training, blade_training_graph, blade_training_layout, chunk_attention_gradients
from longctx.ops.blade_training import whole_chunks
from longctx.ops.blade_training_graph import TrainingGraphs


def make(*, device=None, dtype=torch.float64, d_model=12, n_heads=4, chunk_size=4, state_dim=5, **options):
    shape = {"d_model": d_model, "n_heads": n_heads, "chunk_size": chunk_size, "state_dim": state_dim}
    block = blocks.build("BLADE", **shape, device=device, dtype=dtype, **options)
    # Products of wide blocks would leave the range of fp16.
    scale = min(1.0, (64 / d_model) ** 0.5)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_((0.4 if "state" in name else 0.1) * scale * torch.randn_like(parameter))
    return block


def norm_of(block):
    return block.attn_norm.weight, block.attn_norm.bias, block.attn_norm.eps


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "num_global_tokens": 3}], ids=["plain", "globals"])
def test_gradients_against_finite_differences(options, monkeypatch):
    monkeypatch.setattr(blade_training_layout, "CPU_SLAB_TOKENS", 8)
    monkeypatch.setattr(chunk_attention_gradients, "ATTENTION_ROWS", 3)
    block = make(**options)
    names, values = zip(*block.named_parameters(), strict=True)
    x, s = torch.randn(2, 12, 12).double().requires_grad_(), torch.randn(2, 5).double().requires_grad_()

    def run(x, s, *values):
        with torch.nn.utils.stateless._reparametrize_module(block, dict(zip(names, values, strict=True))):
            return whole_chunks(x, s, norm_of(block), block._chain_weights(), block.chunk_size, TrainingGraphs())

    assert torch.autograd.gradcheck(run, (x, s, *values), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("slab", [1, 16, 1000])
def test_slabs_make_no_difference(slab, monkeypatch):
    block, x = make(num_global_tokens=2), torch.randn(2, 40, 12).double().requires_grad_()
    weights = torch.randn(2, 40, 12).double()

    def gradients():
        y, _ = block(x)
        return [y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])]

    want = gradients()
    monkeypatch.setattr(blade_training_layout, "CPU_SLAB_TOKENS", slab)
    monkeypatch.setattr(chunk_attention_gradients, "ATTENTION_ROWS", 3)
    for got, expected in zip(gradients(), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_only_the_state_is_asked_for():
    block, x = make(), torch.randn(1, 8, 12).double().requires_grad_()
    _, state = block(x)
    (got,) = torch.autograd.grad(state.s.sum(), x)
    (want,) = torch.autograd.grad(reference(block, x)[1].sum(), x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    y, _ = block(x.detach(), block.init_state(1))
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_there_is_no_second_derivative():
    block, x = make(), torch.randn(1, 8, 12).double().requires_grad_()
    (grad,) = torch.autograd.grad(block(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"num_global_tokens": 3}], ids=["plain", "globals"])
def test_opcheck(options):
    block = make(dtype=torch.float32, **options)
    x, s = torch.randn(2, 8, 12, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    weights = block._chain_weights()
    parameters = [*norm_of(block)[:2], *weights.inject, weights.qkv, *weights.out, *weights.norm[:2], *weights.up]
    parameters += [*weights.down, *weights.state, *([] if weights.global_tokens is None else [weights.global_tokens])]
    arguments = (x, s, parameters, 4, 4, 4, 1e-5, 1e-5, 0)
    torch.library.opcheck(torch.ops.longctx.blade_chunks, arguments)
    with torch.no_grad():
        _, _, *kept = torch.ops.longctx.blade_chunks(*arguments)
        parameters = [p.detach() for p in parameters]
        arguments = (x.detach(), s.detach(), x.detach(), parameters, kept, 4, 4, 4, 1e-5, 1e-5, 0)
        torch.library.opcheck(torch.ops.longctx.blade_chunks_backward, arguments)


def gradients(block, x, run):
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    x = x.detach().requires_grad_()
    grads = torch.autograd.grad((run(block, x)[0] * weights).sum(), [x, *block.parameters()])
    return dict(zip(["x", *(name for name, _ in block.named_parameters())], grads, strict=True))


def worst(found, wanted):
    """The largest relative error of a gradient, those left out that are nothing beside the others."""
    scale = max(grad.norm() for grad in wanted.values())
    errors = {
        name: ((found[name].double() - grad).norm() / grad.norm()).item()
        for name, grad in wanted.items()
        if grad.norm() > 1e-4 * scale
    }
    return max(errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    block = make(dtype=dtype, d_model=64, n_heads=4, chunk_size=32, state_dim=16)
    x = torch.randn(2, 96, 64).to(dtype)
    error, errors = worst(
        gradients(block, x, lambda block, x: block(x)), gradients(copy.deepcopy(block).double(), x.double(), reference)
    )
    assert error < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype], errors


# -- the fused kernels ---------------------------------------------------------------------------------------

FUSED = [
    {},
    {"chunk_size": 1, "batch": 2},
    {"chunk_size": 65},
    {"chunk_size": 40, "batch": 2, "num_kv_heads": 2},
    {"chunk_size": 100},
    {"chunk_size": 30, "d_model": 128, "n_heads": 2, "state_dim": 70, "num_kv_heads": 1},
]


def fused_case(*, device, dtype, batch=1, **options):
    """(block, x) of three chunks and a bit."""
    shape = {"d_model": 64, "n_heads": 4, "chunk_size": 64, "state_dim": 16, **options}
    block = make(device=device, dtype=dtype, **shape)
    with torch.no_grad():
        # A recurrence that amplifies leaves the range of fp16.
        block.state_proj.weight.mul_(20.0 / shape["d_model"])
    return block, torch.randn(batch, 3 * block.chunk_size + 1, shape["d_model"], device=device, dtype=dtype)


def fused_error(block, x):
    want = gradients(copy.deepcopy(block).double(), x.double(), reference)
    return worst(gradients(block, x, lambda block, x: block(x)), want)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [*FUSED, {"d_model": 512, "n_heads": 8, "chunk_size": 512}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_fused_training(options, dtype, tolerance):
    block, x = fused_case(device="cuda", dtype=dtype, **options)
    error, errors = fused_error(block, x)
    assert error < tolerance, errors
    assert block._training_graphs.chains, "the fused kernels did not run"


@pytest.mark.cuda
def test_training_graphs_go_with_the_block():
    gc.collect()
    block, x = fused_case(device="cuda", dtype=torch.bfloat16)
    twin = copy.deepcopy(block)
    for each in (block, twin):
        each(x)[0].sum().backward()
    assert len(blade_training_graph._shared) == 1
    assert torch.equal(block.ffn_up.weight.grad, twin.ffn_up.weight.grad)
    del block, twin, each
    gc.collect()
    assert not blade_training_graph._shared


@pytest.mark.cuda
def test_the_fused_kernels_in_a_graph_of_the_caller(monkeypatch):
    """A whole step, in slabs on two streams, replayed over other values and weights than it was captured with."""
    monkeypatch.setattr(blade_training_layout, "GPU_SLAB_TOKENS", 128)
    monkeypatch.setattr(blade_training, "kept_chain", None)
    block, _ = fused_case(device="cuda", dtype=torch.bfloat16)
    x, target = (torch.randn(1, 7 * 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs = [torch.zeros_like(x).requires_grad_(), *block.parameters()]

    def step():
        return torch.autograd.grad((block(inputs[0], keep_state=False)[0] * target).sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        inputs[0].copy_(x)
        block.ffn_up.weight.mul_(1.3)
    for _ in range(2):
        # Steps outside of it between replays, with memory and graphs of their own.
        wanted = step()
        graph.replay()
        for got, want in zip(found, wanted, strict=True):
            # Products may be split in other ways beside a capture.
            assert (got - want).norm() <= 1e-2 * want.norm()


def test_fused_training_under_the_interpreter(interpreted):
    code = """
import torch
from longctx.ops import blade_backward_kernels, blade_kernels, blade_training_graph, blade_training_layout
from test_blade_training import FUSED, fused_case, fused_error
blade_training_graph.kernels_fit = lambda weights: True
for index, options in enumerate(FUSED):
    several = 2 * options.get("chunk_size", 64) * options.get("batch", 1)
    blade_training_layout.CPU_SLAB_TOKENS, most = ((1000, 256), (several, 1))[index % 2]
    blade_kernels.MOST_PARTS = blade_backward_kernels.MOST_PARTS = most
    torch.manual_seed(0)
    block, x = fused_case(device="cpu", dtype=torch.float16, **options)
    error, errors = fused_error(block, x)
    assert block._training_graphs.chains
    assert error < 1e-2, (options, errors)
print("ok")
"""
    interpreted(code)
