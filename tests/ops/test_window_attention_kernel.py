"""The Triton kernels of window attention against the dense mask, on a GPU and under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_window_attention import dense, visible_keys

from longctx.ops import window_attention as module
from longctx.ops.window_attention import kernel, packed_window_attention, window_attention

CASES = [
    {"queries": 1, "keys": 1},
    {"queries": 2, "keys": 2},
    {"queries": 63, "keys": 63},
    {"queries": 64, "keys": 64},
    {"queries": 65, "keys": 65},
    {"queries": 200, "keys": 200},
    {"queries": 5, "keys": 200},
    {"queries": 130, "keys": 327},
    {"queries": 300, "keys": 300, "window": 1},
    {"queries": 300, "keys": 300, "window": 64},
    {"queries": 300, "keys": 300, "window": 65},
    {"queries": 300, "keys": 300, "window": 1000},
    {"queries": 300, "keys": 300, "dilation": 3},
    {"queries": 120, "keys": 301, "dilation": 2},
    {"queries": 300, "keys": 300, "count": 1, "key_offset": 1},
    {"queries": 300, "keys": 300, "count": 70, "key_offset": 70},
    {"queries": 300, "keys": 300, "count": 5, "key_offset": 0},
    {"queries": 40, "keys": 140, "count": 3, "key_offset": 900},
    {"queries": 200, "keys": 200, "causal": False},
    {"queries": 200, "keys": 200, "causal": False, "window": 2},
    {"queries": 200, "keys": 200, "causal": False, "count": 3, "key_offset": 3, "window": 150},
]
# Few, as the interpreter is slow: an odd rest, keys before the queries, dilation, globals, both directions.
INTERPRETED = [
    {"queries": 65, "keys": 65, "batch": 2},
    {"queries": 5, "keys": 90, "window": 64},
    {"queries": 70, "keys": 131, "dilation": 2, "window": 20},
    {"queries": 90, "keys": 90, "count": 5, "key_offset": 0, "window": 30},
    {"queries": 70, "keys": 70, "count": 18, "key_offset": 18, "groups": 1, "window": 3},
    {"queries": 70, "keys": 70, "causal": False, "count": 3, "key_offset": 3, "window": 20},
]


def case(*, device, dtype, queries, keys, width, count=0, groups=2, window=100, heads=4, batch=2, **how):
    """(inputs, the same in fp64 on a CPU, keywords): all but the globals strided views, as a projection gives them."""
    rows = torch.randn(batch, keys, (heads + 2 * groups) * width).to(dtype)
    far = torch.randn(2, batch, count, groups, width).to(dtype)
    parts = rows.split([heads * width, groups * width, groups * width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
    inputs = [q[:, keys - queries :], k, v, *(far.unbind() if count else ())]
    return [x.to(device) for x in inputs], [x.double() for x in inputs], {"window": window, **how}


def named(inputs):
    return dict(zip(("global_k", "global_v"), inputs[3:], strict=False))


def results(attend, inputs, how, upstream):
    """(out, gradient of every input) in fp64 on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs[:3], **how, **named(inputs))
    upstream = upstream.to(out)
    grads = torch.autograd.grad(out, inputs, upstream, allow_unused=True, materialize_grads=True)
    return [x.detach().double().cpu() for x in (out, *grads)]


def errors(found, exact):
    """Of the output and each gradient, relative; a gradient that is zero by nature is measured by the output."""
    least = exact[0].norm()
    return [((x - y).norm() / y.norm().clamp(min=1e-2 * least)).item() for x, y in zip(found, exact, strict=True)]


def masked_sdpa(q, k, v, *, global_k=None, global_v=None, **how):
    """torch's attention under a mask that is written out: what the kernels' errors are held against."""
    mask = visible_keys(q, k, global_k=global_k, **how)
    if global_k is not None:
        k, v = torch.cat([k, global_k], dim=1), torch.cat([v, global_v], dim=1)
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def weights(op, q, k, v, global_k, global_v, *others):
    """What each query gives each key, `[B, H, T, g + S]`: the outputs for values of one that is 1 and others 0."""
    far, width = global_k.shape[1], q.shape[3]
    columns = far + k.shape[1]
    units = torch.eye(columns, dtype=q.dtype, device=q.device)
    units = F.pad(units, (0, -columns % width)).unflatten(1, (-1, width)).transpose(0, 1)
    parts = []
    for values in units:
        values = values[None, :, None].expand(k.shape[0], -1, k.shape[2], -1).contiguous()
        parts.append(op(q, k, values[:, far:], global_k, values[:, :far], *others)[0])
    return torch.cat(parts, dim=-1)[..., :columns].transpose(1, 2)


