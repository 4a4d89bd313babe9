"""What graphs of one stream share, and that it is theirs for as long as one of them is there."""

from __future__ import annotations

import gc

import pytest
import torch

from longctx.ops.cuda_graphs import capture

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def long_product():
    """A product whose sum is long and whose result is small: cuBLAS splits the sum, in its workspace."""
    a = torch.randn(64, 1 << 16, device=CUDA, dtype=torch.bfloat16)
    out = torch.empty(64, 64, device=CUDA, dtype=torch.bfloat16)
    return out, lambda: torch.mm(a, a.t(), out=out)


def pools() -> set:
    segments = torch.cuda.memory_snapshot()
    return {tuple(segment["segment_pool_id"]) for segment in segments} - {(0, 0)}


def doubled(x: torch.Tensor, out: torch.Tensor):
    return lambda: torch.add(x + 1, x - 1, out=out)


def test_graphs_of_one_stream_share_what_they_need_while_they_run():
    x, first, second, beside = torch.randn(4, 1 << 18, device=CUDA)
    before = pools()
    replays = [capture(doubled(x, first), CUDA), capture(doubled(x, second), CUDA)]
    assert len(pools() - before) <= 1
    for _ in range(3):
        x.normal_()
        for replay in replays:
            replay()
        assert torch.equal(first, x + 1 + (x - 1))
        assert torch.equal(second, first)
    # Also when all that used it are gone.
    del replays[:], replay
    gc.collect()
    replays.append(capture(doubled(x, first), CUDA))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        replays.append(capture(doubled(x, beside), CUDA))
        replays[-1]()
    torch.cuda.synchronize()
    assert torch.equal(beside, first)


def test_a_workspace_lasts_as_long_as_a_graph_that_writes_to_it():
    _, body = long_product()
    out, kept = long_product()
    gone, replay = capture(body, CUDA), capture(kept, CUDA)
    replay()
    wanted = out.clone()
    del gone, body
    gc.collect()
    # As Lightning does before and after training.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7, device=CUDA, dtype=torch.int32) for _ in range(64)]
    out.zero_()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
    assert all(bool((t == 7).all()) for t in others)
