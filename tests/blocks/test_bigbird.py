"""BigBird beyond what all blocks promise: its plan, its options, its cost, and the published module."""

from __future__ import annotations

import pytest
import torch

from longctx.blocks import build, load
from longctx.blocks.bigbird import BigBirdBlock, cost, reference, visible
from longctx.config import BlockRequest, Cell
from longctx.errors import UsageError


def make(*, d_model: int = 32, n_heads: int = 4, dtype: torch.dtype = torch.float64, **options) -> BigBirdBlock:
    return build("BigBird", d_model=d_model, n_heads=n_heads, dtype=dtype, **options)


def tokens(length: int, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, 32, dtype=dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


SHAPES = [
    {},
    {"block_size": 16, "num_kv_heads": 2},
    {"block_size": 8, "num_window_blocks": 1, "num_global_blocks": 1, "num_kv_heads": 1},
    {"block_size": 4, "num_random_blocks": 0},
    {"block_size": 8, "num_global_blocks": 0, "num_random_blocks": 5},
    {"block_size": 8, "causal": False},
    {"block_size": 4, "causal": False, "num_global_blocks": 3, "num_window_blocks": 5, "num_kv_heads": 2},
    {"block_size": 16, "causal": False, "num_global_blocks": 0, "num_random_blocks": 1},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 500, 1000])
def test_equals_the_reference(options, length):
    block, x = make(**options), tokens(length)
    want, _ = reference(block, x)
    with torch.inference_mode():
        got, _ = block(x, keep_state=False)
    assert relative(got, want) < 1e-9


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("length", [5, 65, 300])
def test_gradients_equal_those_of_the_reference(options, length):
    block, x = make(**options), tokens(length)
    weight = torch.randn_like(x)
    grads = []
    for function in (block, lambda y: reference(block, y)):
        y = x.clone().requires_grad_()
        loss = (function(y)[0] * weight).sum()
        grads.append(torch.autograd.grad(loss, [y, *block.parameters()]))
    for got, want in zip(*grads, strict=True):
        assert relative(got, want) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_narrow_types_stay_near_the_reference(dtype, causal):
    block, x = make(dtype=dtype, block_size=16, causal=causal), tokens(500, dtype=dtype)
    with torch.no_grad():
        got, _ = block(x)
        want, _ = reference(block.double(), x.double())
    limit = load("BigBird").tolerances[{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]]
    assert got.dtype == dtype
    assert relative(got.double(), want) < limit


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (7, 8, 9), (63, 64, 65, 200), (100, 101, 102, 296)])
def test_a_stream_equals_one_call(cuts, grad):
    block, x = make(block_size=8, num_kv_heads=2), tokens(300)
    with torch.set_grad_enabled(grad):
        whole, _ = block(x)
        pieces, state = [], None
        for piece in x.tensor_split(cuts, dim=1):
            y, state = block(piece, state)
            pieces.append(y)
    assert state.position == 300
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)


def test_steps_equal_one_call_and_go_on_after_it():
    block, x = make(block_size=4), tokens(90)
    with torch.no_grad():
        whole, _ = block(x)
        state, steps = block.init_state(2), []
        for t in range(60):
            y, state = block.step(x[:, t : t + 1], state)
            steps.append(y)
        y, state = block(x[:, 60:80], state)
        steps.append(y)
        for t in range(80, 90):
            y, state = block.step(x[:, t : t + 1], state)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-12)


def test_a_step_reads_the_blocks_it_sees_and_no_others():
    block, x = make(block_size=4), tokens(202)
    with torch.no_grad():
        _, state = block(x[:, :201])
        blocks_seen = visible(block, 202)[:, -1].view(4, -1, 2)[:, ::2, 0]
        for head in range(4):
            unseen = (~blocks_seen[head]).repeat_interleave(4)[: state.keys.shape[2]]
            unseen = torch.nn.functional.pad(unseen, (0, state.keys.shape[2] - len(unseen)))
            state.keys[:, head, unseen] = float("nan")
            state.values[:, head, unseen] = float("nan")
        y, _ = block.step(x[:, 201:], state)
    torch.testing.assert_close(y, reference(block, x)[0][:, -1:], rtol=1e-10, atol=1e-12)


