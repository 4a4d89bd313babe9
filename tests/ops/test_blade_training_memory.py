"""What a train step of BLADE keeps for backward, what it holds at its worst, and how often it asks the device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from longctx import blocks


class Watch(TorchDispatchMode):
    """Counts the bytes of what operations made that is still there, now and at most."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        before = {t.untyped_storage()._cdata for t in given}
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in before:
                storage = t.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


def case(*, tokens, d_model, n_heads, chunk_size, dtype, device=None, **options):
    shape = {"d_model": d_model, "n_heads": n_heads, "chunk_size": chunk_size, **options}
    block = blocks.build("BLADE", **shape, device=device, dtype=dtype)
    x = torch.randn(1, tokens, d_model, device=device, dtype=dtype).requires_grad_()
    return block, x, torch.randn_like(x)


def test_nine_rows_a_token_are_kept():
    block, x, _ = case(tokens=512, d_model=64, n_heads=4, chunk_size=32, dtype=torch.float32, state_dim=16)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, keep_state=False)
    for t in (x, *block.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    lse, states = 4 * 4 * 512, 4 * 16 * 16
    assert sum(kept.values()) == 9 * 64 * 4 * 512 + lse + states


def watched_step(eighth=256):
    """Rows of D a token held at most, but for parameters and their gradients, with the chains left out."""
    from longctx.ops import blade_table, blade_training_graph, blade_training_layout

    blade_training_graph.kernels_fit = lambda weights: True
    # Triton's interpreter would hold on to what it was given.
    blade_table.point = lambda table, tensors: None
    blade_training_graph.TrainingChain._graph = lambda self, key, body, rehearsal=None: lambda: None
    blade_training_layout.CPU_SLAB_TOKENS = eighth
    options = {"tokens": 8 * eighth, "d_model": 64, "n_heads": 4, "chunk_size": 16, "state_dim": 16}
    block, x, dy = case(**options, dtype=torch.bfloat16)
    block(x, keep_state=False)[0].backward(dy)
    x.grad = None
    block.zero_grad()
    with Watch() as watch:
        y, _ = block(x, keep_state=False)
        y.backward(dy)
    parameters = sum(p.numel() for p in block.parameters())
    # In half precision as they are given back, in fp32 as they are summed, and a product that is added.
    return (watch.most - (2 + 4 + 4) * parameters) / (2 * x.numel())


def test_what_a_step_holds(interpreted):
    interpreted("from test_blade_training_memory import check_step; check_step(); print('ok')")


def check_step():
    # y and dx, nine that are kept, an eighth of what a slab needs (nine where norms are torch's), and sums.
    held = watched_step()
    assert held < 2 + 9 + 9 / 8 + 0.5, held


def steps(tokens):
    block, x, dy = case(tokens=tokens, d_model=512, n_heads=8, chunk_size=512, dtype=torch.bfloat16, device="cuda")

    def step():
        x.grad = None
        block.zero_grad()
        # As a loop trains: the output is gone when its gradient comes.
        torch.sum(block(x, keep_state=False)[0] * dy, dtype=torch.float32).backward()

    step()
    x.grad = None
    block.zero_grad()
    torch.cuda.synchronize()
    return step


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [65536, 262144])
def test_memory_of_a_train_step_on_a_gpu(tokens):
    step = steps(tokens)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert (torch.cuda.max_memory_allocated() - before) / tokens <= 14336


@pytest.mark.cuda
def test_launches_of_a_train_step_on_a_gpu():
    step = steps(65536)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kinds = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    names = [event.name() for event in profile.profiler.kineto_results.events()]
    calls = Counter(name for name in names if name.startswith(kinds))
    # 530 of them were what the step waited for.
    assert 0 < sum(calls.values()) <= 280, calls
