"""DPASSM against the published block's tensors, its recurrent state, its stream of keys, and its cost."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize

from longctx import blocks
from longctx.blocks import _shell, dpassm
from longctx.blocks.dpassm import SPEC
from longctx.config import BlockRequest, Cell
from longctx.errors import LongctxError, UsageError
from longctx.ops.projections import joined

GOLDEN = sorted(Path(__file__).with_name("golden").glob("dpassm_*.npz"))


def published(path: Path):
    """The block with the weights of a published case, and its arrays."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    options = {name[4:]: value.item() for name, value in arrays.items() if name.startswith("cfg/")}
    block = blocks.build(options.pop("block"), dtype=torch.float64, **options)
    weights = {name[2:]: torch.from_numpy(v) for name, v in arrays.items() if name.startswith("w/")}
    block.load_state_dict(weights, strict=True)
    return block, {name: torch.from_numpy(v) for name, v in arrays.items() if "/" not in name}


def small(**options):
    sizes = {"d_model": 24, "n_heads": 4, "num_kv_heads": 2, "window_size": 8, "state_dim": 5}
    return blocks.build("DPASSM", **{**sizes, "dtype": torch.float64, **options})


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got - want).abs().max().item()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_tensors(path, monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 11)
    block, case = published(path)
    start = case.get("state_in")
    x = case["x"].requires_grad_()
    y, s = SPEC.reference(block, x, start)
    assert largest_error(y, case["y"]) < 1e-12
    assert largest_error(s, case["state_out"]) < 1e-12
    assert largest_error(torch.autograd.grad(y.square().sum(), x)[0], case["grad_x"]) < 1e-12

    y, state = block(x, block.init_state(len(x), s=start))
    assert largest_error(y, case["y"]) < 1e-9
    assert largest_error(state.s, case["state_out"]) < 1e-9
    assert largest_error(torch.autograd.grad(y.square().sum(), x)[0], case["grad_x"]) < 1e-7
    with torch.no_grad():
        y, state = block(x, block.init_state(len(x), s=start))
    assert largest_error(y, case["y"]) < 1e-9
    assert largest_error(state.s, case["state_out"]) < 1e-9


