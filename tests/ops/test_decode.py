"""Steps by CUDA graph: the kernels under Triton's interpreter against forward, slots and their streams on a GPU."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune

from longctx import blocks
from longctx.errors import LongctxError
from longctx.ops import decode
from longctx.ops.decode import Decoder

CASES = [
    ("DPASSM", {"window_size": 7, "state_dim": 5}),
    ("DPASSM", {"window_size": 1, "num_kv_heads": 2}),
    ("DPASSM", {"window_size": 150, "num_kv_heads": 1}),
    ("BLADE", {"chunk_size": 9, "state_dim": 5}),
    ("BLADE", {"chunk_size": 1, "num_kv_heads": 2}),
    ("BLADE", {"chunk_size": 16, "num_global_tokens": 3, "num_kv_heads": 2}),
    ("Longformer", {"window_size": 9}),
    ("Longformer", {"window_size": 5, "dilation": 3, "num_global_tokens": 4, "num_kv_heads": 2}),
    ("Longformer", {"window_size": 70, "num_global_tokens": 0}),
    ("Longformer", {"window_size": 1, "num_global_tokens": 70}),
]
FEW = [CASES[0], CASES[5], CASES[7]]
CASE = pytest.mark.parametrize(("name", "options"), FEW, ids=[name for name, _ in FEW])
HALF = (torch.bfloat16, torch.float16)
GPU = {"device": "cuda", "dtype": torch.float32}


def make(name, options, *, device="cpu", dtype=torch.float32, d_model=32):
    block = blocks.build(name, d_model=d_model, n_heads=4, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.eval()


def tokens(length, *, batch=2, device="cpu", dtype=torch.float32, d_model=32):
    return torch.randn(batch, length, d_model).to(device, dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def steps(block, x, state):
    pieces = []
    for x_t in x.split(1, dim=1):
        y, state = block.step(x_t, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def check(name, options, *, start, length=40, **more):
    """Steps from a state of `start` tokens on, then a longer piece behind them, are the whole sequence."""
    block, x = make(name, options, **more), tokens(start + length + 30, **more)
    with torch.no_grad():
        want, _ = block(x)
        _, state = block(x[:, :start]) if start else (None, block.init_state(2))
        y, state = steps(block, x[:, start : start + length], state)
        assert type(state).__name__ == f"{name}Stream"
        rest, _ = block(x[:, start + length :], state)
        for other in (state.detach(), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            assert type(other).__name__ == f"{name}State"
            again, _ = block(x[:, start + length :], other)
            assert torch.equal(rest, again)
    return relative(torch.cat([y, rest], 1), want[:, start:])


def test_nothing_of_it_on_a_cpu():
    block, x = make(*CASES[0]), tokens(3)
    with torch.no_grad():
        _, state = steps(block, x, block.init_state(2))
        assert decode.step_key(block, x[:, :1]) is None
    assert type(state).__name__ == "DPASSMState" and len(block._decoder) == 0


@CASE
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_no_graph_where_a_layer_computes_what_it_has(name, options, part, monkeypatch):
    monkeypatch.setattr(decode, "_for_graphs", lambda x_t: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    x = tokens(1)
    block = make(name, options)
    assert decode.step_key(block, x) == decode.step_key(block, x) is not None
    torch.nn.utils.parametrize.register_parametrization(block.ffn_up, part, torch.nn.Identity())
    assert decode.step_key(block, x) is None
    block = make(name, options)
    torch.nn.utils.prune.identity(block.ffn_up, part)
    assert decode.step_key(block, x) is None


def test_a_copy_has_no_slots():
    decoder = Decoder(8, 2, 1)
    decoder._slots.append("a slot")
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert len(other) == 0 and other._shape == {"window": 8, "dilation": 2, "lead": 1}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [(*case, torch.float32) for case in CASES] + [(*case, dtype) for case in FEW for dtype in HALF],
)
def test_steps_agree_with_forward(name, options, dtype):
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for start in (0, 3, 100):
        if start or not options.get("num_global_tokens", 0) > 40:
            start += 70 * (options.get("num_global_tokens", 0) > 40)
            assert check(name, options, start=start, device="cuda", dtype=dtype) < limit


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["DPASSM", "BLADE", "Longformer"])
@pytest.mark.parametrize(("batch", "d_model"), [(1, 512), (5, 96), (19, 64)])
def test_steps_at_other_sizes(name, batch, d_model):
    block, x = make(name, {}, d_model=d_model, **GPU), tokens(650, batch=batch, d_model=d_model, **GPU)
    with torch.inference_mode():
        want, _ = block(x)
        y, _ = steps(block, x[:, 600:], block(x[:, :600])[1])
    assert relative(y, want[:, 600:]) < 1e-4


@pytest.mark.cuda
@CASE
def test_more_streams_than_slots_in_turns(name, options):
    block, count = make(name, options, **GPU), decode.MOST_SLOTS + 2
    streams = [tokens(30, **GPU) for _ in range(count)]
    with torch.inference_mode():
        states, found = [block(x[:, :10])[1] for x in streams], [[] for _ in streams]
        for t in range(10, 30):
            for index, x in enumerate(streams):
                y, states[index] = block.step(x[:, t : t + 1], states[index])
                found[index].append(y)
        assert len(block._decoder) == decode.MOST_SLOTS
        for x, pieces in zip(streams, found, strict=True):
            assert relative(torch.cat(pieces, 1), block(x)[0][:, 10:]) < 1e-4
        del states
        slots = list(block._decoder._slots)
        steps(block, streams[0], block.init_state(2))
        assert set(slots) == set(block._decoder._slots), "a free slot is taken again"


@pytest.mark.cuda
@CASE
def test_two_streams_from_one_state_and_modes_in_turns(name, options):
    block, x, other = make(name, options, **GPU), tokens(40, **GPU), tokens(40, **GPU)
    with torch.no_grad():
        want, _ = block(x)
        _, trunk = block(x[:, :20])
        left, state = steps(block, x[:, 20:30], trunk)
        steps(block, other[:, 20:30], trunk)
        with torch.inference_mode():
            more, state = steps(block, x[:, 30:33], state)
    assert relative(torch.cat([left, more], 1), want[:, 20:33]) < 1e-4
    last, _ = block.step(x[:, 33:34].clone().requires_grad_(), state)
    last.sum().backward()
    assert relative(last.detach(), want[:, 33:34]) < 1e-4
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        elsewhere, _ = steps(block, x[:, 33:], state)
        torch.cuda.synchronize()
    assert relative(elsewhere, want[:, 33:]) < 1e-4


@pytest.mark.cuda
@CASE
def test_weights_that_change_in_place_and_weights_that_are_replaced(name, options):
    block, x = make(name, options, **GPU), tokens(30, **GPU)
    with torch.no_grad():
        _, state = steps(block, x, block.init_state(2))
        slot = block._decoder._slots[0]
        block.ffn_down.weight.data.mul_(2)
        y, _ = steps(block, x, block.init_state(2))
        assert relative(y, block(x)[0]) < 1e-4
        block.qkv_proj.weight = torch.nn.Parameter(torch.randn_like(block.qkv_proj.weight) / 8)
        twin = copy.deepcopy(block)
        y, _ = steps(block, x, block.init_state(2))
        assert relative(y, block(x)[0]) < 1e-4 and slot not in block._decoder._slots
        assert torch.equal(steps(twin, x, twin.init_state(2))[0], y)
        steps(block, x, state)


@pytest.mark.cuda
@CASE
def test_a_step_inside_a_graph_of_the_caller(name, options):
    block, x = make(name, options, **GPU), tokens(30, **GPU)
    with torch.inference_mode():
        want = block(x)[0][:, 29:]
        _, state = steps(block, x[:, :29], block.init_state(2))
        plain = state.detach()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(side), torch.no_grad():
            block.forward(x[:, 29:], plain)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y, _ = block.step(x[:, 29:], state)
        graph.replay()
        assert relative(y, want) < 1e-4


@pytest.mark.cuda
@CASE
def test_inputs_that_do_not_fit_are_refused(name, options):
    block = make(name, options, **GPU)
    with torch.no_grad():
        _, state = steps(block, tokens(20, **GPU), block.init_state(2))
        for shape in ((2, 2, 32), (2, 1, 31)):
            with pytest.raises(LongctxError):
                block.step(torch.zeros(shape, device="cuda"), state)


def test_the_kernels_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    code = """
import torch
import test_decode as tests
from longctx.ops import decode
decode.kernels.fits = lambda weights: True
# Without a graph: the kernels are launched at every step.
decode.capture = lambda body, device: body
torch.cuda.device = lambda device: torch.no_grad()
for module in map(tests.blocks.load, ("DPASSM", "BLADE", "Longformer")):
    there = __import__(module.build.__module__, fromlist=["step_key"])
    there.step_key = lambda block, x_t: None if torch.is_grad_enabled() else (x_t.device, 0, x_t.shape)
for index, (name, options) in enumerate(tests.CASES):
    for start in ((80 if options.get("num_global_tokens") == 70 else 0,) if index else (0, 3, 25)):
        error = tests.check(name, options, start=start, length=12 if index else 4)
        assert error < 2e-6, (name, options, start, error)
print("ok")
"""
    interpreted(code)
