"""What every block promises under torch.compile and torch.export: one graph, which serves more than one length."""

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


class _OutputAlone(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, keep_state=False)[0]