def check_dropout(device, dtype, tolerance):
    """Output and gradients are those of the dense definition under the draw that the weights show."""
    inputs, _, _ = case(device=device, dtype=dtype, queries=40, keys=49, width=16, count=3, batch=1)
    inputs = [x.detach().requires_grad_() for x in inputs]
    op = torch.ops.longctx.window_attention.default
    how = (20, 4, 0.4, torch.tensor([1 << 40], device=device))
    with torch.no_grad():
        drawn = weights(op, *inputs, *how).double().cpu()
    q, k, v, global_k, global_v = exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    at = torch.arange(40)[:, None] + 9 - torch.arange(49)
    seen = torch.cat([torch.ones(40, 3, dtype=torch.bool), (at <= 20) & (at >= -4)], dim=1)
    keys, values = (torch.cat(pair, dim=1).repeat_interleave(2, dim=2) for pair in ((global_k, k), (global_v, v)))
    scores = torch.einsum("bthk,bshk->bhts", q, keys) / 4
    plain = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    dropped = plain * (drawn != 0) / 0.6
    assert (dropped - drawn).abs().max() < tolerance
    share = (drawn[:, :, seen] == 0).double().mean().item()
    assert abs(share - 0.4) < 0.03, share
    out, sums = op(*inputs, *how)
    exact_sums = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    # A line of them is a multiple of 16 long.
    torch.testing.assert_close(sums.double().cpu(), F.pad(exact_sums, (0, 8)), atol=1e-2, rtol=0)
    expected = torch.einsum("bhts,bshk->bthk", dropped, values)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(out, inputs, upstream.to(out))
    wanted = torch.autograd.grad(expected, exact, upstream)
    found = [x.detach().double().cpu() for x in (out, *found)]
    assert max(errors(found, [expected.detach(), *wanted])) < tolerance
    assert not torch.equal(out, op(*inputs, *how[:3], how[3] + 1)[0])


def check_packed(device, dtype, tolerance, *, width, tokens=90, heads=4, groups=2, batch=2, count=0, **how):
    """A projection in one tensor: the same, and its gradient is that of the dense definition."""
    qkv = torch.randn(batch, tokens, heads + 2 * groups, width).to(dtype)
    rows = torch.randn(batch, count, heads, width).to(dtype) if count else None

    def by_definition(qkv, rows):
        q, k, v = qkv.split([heads, groups, groups], dim=2)
        far = {"global_k": k[:, :count], "global_v": v[:, :count], "key_offset": count} if count else {}
        out = dense(q[:, count:], k[:, count:], v[:, count:], **how, **far)
        return torch.cat([rows, out], dim=1) if count else out

    def packed(qkv, rows):
        return packed_window_attention(qkv, n_heads=heads, global_rows=rows, **how)

    upstream = torch.randn(batch, tokens, heads, width).to(dtype)
    both = []
    for attend, where, kind in ((packed, device, dtype), (by_definition, "cpu", torch.float64)):
        inputs = [t.to(where, kind).requires_grad_() for t in (qkv, rows) if t is not None]
        out = attend(*inputs, *(() if count else (None,)))
        grads = torch.autograd.grad(out, inputs, upstream.to(out), allow_unused=True, materialize_grads=True)
        both.append([out, *grads])
    found = errors([x.detach().double().cpu() for x in both[0]], [x.detach() for x in both[1]])
    assert max(found) < tolerance, found


PACKED = [
    {"window": 30},
    {"window": 20, "count": 3},
    {"window": 9, "count": 90},
    {"window": 20, "count": 18, "causal": False},
    {"window": 20, "dilation": 3, "count": 1},
]


