"""What BLADE costs by its cost model, against counts by hand."""

from __future__ import annotations

from longctx.blocks.blade import SPEC
from longctx.config import BlockRequest, Cell


def cost(length, **cell):
    cell = {"d_model": 16, "n_heads": 4, "dtype": "fp32", **cell}
    options = SPEC.check_options({"chunk_size": 8, "state_dim": 5, "num_global_tokens": 3})
    return SPEC.cost(Cell(block=BlockRequest(target="BLADE"), length=length, **cell), options)


def test_cost_is_that_of_the_definition():
    length, chunks, pairs = 21, 3, 36 + 36 + 15 + 21 * 3
    shell = 21 * 12 * 16 * 16
    own = chunks * 2 * 16 * 5 + 3 * 16 * 32
    assert cost(length).flops == 2 * (shell + 2 * 16 * pairs + own)
    assert cost(length, mode="train", batch_size=2).flops == 6 * cost(length).flops
    weights = 12 * 16 * 16 + 2 * 16 * 5 + 3 * 16
    assert cost(length).bytes == 4 * (weights + 2 * 21 * 16)
    assert cost(length).state_bytes == 4 * (5 * 32 + 2 * 5 + 16)
    assert cost(24).state_bytes == 4 * (2 * 5 + 16)


def test_cost_of_a_token_depends_on_its_place_in_the_chunk():
    first, last, again = (cost(length, mode="decode") for length in (17, 24, 25))
    assert last.flops - first.flops == 4 * 16 * 7
    assert last.bytes - first.bytes == 4 * 7 * 32
    assert again.flops == first.flops
