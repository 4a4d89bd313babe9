"""Projections that write where they are wanted, and the gradient of first tokens that is added in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longctx.ops.projections import joined, project_beside, project_into


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("behind", [0, 4])
def test_a_product_in_a_longer_buffer(batch, behind):
    u, weight = torch.randn(batch, 7, 5), torch.randn(6, 5)
    buffer = torch.zeros(batch, behind + 7, 6)
    project_into(u.transpose(0, 1).contiguous().transpose(0, 1), weight, out=buffer[:, behind:])
    torch.testing.assert_close(buffer[:, behind:], u @ weight.T)
    assert not buffer[:, :behind].any()


def test_weights_behind_each_other_are_not_copied():
    rows = torch.arange(60.0).view(12, 5)
    parts = rows[:11].split([5, 4, 2])
    whole = joined(*parts)
    assert torch.equal(whole, rows[:11])
    assert whole.data_ptr() == rows.data_ptr()
    # In another order, with a gap, in memories of their own, of two formats.
    for others in (
        (parts[1], parts[0]),
        (parts[0], parts[2]),
        tuple(p.clone() for p in parts),
        (parts[0], parts[1].double()),
    ):
        whole = joined(*others)
        assert torch.equal(whole, torch.cat(others))
        assert whole.data_ptr() != others[0].data_ptr()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_first_tokens_beside_all(count):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 5), (6, 5), (4, 5))]
    every, first = project_beside(*inputs, count)
    torch.testing.assert_close(every, F.linear(inputs[0], inputs[1]))
    torch.testing.assert_close(first, F.linear(inputs[0][:, :count], inputs[2]))
    assert torch.autograd.gradcheck(project_beside, (*inputs, count))
    for used in (0, 1):
        grads = torch.autograd.grad(project_beside(*inputs, count)[used].sum(), inputs, allow_unused=True)
        assert grads[2 - used] is None and grads[0] is not None


def test_without_autograd_and_under_autocast():
    u, weight, of_first = torch.randn(1, 7, 5), torch.randn(6, 5), torch.randn(4, 5, requires_grad=True)
    with torch.no_grad():
        assert not project_beside(u, weight, of_first, 2)[1].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert project_beside(u, weight, of_first, 2)[1].dtype == torch.bfloat16
