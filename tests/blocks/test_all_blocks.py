"""What every block promises, for every block there is: a new file in `blocks/` needs no edit here."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx import blocks
from longctx.blocks import _shell
from longctx.errors import LongctxError

# Options are made small by name, so that short sequences span many windows, chunks and blocks.
SMALL = {"window_size": 16, "chunk_size": 16, "block_size": 8, "state_dim": 6}
# And again with those that are off or trivial by default.
OTHER = {**SMALL, "num_global_tokens": 3, "dilation": 2, "num_random_blocks": 1, "num_global_blocks": 1}

NAMES = blocks.names()
# Identity takes the option with the rest of the shell, but has nothing that could look ahead.
WITH_CAUSAL = [name for name in NAMES if name != "Identity" and "causal" in blocks.load(name).defaults]
every_block = pytest.mark.parametrize("name", NAMES)


def make(name: str, options=SMALL, *, d_model=32, n_heads=4, device=None, dtype=torch.float64, **more):
    """A block with weights that leave nothing neutral: no norm at one, no bias at zero."""
    defaults = blocks.load(name).defaults
    options = {key: value for key, value in options.items() if key in defaults}
    block = blocks.build(name, d_model=d_model, n_heads=n_heads, device=device, dtype=dtype, **{**options, **more})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def tokens(length: int, *, batch=2, d_model=32, device=None, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, d_model, device=device, dtype=dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def reference(block, x: torch.Tensor) -> torch.Tensor:
    """The reference of `block` in fp64, on the same weights."""
    with torch.no_grad():
        return blocks.load(type(block).__name__.removesuffix("Block")).reference(
            copy.deepcopy(block).double().eval(), x.double()
        )[0]


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


# -- streams -------------------------------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_any_split_of_a_stream_is_the_whole(name, options, grad):
    block, x = make(name, options), tokens(101)
    want = reference(block, x)
    for sizes in ([1, 7, 93], [15, 1, 16, 17, 52], [100, 1], [33] * 3 + [2]):
        for start in (None, block.init_state(2)):
            state, pieces = start, []
            with torch.set_grad_enabled(grad):
                for piece in x.split(sizes, dim=1):
                    y, state = block(piece, state)
                    pieces.append(y)
            assert relative(torch.cat(pieces, 1), want) < 1e-9


@every_block
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_step_is_forward_of_one_token(name, num_kv_heads, grad):
    block, x = make(name, OTHER, num_kv_heads=num_kv_heads), tokens(80)
    want = reference(block, x)
    state, pieces = block.init_state(2), []
    with torch.set_grad_enabled(grad):
        for t in range(80):
            y, state = block.step(x[:, t : t + 1], state)
            assert y.shape == (2, 1, 32)
            pieces.append(y)
    assert relative(torch.cat(pieces, 1), want) < 1e-9


@every_block
def test_forward_leaves_the_given_state_as_it_was(name):
    block, x = make(name), tokens(60)
    want = block(x)[0][:, 40:]
    with torch.no_grad():
        _, state = block(x[:, :40])
        block(tokens(9), state)
        y, _ = block(x[:, 40:], state)
    assert relative(y, want) < 1e-9


@every_block
def test_a_state_goes_from_one_mode_to_another(name):
    block, x = make(name), tokens(60)
    want, _ = block(x)
    with torch.inference_mode():
        first, state = block(x[:, :20])
        first = first.clone()
    with torch.no_grad():
        second, state = block(x[:, 20:40], state)
        for t in (40, 41):
            third, state = block.step(x[:, t : t + 1], state)
    last, _ = block(x[:, 42:].clone().requires_grad_(), state)
    last.sum().backward()
    assert relative(second, want[:, 20:40]) < 1e-9
    assert relative(third, want[:, 41:42]) < 1e-9
    assert relative(last, want[:, 42:]) < 1e-9


@every_block
def test_no_state_is_kept_when_none_is_asked_for(name):
    block, x = make(name), tokens(63)
    assert block(x)[1] is not None
    assert block(x, keep_state=False)[1] is None
    with torch.no_grad():
        assert block(x)[1] is not None
        assert block(x, keep_state=False)[1] is None


# -- gradients -----------------------------------------------------------------------------------------------


def gradients(block, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    wanted = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), wanted.values(), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("length", [1, 63])
def test_gradients_are_those_of_the_reference(name, options, length):
    block, x = make(name, options, num_kv_heads=2), tokens(length).requires_grad_()
    weights = torch.randn_like(x)
    want = gradients(block, x, blocks.load(name).reference(block, x)[0], weights)
    pieces, state = [], None
    for piece in x.split([1, *([20, 42] if length > 1 else [])], dim=1):
        y, state = block(piece, state)
        pieces.append(y)
    for y in (block(x)[0], torch.cat(pieces, 1)):
        got = gradients(block, x, y, weights)
        scale = max(grad.norm() for grad in want.values())
        for key in want:
            assert (got[key] - want[key]).norm() < 1e-7 * max(want[key].norm(), 1e-3 * scale), key


@every_block
def test_gradients_flow_through_a_state_until_it_is_detached(name):
    block = make(name)
    first, second = tokens(20).requires_grad_(), tokens(17)
    weights = torch.randn_like(second)

    def reach(y):
        (grad,) = torch.autograd.grad((y * weights).sum(), first, allow_unused=True)
        return torch.zeros_like(first) if grad is None else grad

    want = reach(block(torch.cat([first, second], 1))[0][:, 20:])
    _, state = block(first)
    y, _ = block(second, state)
    assert torch.allclose(reach(y), want, rtol=1e-7, atol=1e-9)
    _, state = block(first)
    cut, _ = block(second, state.detach())
    assert relative(cut, y) < 1e-12
    assert reach(cut).count_nonzero() == 0


@every_block
def test_forward_and_backward_are_the_same_twice(name):
    block, x = make(name, dtype=torch.float32), tokens(130, dtype=torch.float32).requires_grad_()
    weights = torch.randn_like(x)
    one, two = (gradients(block, x, block(x)[0], weights) for _ in range(2))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(block(x)[0], block(x)[0])


# -- dropout -------------------------------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_dropout_acts_in_training_and_is_silent_in_eval(name, grad):
    plain, block, x = make(name), make(name, dropout=0.25), tokens(63)
    block.load_state_dict(plain.state_dict())
    with torch.set_grad_enabled(grad):
        want, _ = plain(x)
        one, two = block(x)[0], block(x)[0]
        assert one.isfinite().all() and not torch.allclose(one, two)
        torch.manual_seed(7)
        again = block(x)[0]
        torch.manual_seed(7)
        assert torch.equal(block(x)[0], again)
        block.eval()
        random_state = torch.get_rng_state()
        assert relative(block(x)[0], want) < 1e-12
        assert torch.equal(torch.get_rng_state(), random_state)


# -- what is refused -----------------------------------------------------------------------------------------


@every_block
def test_wrong_shapes_raise(name):
    block = make(name)
    for shape in ((2, 5, 31), (2, 0, 32), (5, 32), (1, 2, 5, 32)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(LongctxError):
                block(torch.zeros(shape, dtype=torch.float64))
    for shape in ((2, 2, 32), (2, 32), (2, 1, 31)):
        with pytest.raises(LongctxError):
            block.step(torch.zeros(shape, dtype=torch.float64), block.init_state(2))


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


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


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
