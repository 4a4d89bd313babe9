"""What is kept of a norm until backward."""

from __future__ import annotations

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
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