def test_there_are_published_cases():
    assert len(GOLDEN) >= 2


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_its_own_parameters(num_kv_heads):
    block = small(num_kv_heads=num_kv_heads)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    own = {
        "ssm_in.weight": (5, 24),
        "ssm_in.bias": (5,),
        "ssm_decay": (5,),
        "ssm_out.weight": (24, 5),
        "gate_proj.weight": (24, 24),
        "gate_proj.bias": (24,),
    }
    assert own.items() <= shapes.items()
    assert len(shapes) == len(own) + 11
    many = blocks.build("DPASSM", d_model=8, n_heads=1, state_dim=4000).ssm_decay
    assert many.abs().max() < 0.1 and many.min() < -0.05 and many.max() > 0.05


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_decays_near_one_zero_and_below_zero(grad):
    block = small(state_dim=6)
    with torch.no_grad():
        block.ssm_decay.copy_(torch.tensor([0.0, 6.0, -6.0, 0.3, -0.3, 1e-30]))
        x = torch.randn(2, 400, 24, dtype=torch.float64)
        want, s = SPEC.reference(block, x)
    with torch.set_grad_enabled(grad):
        y, state = block(x)
    assert largest_error(y, want) < 1e-9
    assert largest_error(state.s, s) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_recurrent_state_is_kept_in_at_least_fp32(dtype):
    block = small(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert block.init_state(3).s.dtype == wide
    given = torch.randn(3, 5, dtype=torch.float64)
    assert block.init_state(3, s=given).s.dtype == wide
    x = torch.randn(3, 20, 24, dtype=dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, state = block(x, block.init_state(3, s=given.to(wide)))
            assert state.s.dtype == wide and y.dtype == dtype
            y, state = block.step(x[:, :1], state)
            assert state.s.dtype == wide and y.dtype == dtype


def test_gradient_reaches_a_given_state():
    block, x = small(), torch.randn(2, 20, 24, dtype=torch.float64)
    s = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (lambda: block(x, block.init_state(2, s=s)), lambda: SPEC.reference(block, x, s)):
        y, end = run()
        end = end if isinstance(end, torch.Tensor) else end.s
        grads.append(torch.autograd.grad(y.square().sum() + end.sum(), s)[0])
    assert grads[1].abs().sum() > 0
    assert largest_error(*grads) < 1e-9


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_streams_with_windows_shorter_and_longer_than_the_pieces(window, batch, monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 10 * batch)
    block = small(window_size=window)
    x = torch.randn(batch, 61, 24, dtype=torch.float64)
    with torch.no_grad():
        want, _ = SPEC.reference(block, x)
        assert largest_error(block(x)[0], want) < 1e-9
        state, pieces = None, []
        for piece in x.split([2, 1, 1, 30, 1, 6, 20], dim=1):
            y, state = block(piece, state)
            pieces.append(y)
            assert state.kv.shape[1] <= window - 1
    assert largest_error(torch.cat(pieces, 1), want) < 1e-9


def test_two_streams_may_go_on_from_one_state():
    block = small()
    x, other = torch.randn(2, 2, 30, 24, dtype=torch.float64).unbind()
    with torch.no_grad():
        want, _ = SPEC.reference(block, x)
        _, trunk = block(x[:, :10])
        left, right, pieces = trunk, trunk, []
        for t in range(10, 30):
            y, left = block.step(x[:, t : t + 1], left)
            _, right = block.step(other[:, t : t + 1], right)
            pieces.append(y)
    assert largest_error(torch.cat(pieces, 1), want[:, 10:]) < 1e-9


def test_a_step_moves_no_old_keys_while_there_is_room():
    block = small()
    x = torch.randn(1, 64, 24, dtype=torch.float64)
    with torch.no_grad():
        _, state = block(x)
        storages = []
        for t in range(32):
            _, state = block.step(x[:, t : t + 1], state)
            storages.append(state.kv.untyped_storage().data_ptr())
    assert len(set(storages)) <= 4


def test_a_stream_holds_what_it_has_seen_and_not_what_its_window_could():
    block, x = small(window_size=1 << 40), torch.randn(2, 100, 24, dtype=torch.float64)
    with torch.no_grad():
        y, state = block(x[:, :60])
        pieces = [y]
        for t in range(60, 100):
            y, state = block.step(x[:, t : t + 1], state)
            pieces.append(y)
    assert largest_error(torch.cat(pieces, 1), SPEC.reference(block, x)[0]) < 1e-9
    assert state.kv.untyped_storage().nbytes() <= 4 * state.kv.nbytes


def test_a_kept_state_is_as_small_as_its_cost_says():
    block = small(dtype=torch.float32)
    with torch.no_grad():
        _, state = block(torch.randn(1, 1000, 24))
    cell = Cell(block=BlockRequest.parse("DPASSM"), length=1000, d_model=24, n_heads=4, num_kv_heads=2)
    held = sum(t.untyped_storage().nbytes() for t in (state.kv, state.s))
    assert held == SPEC.cost(cell, {"window_size": 8, "state_dim": 5}).state_bytes
    _, state = block(torch.randn(1, 1000, 24))
    assert sum(t.untyped_storage().nbytes() for t in (state.detach().kv, state.detach().s)) == held


def test_states_that_do_not_fit_are_refused():
    block = small()
    for shape in ((2, 4), (1, 5), (5,)):
        with pytest.raises(LongctxError):
            block.init_state(2, s=torch.zeros(shape))
    with pytest.raises(UsageError):
        block(torch.zeros(3, 4, 24, dtype=torch.float64), block.init_state(2))
    with pytest.raises(LongctxError):
        block.init_state(0)


@pytest.mark.parametrize("length, window", [(1, 8), (7, 8), (8, 8), (9, 8), (100, 8), (100, 1)])
def test_cost_is_counted_from_the_definition(length, window):
    d, heads, groups, n = 32, 4, 2, 6
    options = {"window_size": window, "state_dim": n}

    def cell(**more):
        shape = {"length": length, "batch_size": 3, "d_model": d, "n_heads": heads, "num_kv_heads": groups}
        return Cell(block=BlockRequest.parse("DPASSM"), **{**shape, **more})

    pairs = sum(min(t + 1, window) for t in range(length))
    weights = sum(p.numel() for p in small(d_model=d, state_dim=n).parameters() if p.dim() == 2)
    forward = 3 * (2 * weights * length + 4 * d * pairs + 2 * n * length)
    found = SPEC.cost(cell(), options)
    assert math.isclose(found.flops, forward)
    assert math.isclose(SPEC.cost(cell(mode="train"), options).flops, 3 * forward)
    kept = min(length, window - 1) * 2 * groups * (d // heads)
    assert found.state_bytes == 3 * 4 * (kept + n)
    assert SPEC.cost(cell(dtype="bf16"), options).state_bytes == 3 * (2 * kept + 4 * n)
    assert SPEC.cost(cell(dtype="fp64"), options).state_bytes == 3 * 8 * (kept + n)

    step = SPEC.cost(cell(mode="decode"), options)
    seen = min(length, window)
    assert math.isclose(step.flops, 3 * (2 * weights + 4 * d * seen + 2 * n))
    read = (seen - 1) * 2 * groups * (d // heads) + n
    assert math.isclose(step.bytes, 4 * (weights + 3 * 2 * d + 3 * read))


def test_one_product_and_fused_kernels_under_the_interpreter(interpreted):
    """As on a GPU, where Triton is installed at all; in a process of its own, as its interpreter must be told early."""
    code = """
import torch
from longctx import blocks
from longctx.blocks import _shell, dpassm
from longctx.ops import diagonal_scan as scan
dpassm.fused.fits = scan.kernel.fits = lambda *tensors: True
_shell.CPU_SLAB_TOKENS = 100
made = []
fused = dpassm.DPASSMBlock._mix_fused
dpassm.DPASSMBlock._mix_fused = lambda self, u, *rest: (made.append(u.shape[1]), fused(self, u, *rest))[1]
torch.manual_seed(0)
for batch, groups in ((1, 4), (2, 2)):
    block = blocks.build("DPASSM", d_model=32, n_heads=4, num_kv_heads=groups, window_size=16, state_dim=8)
    x = torch.randn(batch, 233, 32)
    with torch.no_grad():
        want, s = dpassm.reference(block.double(), x.double())
        block.float()
        y, state = block(x)
        assert (y - want).norm() < 1e-6 * want.norm() and (state.s - s).norm() < 1e-6 * s.norm()
        pieces, state = [], None
        for piece in x.split([5, 100, 7, 121], dim=1):
            y, state = block(piece, state)
            pieces.append(y)
        assert (torch.cat(pieces, 1) - want).norm() < 1e-6 * want.norm()
assert made[:4] == [100, 100, 33, 5] and 7 not in made, made
print("ok")
"""
    interpreted(code)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_slabs_and_steps(dtype, monkeypatch):
    monkeypatch.setattr(_shell, "GPU_SLAB_TOKENS", 700)
    block = blocks.build("DPASSM", d_model=128, n_heads=2, device="cuda", dtype=dtype)
    x = torch.randn(1, 2000, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        want = SPEC.reference(block.double(), x.double())[0]
        block = block.to(dtype)
        y, state = block(x[:, :1990])
        pieces = [y]
        for t in range(1990, 2000):
            y, state = block.step(x[:, t : t + 1], state)
            pieces.append(y)
    error = (torch.cat(pieces, 1).double() - want).norm() / want.norm()
    assert error < SPEC.tolerances["fp32" if dtype == torch.float32 else "bf16"]


def test_what_is_not_moved_stays_in_the_memory_it_is_in(monkeypatch):
    moved = []
    monkeypatch.setattr(dpassm, "lay_together", lambda *weights: moved.append(weights))
    block = small()
    assert len(moved.pop()) == 3
    flat = torch.cat([p.detach().flatten() for p in block.parameters()])
    for p, part in zip(block.parameters(), flat.split([p.numel() for p in block.parameters()]), strict=True):
        p.data = part.view_as(p)
    block.to("cpu")
    assert not moved
    block.float()
    assert moved.pop() == (block.qkv_proj.weight, block.gate_proj.weight, block.ssm_in.weight)


def test_moves_and_copies_of_a_block_with_other_layers():
    """Those that have no weight, or compute it, are asked for none."""
    block = small()
    calls = []

    class Twice(torch.nn.Module):
        def forward(self, weight):
            calls.append(1)
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(block.ssm_in, "weight", Twice())
    calls.clear()
    block.double().to("cpu")
    assert not calls
    block.gate_proj = torch.nn.Identity()
    copy.deepcopy(block).float()
    pickle.loads(pickle.dumps(small()))


@pytest.mark.cuda
def test_weights_of_one_product_stay_together():
    def weights(block):
        return [linear.weight for linear in (block.qkv_proj, block.gate_proj, block.ssm_in)]

    def check(block):
        """They are read where they lie, and what is read is what they are."""
        parts = weights(block)
        whole = joined(*parts)
        assert whole.data_ptr() == parts[0].data_ptr()
        assert torch.equal(whole, torch.cat(parts))

    half = {"device": "cuda", "dtype": torch.bfloat16, "state_dim": 8, "d_model": 64}
    block = small(**half)
    check(block)
    before = [p.detach().clone() for p in block.parameters()]
    block.load_state_dict({key: 2 * value for key, value in block.state_dict().items()})
    assert all(torch.equal(p, 2 * old) for p, old in zip(block.parameters(), before, strict=True))
    optimizer = torch.optim.AdamW(block.parameters())
    x = torch.randn(1, 40, 64, **{key: half[key] for key in ("device", "dtype")})
    block(x)[0].sum().backward()
    optimizer.step()
    check(block)
    with torch.no_grad():
        wanted = block(x)[0]
        moved = small(**half | {"device": "cpu"}).cuda()
        check(moved)
        check(copy.deepcopy(block).float().half())
        for same in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), moved):
            same.load_state_dict(block.state_dict())
            torch.testing.assert_close(same(x)[0], wanted)
        # Where someone replaced one of them they are copied together, as ever.
        block.gate_proj.weight = torch.nn.Parameter(block.gate_proj.weight.clone())
        torch.testing.assert_close(block(x)[0], wanted)