def check_operator(device, dtype):
    """What autograd, compilation and functional transforms ask of an operator."""
    inputs, _, _ = case(device=device, dtype=dtype, queries=20, keys=23, width=16, count=3, batch=1)
    inputs = [x.detach().requires_grad_() for x in inputs]
    seed = torch.tensor([7], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.longctx.window_attention.default
    torch.library.opcheck(op, (*inputs, 9, 2, 0.25, seed), test_utils=tests)
    torch.library.opcheck(op, (*inputs[:3], None, None, 9, 0, 0.0, None), test_utils=tests)
    qkv = torch.cat([inputs[0].detach(), *(x.detach()[:, 3:] for x in inputs[1:3])], dim=2).requires_grad_()
    op = torch.ops.longctx.packed_window_attention.default
    torch.library.opcheck(op, (qkv, None, 4, 9, 0, 0.0, None), test_utils=tests)
    torch.library.opcheck(op, (qkv, inputs[0][:, :2], 4, 9, 9, 0.25, seed), test_utils=tests)


@pytest.mark.cuda
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float16, 32), (torch.bfloat16, 128)])
def test_errors_are_at_most_twice_those_of_sdpa(options, dtype, width):
    inputs, exact, how = case(device="cuda", dtype=dtype, width=width, **options)
    assert kernel.fits(*inputs[:3])
    upstream = torch.randn_like(exact[0]).to(dtype)
    found = results(window_attention, inputs, how, upstream)
    wanted = results(dense, exact, how, upstream)
    others = errors(results(masked_sdpa, inputs, how, upstream), wanted)
    small = {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    for ours, theirs in zip(errors(found, wanted), others, strict=True):
        assert ours <= 2 * theirs + small, (ours, theirs)
    for once, again in zip(found, results(window_attention, inputs, how, upstream), strict=True):
        assert torch.equal(once, again)
    with torch.no_grad():
        assert torch.equal(window_attention(*inputs[:3], **how, **named(inputs)).double().cpu(), found[0])


@pytest.mark.cuda
@pytest.mark.parametrize("options", PACKED, ids=str)
def test_a_whole_projection(options):
    check_packed("cuda", torch.bfloat16, 1e-2, width=64, **options)


@pytest.mark.cuda
def test_dropout_is_drawn_again_by_the_backward_pass():
    check_dropout("cuda", torch.bfloat16, 1.5e-2)


@pytest.mark.cuda
def test_the_same_seed_of_torch_drops_the_same_weights():
    (q, k, v), _, how = case(device="cuda", dtype=torch.bfloat16, width=64, queries=200, keys=200, dilation=2)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(window_attention(q, k, v, **how, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.cuda
def test_the_operator_is_what_torch_asks_for():
    check_operator("cuda", torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_without_a_graph_break_and_checkpointed(dropout_p):
    inputs, _, how = case(device="cuda", dtype=torch.bfloat16, width=64, queries=200, keys=200, count=2, key_offset=2)
    inputs = [x.detach().requires_grad_() for x in inputs]

    def attend(*inputs):
        return window_attention(*inputs[:3], **how, **named(inputs), dropout_p=dropout_p) * 2

    torch.manual_seed(0)
    out = attend(*inputs)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.manual_seed(0)
    again = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    for once, twice in zip(grads, torch.autograd.grad(again, inputs, upstream), strict=True):
        assert torch.equal(once, twice)
    compiled = torch.compile(attend, fullgraph=True)(*inputs)
    assert (compiled.shape, compiled.stride()) == (out.shape, out.stride())
    if not dropout_p:
        torch.testing.assert_close(compiled, out)
        torch.testing.assert_close(torch.autograd.grad(compiled, inputs, upstream), grads)


@pytest.mark.cuda
def test_more_elements_than_32_bits_count():
    tokens, heads, width = (1 << 22) + 100, 8, 64
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    qkv = torch.randn(1, tokens, 3, heads, width, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.requires_grad_() for t in qkv.unbind(2))
    out = window_attention(q, k, v, window=100)
    upstream = torch.zeros_like(out)
    upstream[:, -200:].normal_()
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    last = tokens % 64 + 512  # cut where a tile begins, so that the same tiles are summed
    end = [t[:, -last:].detach().requires_grad_() for t in (q, k, v)]
    expected = window_attention(*end, window=100)
    torch.testing.assert_close(out[:, -200:], expected[:, -200:])
    for whole, part in zip(grads, torch.autograd.grad(expected, end, upstream[:, -last:]), strict=True):
        torch.testing.assert_close(whole[:, -300:], part[:, -300:], rtol=1.6e-2, atol=1e-2)
        assert whole[:, -200:].any()


def test_the_kernels_under_the_interpreter(interpreted):
    """The same code on a CPU."""
    interpreted()


def _interpreted():
    torch.set_num_threads(1)
    module.kernel.fits = lambda *tensors: True
    for options in INTERPRETED:
        options = {"heads": 2, "batch": 1, **options}
        inputs, exact, how = case(device="cpu", dtype=torch.float32, width=16, **options)
        upstream = torch.randn_like(exact[0])
        found = errors(results(window_attention, inputs, how, upstream), results(dense, exact, how, upstream))
        assert max(found) < 1e-5, (options, found)
    for options in PACKED[1:4]:
        tokens = options.get("count", 0) if options["window"] == 9 else 70
        check_packed("cpu", torch.float32, 1e-5, width=16, tokens=tokens, batch=1, **options)
    check_dropout("cpu", torch.float32, 1e-5)
    check_operator("cpu", torch.float32)
    print("ok")


if __name__ == "__main__":
    _interpreted()
