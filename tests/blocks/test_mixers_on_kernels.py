"""Longformer and BigBird on their Triton kernels, streaming: on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from longctx import blocks
from longctx.blocks import _shell, bigbird, longformer
from longctx.ops import block_sparse_attention as lists
from longctx.ops import window_attention as windows
from longctx.ops.key_values import KeyValues

BLOCKS = {"block_size": 16, "num_window_blocks": 2, "num_random_blocks": 1, "num_global_blocks": 1}
CASES = [
    ("Longformer", {"window_size": 16, "num_global_tokens": 3}, (5, 40, 45, 70)),
    ("Longformer", {"window_size": 9, "num_global_tokens": 0}, (1, 2, 60)),
    ("Longformer", {"window_size": 5, "dilation": 3, "num_global_tokens": 1}, (50, 63)),
    ("Longformer", {"window_size": 4, "num_global_tokens": 10}, (4, 8, 50)),
    ("BigBird", BLOCKS, (1, 17, 64)),
    ("BigBird", {**BLOCKS, "num_random_blocks": 0}, (33, 80)),
]


def relative(got, want):
    return ((got.double().cpu() - want).norm() / want.norm()).item()


@torch.no_grad()
def check(name, options, cuts, *, batch, device, dtype, width, tolerance):
    torch.manual_seed(0)
    block = blocks.build(name, d_model=4 * width, n_heads=4, num_kv_heads=2, **options).double()
    x = torch.randn(batch, 110, 4 * width, dtype=torch.float64)
    want, _ = (longformer if name == "Longformer" else bigbird).reference(block, x)
    block, x = block.to(device, dtype), x.to(device, dtype)
    assert relative(block(x, keep_state=False)[0], want) < tolerance
    pieces, state = [], None
    for piece in x.tensor_split(cuts, dim=1):
        y, state = block(piece, state)
        pieces.append(y)
    errors = [relative(y, part) for y, part in zip(pieces, want.split([y.shape[1] for y in pieces], 1), strict=True)]
    assert max(errors) < tolerance, (name, options, errors)
    # A state that was made in another way goes on too, and one step at a time.
    with torch.enable_grad():
        y, state = block(x[:, :50])
    state = state.detach()
    pieces = [y]
    for t in range(50, 54):
        y, state = block.step(x[:, t : t + 1], state)
        pieces.append(y)
    pieces.append(block(x[:, 54:], state)[0])
    errors = [relative(y, part) for y, part in zip(pieces, want.split([y.shape[1] for y in pieces], 1), strict=True)]
    assert max(errors) < tolerance, (name, options, errors)


def check_all(device, dtype, width, tolerance):
    before = _shell.CPU_SLAB_TOKENS, _shell.GPU_SLAB_TOKENS
    try:
        for index, (name, options, cuts) in enumerate(CASES):
            for slab in (1000, 48):
                _shell.CPU_SLAB_TOKENS = _shell.GPU_SLAB_TOKENS = slab
                how = {"device": device, "dtype": dtype, "width": width, "tolerance": tolerance}
                check(name, options, cuts, batch=1 + index % 2, **how)
    finally:
        _shell.CPU_SLAB_TOKENS, _shell.GPU_SLAB_TOKENS = before


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_stream_in_slabs_equals_the_reference_without_kernels(index, monkeypatch):
    name, options, cuts = CASES[index]
    for slab in (1000, 48):
        monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", slab)
        check(name, options, cuts, batch=2, device="cpu", dtype=torch.float64, width=8, tolerance=1e-10)


def test_long_slabs_do_not_append_their_keys(monkeypatch):
    monkeypatch.setattr(_shell, "CPU_SLAB_TOKENS", 40)
    monkeypatch.setattr(KeyValues, "append", None)
    name, options, _ = CASES[0]
    block = blocks.build(name, d_model=32, n_heads=4, **options)
    with torch.no_grad():
        _, state = block(torch.randn(1, 140, 32))
        block(torch.randn(1, 70, 32), state)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_on_a_gpu(dtype):
    check_all("cuda", dtype, 32, 3e-2)


@pytest.mark.cuda
def test_bigbird_writes_keys_and_values_where_they_stay():
    block = blocks.build("BigBird", d_model=128, n_heads=4, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _, state = block(torch.randn(1, 1000, 128, device="cuda", dtype=torch.bfloat16))
        rows = bigbird._rows(state)
        assert rows is not None and rows.shape[1] == 1024


def test_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    interpreted()


if __name__ == "__main__":
    torch.set_num_threads(1)
    windows.kernel.fits = lists.kernel.fits = lambda x, *_: x.dtype == torch.float32
    check_all("cpu", torch.float32, 16, 1e-5)
    print("ok")
