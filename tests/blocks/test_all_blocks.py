"""What every block promises, for every block there is: a new file in `blocks/` needs no edit here.

Values, what is refused, memory, global state; test_all_streams.py and test_all_gradients.py have the rest.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from every_block import NAMES, OTHER, SMALL, WITH_CAUSAL, LargestTensor, every_block, make, reference, relative, tokens

from longctx import blocks
from longctx.blocks import _shell
from longctx.errors import LongctxError

# -- values --------------------------------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("length", [1, 63, 257])
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
def test_agrees_with_the_reference(name, length, options):
    block = make(name, options)
    x = tokens(length)
    want = reference(block, x)
    with_grad, _ = block(x)
    assert with_grad.shape == x.shape and with_grad.dtype == x.dtype
    assert relative(with_grad, want) < 1e-9
    with torch.no_grad():
        assert relative(block(x)[0], want) < 1e-9


@every_block
def test_a_window_longer_than_the_sequence(name):
    block = make(name, {})
    x = tokens(40)
    assert relative(block(x)[0], reference(block, x)) < 1e-9


@every_block
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_query_attention(name, num_kv_heads):
    block = make(name, num_kv_heads=num_kv_heads)
    x = tokens(63)
    want = reference(block, x)
    assert relative(block(x)[0], want) < 1e-9
    with torch.no_grad():
        assert relative(block(x)[0], want) < 1e-9


@every_block
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_other_dtypes_are_finite_and_close(name, dtype):
    spec = blocks.load(name)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    block, x = make(name, dtype=torch_dtype), tokens(130, dtype=torch_dtype)
    want = reference(block, x)
    y, _ = block(x)
    with torch.no_grad():
        fast, _ = block(x)
        stepped, _ = block.step(x[:, :1], block(x[:, :16])[1])
    for out in (y, fast, stepped):
        assert out.dtype == torch_dtype and out.isfinite().all()
    assert relative(y, want) < spec.tolerances[dtype]
    assert relative(fast, want) < spec.tolerances[dtype]
    y.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


@every_block
def test_autocast(name):
    block, x = make(name, dtype=torch.float32), tokens(63, dtype=torch.float32)
    want = reference(block, x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            y, _ = block(x)
        assert y.isfinite().all() and relative(y, want) < 2e-2


@every_block
def test_the_slabs_of_inference_make_no_difference(name, monkeypatch):
    block = make(name, OTHER)
    for batch, length, slab in ((1, 257, 24), (3, 63, 21), (2, 130, 1)):
        monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", slab)
        x = tokens(length, batch=batch)
        whole, _ = block(x)
        with torch.no_grad():
            assert relative(block(x)[0], whole) < 1e-12
            assert relative(block(x, keep_state=False)[0], whole) < 1e-12


@every_block
def test_no_unwritten_memory_is_read(name, poisoned_memory, monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 48)
    block, x = make(name), tokens(101)
    want = reference(block, x)
    with torch.no_grad():
        y, state = block(x[:, :90])
        rest = [y]
        for t in range(90, 101):
            y, state = block.step(x[:, t : t + 1], state)
            rest.append(y)
    assert relative(torch.cat(rest, 1), want) < 1e-9


@every_block
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_later_token_changes_nothing_earlier(name, grad):
    block, x = make(name, OTHER), tokens(101)
    with torch.set_grad_enabled(grad):
        before, _ = block(x)
        for t in (1, 16, 50, 100):
            other = x.clone()
            other[:, t:] += torch.randn_like(other[:, t:])  # a constant would be lost in the norm
            after, _ = block(other)
            assert torch.allclose(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
            assert not torch.allclose(after[:, t], before[:, t])


@every_block
def test_strided_input(name):
    block, x = make(name), tokens(63)
    want, _ = block(x)
    by_time = x.transpose(0, 1).contiguous().transpose(0, 1)
    by_channel = x.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (by_time, by_channel):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert relative(block(other)[0], want) < 1e-12


@every_block
def test_rows_of_a_batch_are_independent(name):
    block, x = make(name), tokens(63, batch=3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            together, _ = block(x)
            alone = torch.cat([block(row)[0] for row in x.split(1)])
        assert relative(together, alone) < 1e-12


# -- what is refused -----------------------------------------------------------------------------------------


@every_block
def test_wrong_shapes_raise(name):
    block = make(name)
    for shape in ((2, 5, 31), (2, 0, 32), (0, 5, 32), (5, 32), (1, 2, 5, 32)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(LongctxError):
                block(torch.zeros(shape, dtype=torch.float64))
    for shape in ((2, 2, 32), (2, 32), (2, 1, 31)):
        with pytest.raises(LongctxError):
            block.step(torch.zeros(shape, dtype=torch.float64), block.init_state(2))


class Loud(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1000


@every_block
def test_layers_that_do_more_than_their_weights_say_are_refused(name):
    """Rather than left out: blocks read weights, and never call their layers."""
    x = tokens(3)
    block = make(name)
    block.ffn_up = Loud(32, 128, dtype=torch.float64)
    with pytest.raises(LongctxError, match=r"ffn_up is a Loud, with a forward of its own"):
        block(x)
    block = make(name)
    block.ffn_up.forward = lambda rows: 2 * torch.nn.functional.linear(rows, block.ffn_up.weight)
    with pytest.raises(LongctxError, match=r"ffn_up has a forward that was put in place of its own"):
        block(x)
    block = make(name)
    torch.nn.utils.prune.random_unstructured(block.ffn_up, "weight", 0.5)
    with torch.no_grad(), pytest.raises(LongctxError, match=r"ffn_up has a hook that makes its weight"):
        block(x)
    torch.nn.utils.prune.remove(block.ffn_up, "weight")
    want = block(x)[0]
    block.ffn_up.register_forward_hook(lambda *_: None)
    assert torch.equal(block(x)[0], want)
    torch.nn.utils.parametrizations.weight_norm(block.ffn_up)
    torch.testing.assert_close(block(x)[0], want)
    with torch.no_grad():
        block.ffn_up.parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(block(x)[0], want)


@every_block
def test_impossible_shapes_and_options_raise(name):
    impossible = [
        {"d_model": 30, "n_heads": 4},
        {"d_model": 32, "n_heads": 4, "num_kv_heads": 3},
        {"d_model": 0, "n_heads": 1},
        {"d_model": 32, "n_heads": 0},
        {"d_model": 32, "n_heads": 4, "dropout": 1.0},
        {"d_model": 32, "n_heads": 4, "no_such_option": 1},
    ]
    counts = ("window_size", "chunk_size", "block_size", "state_dim", "dilation")
    counts = [count for count in counts if count in blocks.load(name).defaults]
    impossible += [
        {"d_model": 32, "n_heads": 4, count: bad} for count, bad in itertools.product(counts, (0, -1, 2.5, True))
    ]
    for arguments in impossible:
        with pytest.raises(LongctxError):
            blocks.build(name, **arguments)


@pytest.mark.parametrize("name", WITH_CAUSAL)
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
def test_without_causality_there_is_no_state_and_no_step(name, options, monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 24)
    block = make(name, options, causal=False)
    for length in (1, 63, 130):
        x = tokens(length)
        want = reference(block, x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y, state = block(x)
            assert state is None
            assert relative(y, want) < 1e-9
    other = x.clone()
    other[:, -1] += torch.randn_like(other[:, -1])
    assert not torch.allclose(block(other)[0][:, -3], y[:, -3])
    with pytest.raises(LongctxError):
        block.init_state(2)
    with pytest.raises(LongctxError):
        block.step(x[:, :1], None)
    with pytest.raises(LongctxError):
        block(x, make(name, options).init_state(2))


# -- the shell, memory, global state -------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_parameters_of_the_shell(name, num_kv_heads):
    block = make(name, num_kv_heads=num_kv_heads)
    shapes = {key: tuple(parameter.shape) for key, parameter in block.named_parameters()}
    wanted = {
        "attn_norm.weight": (32,),
        "attn_norm.bias": (32,),
        "ffn_norm.weight": (32,),
        "ffn_norm.bias": (32,),
        "qkv_proj.weight": (32 + 2 * (num_kv_heads or 4) * 8, 32),
        "out_proj.weight": (32, 32),
        "out_proj.bias": (32,),
        "ffn_up.weight": (128, 32),
        "ffn_up.bias": (128,),
        "ffn_down.weight": (32, 128),
        "ffn_down.bias": (32,),
    }
    assert wanted.items() <= shapes.items()
    assert "qkv_proj.bias" not in shapes
    assert isinstance(block.path, str) and block.path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Dense"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_no_tensor_grows_faster_than_the_sequence(name, grad):
    medium = {"window_size": 64, "chunk_size": 128, "block_size": 16}
    block = make(name, medium, d_model=16, n_heads=2, dtype=torch.float32)
    largest = []
    for length in (4096, 8192):
        x = tokens(length, batch=1, d_model=16, dtype=torch.float32)
        with torch.set_grad_enabled(grad), LargestTensor() as mode:
            y, _ = block(x, keep_state=False)
            if grad:
                y.sum().backward()
        largest.append(mode.elements)
        assert mode.elements < length * length / 4
    assert largest[1] <= 2.2 * largest[0]


@every_block
def test_calling_changes_no_global_state(name, global_state):
    before, random_state = global_state(), torch.get_rng_state()
    block = blocks.build(name, d_model=32, n_heads=4).eval()
    torch.set_rng_state(random_state)
    x = torch.ones(2, 63, 32)
    block(x)[0].sum().backward()
    with torch.no_grad():
        block.step(x[:, :1], block(x)[1])
    assert global_state() == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_importing_the_blocks_changes_no_global_state():
    program = """
