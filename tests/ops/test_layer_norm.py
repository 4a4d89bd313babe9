"""What is kept of a norm until backward."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from longctx.ops import layer_norm as norms


def made(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_rows_are_computed_again_from_the_input_once(monkeypatch):
    """However many operations keep them, whole or in part."""
    x, gain, offset, first, second, other = made((2, 7, 6), (6,), (6,), (6, 6), (6, 6), (2, 7, 6))
    calls = []
    normalize = norms.normalize
    monkeypatch.setattr(norms, "normalize", lambda *args: calls.append(args) or normalize(*args))

    def mixed(u):
        return F.linear(u, first) * F.linear(u[:, :1], second) + other * u

    u = norms.layer_norm(x, gain, offset, 1e-5)
    with norms.kept_as_input(u, x, gain, offset, 1e-5):
        y = mixed(u)
    storage = StorageWeakRef(u.untyped_storage())
    del u
    assert storage.expired()
    calls.clear()
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, gain, offset, first, second, other), grad, retain_graph=True)
    assert len(calls) == 1
    want = mixed(F.layer_norm(x, (6,), gain, offset, 1e-5))
    expected = torch.autograd.grad(want, (x, gain, offset, first, second, other), grad)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)
    # And once more where the graph was retained.
    again = torch.autograd.grad(y, (x, first), grad)
    assert len(calls) == 2
    torch.testing.assert_close(again[0], expected[0])


def test_an_input_changed_meanwhile_is_an_error():
    x, gain, offset, weight = made((2, 7, 6), (6,), (6,), (6, 6))
    x = x * 1.0
    u = norms.layer_norm(x, gain, offset, 1e-5)
    with norms.kept_as_input(u, x, gain, offset, 1e-5):
        y = F.linear(u, weight)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("changed", ["input", "gain", "offset"])
def test_so_it_is_where_no_gradient_of_the_norm_is_wanted(changed):
    parts = dict(zip(("input", "gain", "offset", "weight"), made((2, 7, 6), (6,), (6,), (6, 6)), strict=True))
    weight = parts.pop("weight")
    x, gain, offset = (parts[name].detach() for name in parts)
    u = norms.layer_norm(x, gain, offset, 1e-5)
    with norms.kept_as_input(u, x, gain, offset, 1e-5):
        y = F.linear(u, weight)
    {"input": x, "gain": gain, "offset": offset}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_so_is_anything_else_that_was_kept():
    x, gain, offset, weight = made((2, 7, 6), (6,), (6,), (6, 6))
    u = norms.layer_norm(x, gain, offset, 1e-5)
    with norms.kept_as_input(u, x, gain, offset, 1e-5):
        y = F.linear(u, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_nothing_is_held_once_the_graph_is_gone():
    """A stack of layers would hold the input of each until garbage is collected."""
    x, gain, offset, weight = made((2, 7, 6), (6,), (6,), (6, 6))
    collects = gc.isenabled()
    gc.disable()
    try:
        rows = x * 1.0
        u = norms.layer_norm(rows, gain, offset, 1e-5)
        with norms.kept_as_input(u, rows, gain, offset, 1e-5):
            y = F.linear(u, weight)
        storage = StorageWeakRef(rows.untyped_storage())
        y.sum().backward()
        del rows, u, y
        assert storage.expired()
    finally:
        if collects:
            gc.enable()
