"""The FLOPs of the cost models, against operations counted while the references run.

torch's own counter leaves out fused attention on a CPU and takes masked pairs for work, so there is one of our own: it
counts matrix products, and of every softmax the entries that a mask has left.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx import blocks
from longctx.config import BlockRequest, Cell

BATCH, WIDTH, HEADS = 3, 32, 4
# Global tokens are left out of BLADE and Longformer: their references project every token once more, to pick a few.
OPTIONS = {
    "Dense": [{"causal": True}, {"causal": False}],
    "Identity": [{}],
    "BLADE": [{"chunk_size": 8, "state_dim": 5}, {"chunk_size": 64, "state_dim": 3}],
    "DPASSM": [{"window_size": 8, "state_dim": 5}, {"window_size": 100, "state_dim": 3}],
    "Longformer": [
        {"window_size": 8, "num_global_tokens": 0},
        {"window_size": 6, "num_global_tokens": 0, "dilation": 3},
        {"window_size": 8, "num_global_tokens": 0, "causal": False},
    ],
    "BigBird": [{"block_size": 4}, {"block_size": 4, "causal": False}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


class Counted(TorchDispatchMode):
    """products: FLOPs of products with weights. pairs: query-key pairs that some softmax has not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.pairs = 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.products += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "_softmax":
            self.pairs += int((args[0] > float("-inf")).sum())
        elif name in ("mv", "addmv", "dot", "einsum", "baddbmm") or "attention" in name:
            raise AssertionError(f"{name} is work that nobody counts here")
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        """A pair costs a dot product and a weighted sum over the width of a head."""
        return self.products + 4.0 * (WIDTH // HEADS) * self.pairs


def built(name, options, num_kv_heads):
    spec = blocks.load(name)
    options = spec.check_options(options)
    shape = {"d_model": WIDTH, "n_heads": HEADS, "num_kv_heads": num_kv_heads}
    return spec, options, blocks.build(name, dtype=torch.float64, **shape, **options)


def cost_of(spec, options, length, num_kv_heads, mode="forward"):
    cell = Cell(
        block=BlockRequest(target=spec.label),
        length=length,
        batch_size=BATCH,
        d_model=WIDTH,
        n_heads=HEADS,
        num_kv_heads=num_kv_heads,
        dtype="fp64",
        mode=mode,
    )
    return spec.cost(cell, options)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("length", "num_kv_heads"), list(itertools.product([1, 29, 64], [4, 2])))
def test_the_cost_of_a_forward_is_what_its_definition_does(name, options, length, num_kv_heads):
    spec, options, block = built(name, options, num_kv_heads)
    x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
    with torch.no_grad(), Counted() as counted:
        # Identity's reference leaves out the queries and keys that the block computes to no end.
        block(x, keep_state=False) if name == "Identity" else spec.reference(block, x)
    # The recurrence is elementwise: a multiply-add for each state and token.
    recurrence = 2.0 * BATCH * length * options["state_dim"] if name == "DPASSM" else 0.0
    assert counted.flops + recurrence == cost_of(spec, options, length, num_kv_heads).flops


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("Identity", "BLADE")])
def test_a_backward_does_twice_the_products_of_its_forward(name, options):
    spec, options, block = built(name, options, 2)
    x = torch.randn(BATCH, 29, WIDTH, dtype=torch.float64, requires_grad=True)
    with Counted() as forward:
        y = spec.reference(block, x)[0]
    with Counted() as backward:
        torch.autograd.backward(y.sum(), inputs=[x, *block.parameters()])
    assert backward.products == 2 * forward.products
    once = cost_of(spec, options, 29, 2).flops
    assert cost_of(spec, options, 29, 2, mode="train").flops == 3 * once


@pytest.mark.parametrize(("name", "options"), CASES)
def test_bytes_are_at_least_the_weights_the_input_and_the_output_once(name, options):
    spec, options, block = built(name, options, 2)
    matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() > 1)
    assert cost_of(spec, options, 29, 2).bytes == 8 * (matrices + 2 * BATCH * 29 * WIDTH)
