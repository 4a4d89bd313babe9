"""BLADE's slabs on two streams: in an order in which each stage finds what it needs, and with the same result."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from longctx import blocks
from longctx.ops import blade_pipeline
from longctx.ops import blade_training_layout as layout


@pytest.mark.parametrize("count", [1, 7, 128, 129, 1000, 20000])
@pytest.mark.parametrize("tokens", [1, 64, 512, 20000])
def test_slabs_of_a_gpu_are_few_and_fit_its_graphs(count, tokens):
    found = layout.slabs(count, tokens, torch.device("cuda"))
    sizes = [slab.stop - slab.start for slab in found]
    assert [slab.start for slab in found] == [0, *(slab.stop for slab in found[:-1])] and found[-1].stop == count
    assert max(sizes) == sizes[0] and min(sizes) > 0
    if count * tokens >= 5 * 8192:
        # Buffers of two neighbours, 6D a token of theirs.
        assert (
            max(map(sum, itertools.pairwise(sizes)), default=count) <= 3 * count / 8 + 16 or sizes[0] <= count / 5 + 8
        )
        assert sizes[0] * tokens <= 65536 + 8 * tokens
    if (count, tokens) == (128, 512):
        assert sizes == [32, 16, 32, 16, 32]
    if count >= 8 * len(sizes):
        assert sum(size % 8 > 0 for size in sizes) <= 1


class Stream:
    """One that notes what it is given to do, and what it waits for."""

    def __init__(self, log, name):
        self.log, self.name, self.done = log, name, 0

    def record_event(self):
        self.log.append((self.name, "record"))
        return len(self.log) - 1

    def wait_event(self, event):
        self.log.append((self.name, "wait", event))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


def finished_before(log, place):
    """Places of the log that have surely ended when the one at `place` begins."""
    name, seen = log[place][0], set()
    for earlier in range(place - 1, -1, -1):
        entry = log[earlier]
        if entry[0] == name:
            seen |= {earlier}
            if entry[1] == "wait":
                seen |= {entry[2]} | finished_before(log, entry[2])
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("beside", [True, False])
def test_the_order_of_the_stages(count, beside, monkeypatch):
    log = []
    here, second = Stream(log, "here"), Stream(log, "second")
    current = [here]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(blade_pipeline, "_second_stream", lambda device: second)

    def stage(name):
        return lambda index: log.append((current[-1].name, name, index))

    stages = [stage(name) for name in ("before", "chain", "after")]
    blade_pipeline.run(torch.device("cuda"), count, *stages, beside=beside)
    place = {entry[1:]: index for index, entry in enumerate(log) if entry[1] in ("before", "chain", "after")}
    assert len(place) == 3 * count
    for index in range(count):
        assert place["before", index] in finished_before(log, place["chain", index])
        assert place["chain", index] in finished_before(log, place["after", index])
        if index >= 1:
            assert place["chain", index - 1] in finished_before(log, place["chain", index])
        if index >= 2:
            # Two sets of buffers are enough.
            assert place["after", index - 2] in finished_before(log, place["before", index])
            assert place["after", index - 2] in finished_before(log, place["chain", index])
    log.append(("here", "end"))
    assert set(place.values()) <= finished_before(log, len(log) - 1)
    if beside and count > 1:
        assert place["before", 1] not in finished_before(log, place["chain", 0])
        assert place["chain", 0] not in finished_before(log, place["before", 1])


@pytest.mark.cuda
def test_a_second_stream_changes_no_gradient(monkeypatch):
    block = blocks.build("BLADE", d_model=512, n_heads=8, chunk_size=512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 48 * 512, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)

    def gradients():
        y, _ = block(x)
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], dy)]

    monkeypatch.setattr(blade_pipeline, "TRAINING_BESIDE", False)
    want = gradients()
    monkeypatch.setattr(blade_pipeline, "TRAINING_BESIDE", True)
    for _ in range(5):
        found = gradients()
        assert torch.equal(found[0], want[0])
        for got, expected in zip(found[1:], want[1:], strict=True):
            # Flash-attention adds up the gradient of queries in any order.
            assert (got - expected).norm() <= 5e-3 * expected.norm()