import sys
sys.path.insert(0, "tests")
import torch
from conftest import torch_state
before = torch_state(), torch.get_rng_state().sum()
from longctx import blocks
for name in blocks.names():
    blocks.load(name)
after = torch_state(), torch.get_rng_state().sum()
assert before == after, (before, after)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@every_block
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(name, dtype):
    tolerance = blocks.load(name).tolerances[dtype]
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    shape = {"device": "cuda", "dtype": torch_dtype}
    block = make(name, d_model=64, num_kv_heads=2, **shape)
    x = tokens(257, d_model=64, **shape)
    want = reference(block, x)
    y, _ = block(x)
    y.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())
    pieces, state = [], None
    with torch.no_grad():
        whole, _ = block(x)
        for piece in x.split([1, 7, 248, 1], dim=1):
            out, state = block(piece, state)
            pieces.append(out)
    for out in (y, whole, torch.cat(pieces, 1)):
        assert out.isfinite().all()
        assert relative(out, want) < tolerance


@pytest.mark.cuda
@every_block
def test_in_a_cuda_graph_of_the_caller(name):
    shape = {"d_model": 64, "device": "cuda", "dtype": torch.bfloat16}
    block, x = make(name, **shape), tokens(257, **shape)
    with torch.inference_mode():
        given = torch.zeros_like(x)
        # On a side stream, as `longctx sweep --cuda-graph` does it.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            block(given, keep_state=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = block(given, keep_state=False)
        given.copy_(x)
        graph.replay()
        assert relative(out, block(x, keep_state=False)[0]) < 1e-2


@pytest.mark.cuda
@every_block
def test_a_training_step_in_a_cuda_graph_of_the_caller(name):
    """The whole step, as `longctx sweep --mode train --cuda-graph` replays it."""
    shape = {"d_model": 64, "device": "cuda", "dtype": torch.bfloat16}
    block, x = make(name, **shape).train(), tokens(257, **shape)
    target, given = tokens(257, **shape), torch.zeros_like(x).requires_grad_()
    parameters = [given, *block.parameters()]

    def step():
        for parameter in parameters:
            parameter.grad = None
        y, _ = block(given, keep_state=False)
        torch.sum(y * target, dtype=torch.float32).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = [parameter.grad for parameter in parameters]
    with torch.no_grad():
        given.copy_(x)
    graph.replay()
    step()
    for got, parameter in zip(found, parameters, strict=True):
        # A bias that a norm takes out again has a gradient of rounding errors alone.
        assert (got - parameter.grad).norm() <= 2e-2 * parameter.grad.norm() + 1e-2