def test_a_state_made_in_inference_mode_can_be_used_outside():
    block, x = make(block_size=8), tokens(70)
    with torch.inference_mode():
        _, state = block(x[:, :33])
    with torch.no_grad():
        y, state = block(x[:, 33:50], state)
    z, _ = block(x[:, 50:], state)
    want, _ = reference(block, x)
    torch.testing.assert_close(torch.cat([y, z], 1), want[:, 33:], rtol=1e-10, atol=1e-12)


def test_gradients_flow_through_a_state_and_detach_cuts_them():
    block, x = make(block_size=8), tokens(100)
    weight = torch.randn(2, 40, 32, dtype=torch.float64)
    grads = []
    for detach in (False, True):
        y = x.clone().requires_grad_()
        _, state = block(y[:, :60])
        out, _ = block(y[:, 60:], state.detach() if detach else state)
        grads.append(torch.autograd.grad((out * weight).sum(), y)[0])
    y = x.clone().requires_grad_()
    (want,) = torch.autograd.grad((reference(block, y)[0][:, 60:] * weight).sum(), y)
    assert relative(grads[0], want) < 1e-7
    assert relative(grads[1][:, 60:], want[:, 60:]) < 1e-7
    assert grads[1][:, :60].count_nonzero() == 0


def test_no_later_token_changes_an_earlier_one():
    block, x = make(block_size=8), tokens(200)
    with torch.no_grad():
        before, _ = block(x)
        for position in (1, 8, 77, 199):
            changed = x.clone()
            # Not by a constant: the norm would hide it from the keys and values.
            changed[:, position:] += torch.randn(32, dtype=torch.float64)
            after, _ = block(changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
            assert not torch.allclose(after[:, position], before[:, position])


def test_the_plan_of_a_longer_sequence_begins_with_that_of_a_shorter():
    plan = make(block_size=8).plan(1000)
    assert plan.shape == (4, 125, 3) and plan.dtype == torch.int64
    for length in (1, 8, 9, 65, 999):
        block = make(block_size=8)
        assert torch.equal(block.plan(length), plan[:, : -(-length // 8)])
    assert torch.equal(block.plan(1000), plan)
    assert not torch.equal(make(block_size=8, seed=1).plan(1000), plan)


def test_a_bidirectional_plan_is_drawn_for_each_length():
    block = make(block_size=8, causal=False)
    long, short = block.plan(400), block.plan(240)
    assert short.shape == (4, 30, 3) and int(short.max()) < 29
    assert torch.equal(block.plan(400), long)


def test_a_plan_made_in_inference_mode_serves_training():
    block = make(block_size=8)
    with torch.inference_mode():
        assert not block.plan(96).is_inference()
        block.set_plan(make(block_size=8, seed=7).plan(96).clone())
    assert not block.plan(96).is_inference()


def test_the_path_of_training_is_told():
    assert make().eval().mixer_path == "global, window and random products"
    assert "gradients through gathered blocks" in make().train().mixer_path
    assert make(dropout=0.1).train().mixer_path == "gathered blocks, SDPA"


@pytest.mark.parametrize("causal", [True, False])
def test_a_plan_that_is_set_is_the_one_used(causal):
    block, x = make(block_size=8, causal=causal), tokens(160)
    before = block(x)[0]
    plan = make(block_size=8, causal=causal, seed=7).plan(160).clone()
    plan[:, 15, 1] = -1
    block.set_plan(plan)
    assert torch.equal(block.plan(160), plan)
    after = block(x)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, reference(block, x)[0], rtol=1e-9, atol=1e-12)
    block.set_plan(None)
    assert torch.equal(block(x)[0], before)


def test_a_causal_plan_that_is_set_serves_shorter_sequences_and_streams():
    block, x = make(block_size=8), tokens(150)
    block.set_plan(make(block_size=8, seed=5).plan(160))
    want, _ = reference(block, x)
    first, state = block(x[:, :37])
    second, _ = block(x[:, 37:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="20 blocks"):
        block(tokens(161))


def test_plans_that_cannot_be_are_refused():
    block = make(block_size=8)
    plan = block.plan(160)
    for bad in (plan.float(), plan[:3], plan[..., :2], plan.clamp(max=-2), [[1]]):
        with pytest.raises(UsageError, match="plan"):
            block.set_plan(bad)
    with pytest.raises(UsageError, match="no random one"):
        block.set_plan(plan.flip(1))
    both = make(block_size=8, causal=False)
    both.set_plan(both.plan(160))
    with pytest.raises(UsageError, match="20 blocks"):
        both(tokens(100))


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"num_window_blocks": 0},
        {"num_random_blocks": -1},
        {"num_global_blocks": 1.5},
        {"seed": "x"},
        {"causal": False, "num_window_blocks": 2},
        {"window_blocks": 3},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError):
        make(**options)


def test_a_state_of_another_batch_is_refused():
    block = make(block_size=8)
    with pytest.raises(UsageError, match="batch"):
        block(tokens(4), block.init_state(3))


def test_dropout_is_for_training_alone():
    block, x = make(block_size=8, dropout=0.5), tokens(100)
    torch.testing.assert_close(block.eval()(x)[0], reference(block, x)[0], rtol=1e-9, atol=1e-12)
    block.train()
    assert not torch.allclose(block(x)[0], block(x)[0])


# -- cost ------------------------------------------------------------------------------------------------------


# Without causality there is no decoding.
MODES = [(o, m) for o in SHAPES for m in ("forward", "decode") if m == "forward" or o.get("causal", True)]


@pytest.mark.parametrize(("options", "mode"), MODES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 64, 65, 500])
def test_cost_counts_the_pairs_of_the_reference_mask(options, mode, length):
    options = dict(options)
    heads_kv = options.pop("num_kv_heads", 4)
    full = load("BigBird").check_options(options)
    shape = {"block": BlockRequest(target="BigBird"), "length": length, "d_model": 32, "n_heads": 4, "mode": mode}
    cell = Cell(**shape, num_kv_heads=heads_kv)
    mask = visible(make(num_kv_heads=heads_kv, **options), length)
    pairs = (mask[:, -1:] if mode == "decode" else mask).sum().item() / 4
    queries = 1 if mode == "decode" else length
    products = 2 * (32 * (32 + 2 * heads_kv * 8) + 9 * 32**2) * queries
    total = cost(cell, full)
    assert total.flops == pytest.approx(products + 4 * 32 * pairs, rel=1e-12)
    assert total.state_bytes == (2 * heads_kv * 8 * length * 4 if full["causal"] else 0)


# -- the published module --------------------------------------------------------------------------------------


def test_bidirectional_equals_the_transformers_module():
    pytest.importorskip("transformers", reason="transformers, an oracle of this test alone, is not installed")
    from transformers import BigBirdConfig
    from transformers.models.big_bird import modeling_big_bird as theirs

    size, length, heads, picks = 4, 64, 4, 3
    config = BigBirdConfig(
        hidden_size=32,
        num_attention_heads=heads,
        block_size=size,
        num_random_blocks=picks,
        attention_probs_dropout_prob=0.0,
        use_bias=False,
        max_position_embeddings=length,
    )
    module = theirs.BigBirdBlockSparseAttention(config, seed=0).double().train()
    block, u = make(block_size=size, causal=False, num_random_blocks=picks), tokens(length)
    with torch.no_grad():
        block.qkv_proj.weight.copy_(torch.cat([module.query.weight, module.key.weight, module.value.weight]))
    captured = {}
    create = module._create_rand_mask_from_inputs

    def capture(*args):
        captured["plan"] = torch.as_tensor(args[2][0], dtype=torch.int64)
        return create(*args)

    module._create_rand_mask_from_inputs = capture
    ones = torch.ones(2, length, dtype=torch.float64)
    blocks, band, rows, columns = theirs.BigBirdModel.create_masks_for_block_sparse_attn(ones, size)
    want = module(
        u,
        band_mask=band,
        from_mask=rows,
        to_mask=columns,
        from_blocked_mask=blocks,
        to_blocked_mask=blocks,
    )[0]
    block.set_plan(torch.nn.functional.pad(captured["plan"], (0, 0, 1, 1), value=-1))
    block.out_proj = torch.nn.Identity()
    got, _ = block.mix(u, None, False)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
