"""Block plans and block-sparse attention against definitions that are written out one entry at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longctx.errors import UsageError
from longctx.ops import gathered_lists
from longctx.ops.block_plan import BlockPattern, check_plan, draw_random_blocks, transposed_plan, visible_blocks
from longctx.ops.block_sparse_attention import BlockSparse, _numbers, block_sparse_attention

CAUSAL = BlockPattern(block_size=4, num_window_blocks=3, num_random_blocks=3, num_global_blocks=2, causal=True)
BOTH = dataclasses.replace(CAUSAL, causal=False)


def seen_without_random(pattern: BlockPattern, block: int, n: int) -> set[int]:
    """Globals and window of one query block, from the words of the paper."""
    if pattern.causal:
        near = set(range(block - pattern.num_window_blocks + 1, block + 1))
        return {j for j in near | set(range(pattern.num_global_blocks)) if 0 <= j <= block}
    half, tail = pattern.num_window_blocks // 2, pattern.num_global_blocks // 2
    ends = set(range(pattern.num_global_blocks - tail)) | set(range(n - tail, n))
    return {j for j in ends | set(range(block - half, block + half + 1)) if 0 <= j < n}


def draw(pattern: BlockPattern, n: int, seed: int = 0, heads: int = 3) -> torch.Tensor:
    return draw_random_blocks(pattern, seed=seed, n_heads=heads, n_blocks=n)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8, 9, 40])
@pytest.mark.parametrize("pattern", [CAUSAL, BOTH, dataclasses.replace(BOTH, num_global_blocks=3)])
def test_random_blocks_are_distinct_allowed_and_as_many_as_there_can_be(pattern, n):
    plan = draw(pattern, n)
    check_plan(pattern, plan, 3)
    for block in range(n):
        seen = seen_without_random(pattern, block, n)
        allowed = set(range(block if pattern.causal else n)) - seen
        if pattern.sees_all(block, n):
            allowed = set()
        for head in range(3):
            row = plan[head, block].tolist()
            drawn = [j for j in row if j >= 0]
            assert row == sorted(drawn) + [-1] * (len(row) - len(drawn))
            assert len(set(drawn)) == len(drawn) == min(pattern.num_random_blocks, len(allowed))
            assert set(drawn) <= allowed


def test_a_causal_plan_is_a_prefix_of_a_longer_one():
    long = draw(CAUSAL, 200)
    for n in (1, 5, 9, 64, 199):
        assert torch.equal(draw(CAUSAL, n), long[:, :n])


def test_plan_depends_on_seed_head_and_block():
    plan = draw(CAUSAL, 100)
    assert torch.equal(plan, draw(CAUSAL, 100))
    assert not torch.equal(plan[0], plan[1])
    assert not torch.equal(plan[0, 50:75], plan[0, 75:])
    for other in (1, -1, 2**40, 2**63):
        assert not torch.equal(plan, draw(CAUSAL, 100, seed=other))
    assert torch.equal(plan, draw(CAUSAL, 100, heads=5)[:3])


@pytest.mark.parametrize("pattern", [CAUSAL, BOTH])
def test_every_allowed_block_is_drawn_equally_often(pattern):
    heads, n, block = 20_000, 14, 12
    drawn = draw(pattern, n, heads=heads)[:, block].flatten()
    if not pattern.causal:
        drawn = draw(pattern, n, heads=heads)[:, 6].flatten()
        block = 6
    counts = torch.bincount(drawn, minlength=n).double() / heads
    others = set(range(block if pattern.causal else n)) - seen_without_random(pattern, block, n)
    share = pattern.num_random_blocks / len(others)
    for j in range(n):
        expected = share if j in others else 0.0
        # Five standard deviations of a binomial share.
        assert abs(counts[j] - expected) <= 5 * (share * (1 - share) / heads) ** 0.5 * (expected > 0)


def test_a_plan_is_known_by_its_numbers():
    """Streams, checkpoints and machines must agree on the plan: a change of the hash is a change of the block."""
    plan = draw(CAUSAL, 64, heads=2)
    assert plan[:, [8, 20, 63]].tolist() == [
        [[2, 3, 4], [9, 14, 15], [3, 8, 49]],
        [[2, 3, 5], [11, 14, 15], [12, 18, 24]],
    ]


@pytest.mark.parametrize("pattern", [CAUSAL, BOTH])
def test_lists_name_each_visible_block_once(pattern):
    n = 11
    plan = draw(pattern, n)
    first, last = pattern.inner(n) if not pattern.causal else (0, n)
    lists = visible_blocks(pattern, plan, first, last, n)
    for head in range(3):
        for block in range(first, last):
            listed = [j for j in lists[head, block - first].tolist() if j >= 0]
            random = {j for j in plan[head, block].tolist() if j >= 0}
            assert len(listed) == len(set(listed))
            assert set(listed) == seen_without_random(pattern, block, n) | random
            if pattern.causal:
                assert listed[-1] == block


def test_complete_lists_have_no_hole_and_the_others_do():
    for pattern in (CAUSAL, BOTH):
        for n in range(1, 30):
            first, last = (0, n) if pattern.causal else pattern.inner(n)
            lists = visible_blocks(pattern, draw(pattern, n), first, last, n)
            full = {first + i for i in (lists >= 0).all(-1).all(0).nonzero().flatten().tolist()}
            assert full == set(pattern.complete(n * pattern.block_size))


@pytest.mark.parametrize("picks", [0, 3])
def test_a_plan_transposed_names_the_readers_of_each_block(picks):
    plan = draw(dataclasses.replace(CAUSAL, num_random_blocks=picks), 14)
    readers, ends = transposed_plan(plan, 12)
    for head in range(plan.shape[0]):
        for block in range(12):
            listed = readers[head, ends[head, block] : ends[head, block + 1]].tolist()
            assert listed == [i for i in range(12) if block in plan[head, i].tolist()]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda plan: plan.int(), "int64"),
        (lambda plan: plan[:2], "not [2, 12, 3]"),
        (lambda plan: plan[..., :2], "not [3, 12, 2]"),
        (lambda plan: plan.index_fill(2, torch.tensor([0]), 0), "no random one"),
        (lambda plan: plan.where(plan < 0, 11), "no random one"),
        (lambda plan: plan.where(plan >= 0, -2), "no random one"),
        (lambda plan: plan.where(plan < 0, 2), "twice"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, word):
    with pytest.raises(UsageError) as refused:
        check_plan(CAUSAL, change(draw(CAUSAL, 12)), 3)
    assert word in str(refused.value)


def attention_by_definition(q, k, v, sparse: BlockSparse) -> torch.Tensor:
    """One query of one head at a time, over the keys that the words allow."""
    pattern, size = sparse.pattern, sparse.pattern.block_size
    n = sparse.n_blocks
    rows = []
    for t in range(q.shape[1]):
        position = sparse.start + t
        block = position // size
        for head in range(q.shape[2]):
            seen = seen_without_random(pattern, block, n)
            seen |= {j for j in sparse.plan[head, block].tolist() if j >= 0}
            if pattern.sees_all(block, n):
                seen = set(range(n))
            limit = position + 1 if pattern.causal else sparse.length
            keys = [s for j in sorted(seen) for s in range(j * size, min((j + 1) * size, limit))]
            kv = head // (q.shape[2] // k.shape[1])
            scores = torch.einsum("bk,bsk->bs", q[:, t, head], k[:, kv, keys]) / q.shape[3] ** 0.5
            rows.append(torch.einsum("bs,bsk->bk", scores.softmax(-1), v[:, kv, keys]))
    return torch.stack(rows, 1).view(q.shape)


def case(pattern: BlockPattern, *, length: int, start: int = 0, batch: int = 2, dtype=torch.float64):
    """q `[B, length - start, 4, 8]`, k and v `[B, 2, S, 8]` and what they see."""
    torch.manual_seed(0)
    n = pattern.count(length)
    sparse = BlockSparse(
        pattern=pattern,
        plan=draw_random_blocks(pattern, seed=0, n_heads=4, n_blocks=n),
        complete=pattern.complete(length),
        start=start,
        length=length,
    )
    q = torch.randn(batch, length - start, 4, 8, dtype=dtype)
    k, v = (torch.randn(batch, 2, n * pattern.block_size, 8, dtype=dtype) for _ in range(2))
    return q, k, v, sparse


@pytest.mark.parametrize(("length", "start"), [(1, 0), (3, 0), (4, 0), (50, 0), (77, 0), (77, 6), (77, 33), (61, 60)])
def test_causal_attention_is_the_definition(length, start):
    q, k, v, sparse = case(CAUSAL, length=length, start=start)
    torch.testing.assert_close(block_sparse_attention(q, k, v, sparse), attention_by_definition(q, k, v, sparse))


@pytest.mark.parametrize("n_global", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [1, 9, 40, 50])
def test_bidirectional_attention_is_the_definition(length, n_global):
    q, k, v, sparse = case(dataclasses.replace(BOTH, num_global_blocks=n_global), length=length)
    torch.testing.assert_close(block_sparse_attention(q, k, v, sparse), attention_by_definition(q, k, v, sparse))


@pytest.mark.parametrize("zero", ["num_random_blocks", "num_global_blocks"])
def test_patterns_without_random_or_global_blocks(zero):
    q, k, v, sparse = case(dataclasses.replace(CAUSAL, **{zero: 0}), length=70)
    torch.testing.assert_close(block_sparse_attention(q, k, v, sparse), attention_by_definition(q, k, v, sparse))


@pytest.mark.parametrize("pattern", [CAUSAL, BOTH])
def test_slabs_of_any_size_give_the_same(pattern, monkeypatch):
    q, k, v, sparse = case(pattern, length=99)
    whole = block_sparse_attention(q, k, v, sparse)
    monkeypatch.setattr(gathered_lists, "CPU_SLAB_BYTES", 1)
    monkeypatch.setattr(gathered_lists, "CPU_RUN_BLOCKS", 3)
    torch.testing.assert_close(block_sparse_attention(q, k, v, sparse), whole)


@pytest.mark.parametrize("pattern", [CAUSAL, BOTH])
def test_gradients_are_those_of_the_definition(pattern, monkeypatch):
    monkeypatch.setattr(gathered_lists, "CPU_SLAB_BYTES", 1)
    q, k, v, sparse = case(pattern, length=54, batch=1)
    weight = torch.randn_like(q)
    grads = []
    for function in (block_sparse_attention, attention_by_definition):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        (function(*inputs, sparse) * weight).sum().backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_dropout_draws_the_same_weights_in_the_backward_pass():
    """The output is linear in v, so its directional derivative is the output itself, for the same dropped weights."""
    q, k, v, sparse = case(CAUSAL, length=54, batch=1)
    v.requires_grad_()
    torch.manual_seed(3)
    out = block_sparse_attention(q, k, v, sparse, dropout=0.4)
    weight = torch.randn_like(out)
    state = torch.get_rng_state()
    (grad,) = torch.autograd.grad(out, v, weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close((grad * v).sum(), (out * weight).sum())
    assert not torch.allclose(out, block_sparse_attention(q, k, v, sparse))


@pytest.mark.parametrize("pattern", [CAUSAL, BOTH])
def test_gradients_under_dropout_against_finite_differences(pattern):
    q, k, v, sparse = case(pattern, length=22, batch=1)

    def drawn(*inputs):
        torch.manual_seed(3)
        return block_sparse_attention(*inputs, sparse, dropout=0.4)

    assert torch.autograd.gradcheck(drawn, [t.requires_grad_() for t in (q, k, v)], fast_mode=True)


def test_formats_are_those_of_the_inputs_under_autocast():
    q, k, v, sparse = case(CAUSAL, length=54, batch=1, dtype=torch.float32)
    q.requires_grad_()
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = block_sparse_attention(q, k, v, sparse, dropout=0.3)
            found.append((out, *torch.autograd.grad(out.square().sum(), q)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_rows_that_see_every_key_are_cut_where_they_are_too_many(monkeypatch):
    q, k, v, sparse = case(BOTH, length=54, batch=1)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(block_sparse_attention(*inputs, sparse).square().sum(), inputs)
    monkeypatch.setattr(gathered_lists, "CPU_SLAB_BYTES", 4096)
    runs = [run for run in gathered_lists.runs(q, sparse, 0.0, backward=True) if run.kind == "all"]
    assert {run.rows for run in runs} == {1}
    found = torch.autograd.grad(block_sparse_attention(*inputs, sparse).square().sum(), inputs)
    torch.testing.assert_close(found, wanted)


def test_the_gathered_lists_are_one_operator_to_torch():
    q, k, v, sparse = case(CAUSAL, length=54, batch=1)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    numbers = _numbers(sparse)
    op = torch.ops.longctx.block_sparse_attention.default
    # What dropout draws is compared by the seed; the same operator twice is not.
    torch.library.opcheck(op, (*inputs, sparse.plan, numbers, 0.3, torch.tensor(7)))
    torch.library.opcheck(op, (*inputs, sparse.plan, numbers, 0.0, None))
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for dropout in (0.0, 0.3):
        results = []
        for call in (block_sparse_attention, compiled):
            torch.manual_seed(3)
            out = call(*inputs, sparse, dropout=dropout)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_types(dtype, tolerance):
    q, k, v, sparse = case(CAUSAL, length=77, dtype=dtype)
    out = block_sparse_attention(q, k, v, sparse)
    exact = attention_by_definition(q.double(), k.double(), v.double(), sparse)
    assert out.dtype == dtype
    assert (out - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_not_seen_have_no_part(dtype):
    q, k, v, sparse = case(CAUSAL, length=78, dtype=dtype)
    first = block_sparse_attention(q, k, v, sparse)
    k[:, :, 78:], v[:, :, 78:] = 1e4, 1e4
    assert torch.equal(block_sparse_attention(q, k, v, sparse), first)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_agrees_with_the_cpu(dtype, causal):
    pattern = dataclasses.replace(CAUSAL if causal else BOTH, block_size=64)
    q, k, v, sparse = case(pattern, length=1500, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = block_sparse_attention(*exact, sparse)
    expected.sum().backward()
    narrow = [x.to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    sparse = dataclasses.replace(
        sparse, plan=draw_random_blocks(pattern, seed=0, n_heads=4, n_blocks=sparse.n_blocks, device="cuda")
    )
    out = block_sparse_attention(*narrow, sparse)
    out.sum().backward()
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert (out.cpu() - expected).norm() <= tolerance * expected.norm()
    for ours, theirs in zip(narrow, exact, strict=True):
        assert (ours.grad.cpu() - theirs.grad).norm() <= 2 * tolerance * theirs.grad.norm()
