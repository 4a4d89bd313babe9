"""What every block promises where nothing runs yet: compiled or exported in one graph, or on the meta device."""

from __future__ import annotations

import pytest
import torch
from every_block import every_block, make, reference, relative, tokens
from torch import nn


@every_block
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_one_graph_in_which_the_length_is_open(name, grad):
    torch.compiler.reset()
    block = make(name)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for length in (50, 33, 64):
            x = tokens(length)
            y, state = compiled(x)
            assert relative(y, reference(block, x)) < 1e-9
            y, _ = block.step(x[:, :1], state)  # which goes on where nothing is compiled
            assert relative(y, reference(block, torch.cat([x, x[:, :1]], 1))[:, -1:]) < 1e-9


@every_block
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_an_exported_block_runs_with_and_without_gradients(name, grad):
    block, x = make(name).eval(), tokens(50)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(_OutputAlone(block), (x,)).module()
    x = tokens(50)
    want = reference(block, x)
    assert relative(exported(x), want) < 1e-9
    with torch.no_grad():
        assert relative(exported(x), want) < 1e-9


@every_block
@pytest.mark.parametrize("recompute", ["norms", "block"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_shapes_without_memory(name, recompute, grad):
    with torch.device("meta"):
        block, x = make(name, recompute=recompute), tokens(50)
    with torch.set_grad_enabled(grad):
        y, state = block(x)
        assert y.is_meta and y.shape == x.shape
        y_t, _ = block.step(x[:, :1], state)
        assert y_t.is_meta and y_t.shape == (2, 1, 32)
        if grad:
            y.sum().backward()
            assert block.ffn_up.weight.grad.is_meta
    values = make(name)
    block.to_empty(device="cpu").load_state_dict(values.state_dict())
    x = tokens(50)
    assert relative(block(x)[0], reference(values, x)) < 1e-9


class _OutputAlone(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, keep_state=False)[0]
