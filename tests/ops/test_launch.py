"""A launch that looks nothing up twice must run what Triton would have run."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from longctx.ops import launch as launching  # noqa: E402
from longctx.ops.launch import launch  # noqa: E402

pytestmark = pytest.mark.cuda


@triton.jit
def _scaled(x, out, count, factor, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    tl.store(out + place, tl.load(x + place, mask=there) * factor + SHIFT, mask=there)


def scaled(x, factor, *, block=128, shift=0):
    out = torch.empty_like(x)
    grid = (-(-x.numel() // block),)
    launch(_scaled, grid, (x, out, x.numel(), factor), {"BLOCK": block, "SHIFT": shift}, num_warps=4)
    return out


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(launching, "_variants", {})


def test_every_variant_is_the_one_for_its_arguments():
    # Positive: product and sum may be rounded once, which shows where they cancel.
    base = torch.rand(4096, device="cuda")
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            # One element, a multiple of 16, neither; aligned and not.
            for first, count in ((0, 1), (0, 512), (0, 777), (1, 512), (3, 777)):
                x = base.to(dtype)[first : first + count]
                for factor in (1, 3, 2.5):
                    assert torch.equal(scaled(x, factor), x * factor), (dtype, first, count, factor)
                torch.testing.assert_close(scaled(x, 3, block=256, shift=1), x * 3 + 1)


def test_lengths_without_end_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(launching, "MOST_VARIANTS", 8)
    x = torch.randn(100, device="cuda")
    for count in range(1, 50):
        assert torch.equal(scaled(x[:count], 2.0), x[:count] * 2.0)
        assert len(launching._variants) <= 8


def test_it_runs_on_the_stream_that_is_current():
    x = torch.ones(1 << 20, device="cuda")
    scaled(x, 2.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        out = scaled(x, 2.0)
        assert not side.query()
    side.synchronize()
    assert out.sum().item() == 2.0 * (1 << 20)


def test_who_listens_to_launches_hears_of_them():
    hook = triton.knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):
        pytest.skip(f"Triton {triton.__version__} has a single hook")
    x, heard = torch.ones(64, device="cuda"), []

    def listen(metadata):
        heard.append(metadata.get()["name"])

    scaled(x, 2.0)
    hook.add(listen)
    try:
        scaled(x, 2.0)
    finally:
        hook.remove(listen)
    scaled(x, 2.0)
    assert heard == ["_scaled"]
