"""BLADE: golden values, every chunk size against the reference, streams, and the state."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from longctx import blocks
from longctx.blocks import _shell, blade
from longctx.blocks.blade import SPEC, reference
from longctx.errors import LongctxError, UsageError
from longctx.ops import blade_graph

GOLDEN = sorted(Path(__file__).parent.glob("golden/blade_*.npz"))
LENGTHS = (1, 2, 7, 8, 9, 16, 29)


def make(*, dtype=torch.float64, **options):
    shape = {"d_model": 16, "n_heads": 4, "chunk_size": 8, "state_dim": 5, "dtype": dtype, **options}
    block = blocks.build("BLADE", **shape)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            # A state that matters: what a chunk hands on must show in the next one's output.
            parameter.add_((0.5 if name.startswith("state") else 0.1) * torch.randn_like(parameter))
    return block


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def both_ways(block, x, *state):
    """Output and state of both implementations: the one that autograd follows, and the one in buffers."""
    yield block(x, *state)
    with torch.no_grad():
        yield block(x, *state)


# -- golden values -------------------------------------------------------------------------------------------


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    data = {key: torch.from_numpy(value) for key, value in np.load(request.param).items() if value.dtype.kind == "f"}
    options = {
        key.removeprefix("cfg/"): value.item()
        for key, value in np.load(request.param).items()
        if key.startswith("cfg/") and key != "cfg/block"
    }
    block = blocks.build("BLADE", **options, dtype=torch.float64)
    block.load_state_dict({key.removeprefix("w/"): value for key, value in data.items() if key.startswith("w/")})
    return block, data


def test_golden_files_are_there():
    assert len(GOLDEN) >= 2


def test_reference_reproduces_the_golden_values(golden):
    block, data = golden
    x = data["x"].requires_grad_()
    y, s = reference(block, x, data.get("state_in"))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert relative(y, data["y"]) < 1e-12
    assert relative(s, data["state_out"]) < 1e-12
    assert relative(grad, data["grad_x"]) < 1e-12


def test_block_reproduces_the_golden_values(golden):
    block, data = golden
    x = data["x"].requires_grad_()
    start = block.init_state(x.shape[0], s=data.get("state_in"))
    for y, state in both_ways(block, x, start):
        assert relative(y, data["y"]) < 1e-9
        assert relative(state.s, data["state_out"]) < 1e-9
    (grad,) = torch.autograd.grad(block(x, start)[0].square().sum(), x)
    assert relative(grad, data["grad_x"]) < 1e-7


# -- against the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("num_global_tokens", [0, 1, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_values_gradients_and_state(chunk_size, num_global_tokens, num_kv_heads):
    block = make(chunk_size=chunk_size, num_global_tokens=num_global_tokens, num_kv_heads=num_kv_heads)
    for length in LENGTHS:
        x, start = torch.randn(2, length, 16).double(), torch.randn(2, 5).double()
        leaves = {"x": x, "s": start, **dict(block.named_parameters())}
        for leaf in (x, start):
            leaf.requires_grad_()
        want, want_s = reference(block, x, start)
        for y, state in both_ways(block, x, block.init_state(2, s=start)):
            assert relative(y, want) < 1e-9
            assert relative(state.s, want_s) < 1e-9
        weights, s_weights = torch.randn_like(want), torch.randn_like(want_s)
        y, state = block(x, block.init_state(2, s=start))
        wanted = torch.autograd.grad((want * weights).sum() + (want_s * s_weights).sum(), leaves.values())
        found = torch.autograd.grad((y * weights).sum() + (state.s * s_weights).sum(), leaves.values())
        for name, got, expected in zip(leaves, found, wanted, strict=True):
            assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9), (name, length)


def test_a_chunk_sees_only_itself_the_globals_and_the_state():
    block = make()
    x = torch.randn(1, 24, 16).double()
    with torch.no_grad():
        block.state_inject.weight.zero_()
        before, _ = block(x)
        other = x.clone()
        other[:, :8] += 1.0
        after, _ = block(other)
    assert torch.equal(after[:, 8:], before[:, 8:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_global_tokens", [0, 2])
def test_lower_precision(dtype, tolerance, num_global_tokens):
    block = make(dtype=dtype, d_model=64, chunk_size=32, num_global_tokens=num_global_tokens)
    x = torch.randn(2, 333, 64).to(dtype)
    exact = copy.deepcopy(block).double()
    with torch.no_grad():
        want, want_s = reference(exact, x.double())
    for y, state in both_ways(block, x):
        assert y.dtype == dtype and state.s.dtype == torch.float32
        assert relative(y, want) < tolerance
        assert relative(state.s, want_s) < tolerance


def test_long_chunks_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 20)
    monkeypatch.setattr(blade, "LEAST_PART", 3)
    for chunk_size, batch in ((8, 1), (19, 1), (50, 1), (50, 3), (8, 30)):
        block = make(chunk_size=chunk_size, num_global_tokens=2)
        x = torch.randn(batch, 117, 16).double()
        want, want_s = reference(block, x)
        for _, state in (block(x[:, :5]), (None, None)):
            with torch.no_grad():
                begun = 0 if state is None else 5
                y, after = block(x[:, begun:], state)
            assert relative(y, want[:, begun:]) < 1e-9
            assert relative(after.s, want_s) < 1e-9


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
@pytest.mark.parametrize("num_global_tokens", [0, 3])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_any_split_gives_the_whole_and_s_of_every_prefix(chunk_size, num_global_tokens, grad):
    block = make(chunk_size=chunk_size, num_global_tokens=num_global_tokens, num_kv_heads=2)
    x, start = torch.randn(2, 29, 16).double(), torch.randn(2, 5).double()
    want, _ = reference(block, x, start)
    prefixes = {end: reference(block, x[:, :end], start)[1] for end in range(1, 30)}
    for sizes in ([1] * 29, [5, 24], [7, 1, 1, 20], [8, 21], [13, 3, 13], [28, 1], [2] * 14 + [1]):
        state, pieces, end = block.init_state(2, s=start), [], 0
        assert torch.equal(state.s, start)
        with torch.set_grad_enabled(grad):
            for piece in x.split(sizes, dim=1):
                y, state = block.step(piece, state) if piece.shape[1] == 1 else block(piece, state)
                pieces.append(y)
                end += piece.shape[1]
                assert relative(state.s, prefixes[end]) < 1e-9, end
        assert relative(torch.cat(pieces, 1), want) < 1e-9


def test_a_branching_stream_keeps_both_branches():
    block, x = make(chunk_size=16), torch.randn(1, 12, 16).double()
    want = block(x)[0]
    other = torch.randn(1, 4, 16).double()
    with torch.no_grad():
        _, state = block(x[:, :5])
        _, one = block(x[:, 5:8], state)
        _, two = block(other[:, :3], state)
        first, _ = block(x[:, 8:], one)
        second, _ = block(other[:, 3:], two)
    assert relative(first, want[:, 8:]) < 1e-9
    assert relative(second, reference(block, torch.cat([x[:, :5], other], 1))[0][:, 8:]) < 1e-9


def test_gradient_through_a_state_inside_a_chunk():
    block, x = make(num_global_tokens=2), torch.randn(2, 21, 16).double().requires_grad_()
    weights = torch.randn(2, 8, 16).double()
    (want,) = torch.autograd.grad((reference(block, x)[0][:, 13:] * weights).sum(), x)
    _, state = block(x[:, :5])
    _, state = block(x[:, 5:13], state)
    y, _ = block(x[:, 13:], state)
    (got,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-10)
    assert got[:, :5].abs().sum() > 0


def test_a_detached_state_holds_no_graph_and_no_more_memory_than_its_tokens():
    block = make(chunk_size=64)
    _, state = block(torch.randn(1, 70, 16).double())
    assert state.s.requires_grad and state.kv.requires_grad
    cut = state.detach()
    for tensor in (cut.s, cut.start, cut.total, cut.kv):
        assert not tensor.requires_grad
    assert cut.kv.untyped_storage().nbytes() == 6 * 32 * 8


def test_state_of_inference_holds_no_slab():
    block = make(chunk_size=64)
    with torch.no_grad():
        _, state = block(torch.randn(1, 640, 16).double())
        assert state.kv.shape[1] == 0 and state.kv.untyped_storage().nbytes() == 0
        _, state = block(torch.randn(1, 650, 16).double())
    assert state.kv.shape[1] == 10
    assert state.kv.untyped_storage().nbytes() <= 64 * 32 * 8


# -- the module ----------------------------------------------------------------------------------------------


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in make(num_global_tokens=3).named_parameters()}
    assert shapes["state_inject.weight"] == (16, 5) and shapes["state_inject.bias"] == (16,)
    assert shapes["state_proj.weight"] == (5, 16) and shapes["state_proj.bias"] == (5,)
    assert shapes["global_tokens"] == (3, 16)
    assert "global_tokens" not in dict(make().named_parameters())
    fresh = blocks.build("BLADE", d_model=256, n_heads=4, num_global_tokens=64)
    assert 0.015 < fresh.global_tokens.std() < 0.025
    options = {"chunk_size": 512, "state_dim": 64, "num_global_tokens": 0}
    assert SPEC.defaults == {**options, "dropout": 0.0, "recompute": "norms"}


def test_copies_and_pickles_compute_the_same():
    block, x = make(), torch.randn(1, 20, 16).double()
    with torch.no_grad():
        want, _ = block(x)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(other(x)[0], want)


def test_weights_changed_in_place_count_at_once():
    block, x = make(), torch.randn(1, 20, 16).double()
    with torch.no_grad():
        block(x)
        for parameter in block.parameters():
            parameter.data.mul_(1.1)
        assert relative(block(x)[0], reference(block, x)[0]) < 1e-9


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_dropout_in_training_only(grad):
    block, x = make(dropout=0.3, num_global_tokens=1), torch.randn(2, 20, 16).double()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        one, state = block(x)
        torch.manual_seed(1)
        again, _ = block(x)
        other, _ = block(x)
        assert torch.equal(one, again) and not torch.allclose(one, other)
        assert state.s.isfinite().all()
        # The state comes from the y that was returned, dropout included.
        last = block.state_proj(one[:, 16:].mean(1))
        assert relative(state.s, last) < 1e-12
        block.eval()
        assert relative(block(x)[0], reference(block, x)[0]) < 1e-12


def test_the_path_says_what_trains():
    assert "one operator" in make().train().path
    assert "as autograd follows" in make(dropout=0.1).train().path
    assert "chunk by chunk" in make().eval().path


@pytest.mark.parametrize(
    "bad",
    [
        {"chunk_size": 0},
        {"chunk_size": 2.0},
        {"state_dim": 0},
        {"num_global_tokens": -1},
        {"num_global_tokens": True},
        {"dropout": 1.0},
        {"causal": False},
        {"window_size": 4},
    ],
)
def test_bad_options(bad):
    with pytest.raises(LongctxError):
        blocks.build("BLADE", d_model=16, n_heads=4, **bad)


def test_states_that_do_not_fit():
    block = make()
    for shape in ((2, 4), (3, 5), (5,)):
        with pytest.raises(UsageError):
            block.init_state(2, s=torch.zeros(shape))
    with pytest.raises(UsageError):
        block.init_state(0)
    with pytest.raises(UsageError, match="batch of 3"):
        block(torch.zeros(2, 4, 16).double(), block.init_state(3))


# -- on a GPU ------------------------------------------------------------------------------------------------


def on_gpu(dtype=torch.bfloat16, **options):
    block = make(**{"d_model": 64, "chunk_size": 32, "state_dim": 16, **options})
    with torch.no_grad():
        # Over dozens of chunks a recurrence that amplifies leaves the range of every format, the reference's too.
        block.state_proj.weight.mul_(0.05)
    return block.to(device="cuda", dtype=dtype).eval()


def exact(block, x):
    with torch.no_grad():
        return reference(copy.deepcopy(block).double(), x.double())


def gpu_tokens(batch, length, dtype=torch.bfloat16):
    return torch.randn(batch, length, 64, device="cuda", dtype=dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"num_global_tokens": 3}, {"chunk_size": 50}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-3)])
def test_graphs_agree_with_the_reference(options, dtype, tolerance):
    block = on_gpu(dtype, **options)
    for batch, length in ((1, 1), (1, 31), (2, 32), (1, 33), (3, 1000)):
        x = gpu_tokens(batch, length, dtype)
        want, want_s = exact(block, x)
        with torch.inference_mode():
            y, state = block(x)
            again, _ = block(x, keep_state=False)
        assert relative(y, want) < tolerance and relative(state.s, want_s) < tolerance
        assert torch.equal(y, again)


@pytest.mark.cuda
@torch.no_grad()
def test_graphs_follow_the_weights():
    block, x = on_gpu(), gpu_tokens(1, 500)
    block(x)
    for parameter in block.parameters():
        parameter.data.mul_(1.2)
    assert relative(block(x)[0], exact(block, x)[0]) < 2e-2
    block.ffn_up.weight = torch.nn.Parameter(block.ffn_up.weight * 0.5)
    assert relative(block(x)[0], exact(block, x)[0]) < 2e-2
    twin = copy.deepcopy(block)
    assert len(block._graphs) > 0 and len(twin._graphs) == 0
    assert torch.equal(twin(x)[0], block(x)[0])


@pytest.mark.cuda
@torch.no_grad()
def test_graphs_are_bounded_and_go_with_the_block():
    block = on_gpu()
    for batch in range(1, 9):
        block(gpu_tokens(batch, 31 * 32))
    assert 0 < len(block._graphs) <= blade_graph.MOST_GRAPHS
    del block
    gc.collect()
    assert not blade_graph._slabs


@pytest.mark.cuda
@torch.no_grad()
def test_inside_a_graph_of_the_caller_and_on_another_stream():
    block, x = on_gpu(), gpu_tokens(1, 500)
    want, _ = block(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there, _ = block(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(there, want)
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    block(given)
    with torch.cuda.graph(graph):
        out, _ = block(given, keep_state=False)
    given.copy_(x)
    graph.replay()
    assert relative(out, want) < 1e-2


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_read_where_they_lie_and_stay_as_they_are(batch):
    block, x = on_gpu(), gpu_tokens(batch, 500)
    want = exact(block, x)[0]
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    strided = torch.empty(500, batch, 64, device="cuda", dtype=x.dtype).transpose(0, 1).copy_(x)
    for given in (x.clone(), shifted, strided):
        y, _ = block(given)
        assert relative(y, want) < 2e-2
        assert torch.equal(given, x)
