"""What every block promises of a stream: any split of a sequence, and single steps, are the whole."""

from __future__ import annotations

import pytest
import torch
from every_block import NAMES, OTHER, SMALL, every_block, make, reference, relative, tokens

from longctx.errors import UsageError


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_any_split_of_a_stream_is_the_whole(name, options, grad):
    block, x = make(name, options), tokens(101)
    want = reference(block, x)
    for sizes in ([1, 7, 93], [15, 1, 16, 17, 52], [100, 1], [33] * 3 + [2]):
        for start in (None, block.init_state(2)):
            state, pieces = start, []
            with torch.set_grad_enabled(grad):
                for piece in x.split(sizes, dim=1):
                    y, state = block(piece, state)
                    pieces.append(y)
            assert relative(torch.cat(pieces, 1), want) < 1e-9


@every_block
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_step_is_forward_of_one_token(name, num_kv_heads, grad):
    block, x = make(name, OTHER, num_kv_heads=num_kv_heads), tokens(80)
    want = reference(block, x)
    state, pieces = block.init_state(2), []
    with torch.set_grad_enabled(grad):
        for t in range(80):
            y, state = block.step(x[:, t : t + 1], state)
            assert y.shape == (2, 1, 32)
            pieces.append(y)
    assert relative(torch.cat(pieces, 1), want) < 1e-9


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Identity"])  # whose state is empty
@pytest.mark.parametrize("of_state, of_input", [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_state_of_another_batch_is_refused(name, of_state, of_input, grad):
    block = make(name, OTHER)
    for before in (0, 3, 40):
        for length in (1, 5, 40):
            with torch.set_grad_enabled(grad):
                state = block.init_state(of_state)
                if before:
                    _, state = block(tokens(before, batch=of_state), state)
                with pytest.raises(UsageError, match=f"batch of {of_state}, the input of {of_input}"):
                    (block.step if length == 1 else block)(tokens(length, batch=of_input), state)


@every_block
def test_forward_leaves_the_given_state_as_it_was(name):
    block, x = make(name), tokens(60)
    want = block(x)[0][:, 40:]
    with torch.no_grad():
        _, state = block(x[:, :40])
        block(tokens(9), state)
        y, _ = block(x[:, 40:], state)
    assert relative(y, want) < 1e-9


@every_block
@pytest.mark.parametrize("copied", [True, False], ids=["detached", "as-given"])
def test_one_state_has_several_futures(name, copied):
    block, x = make(name), tokens(60)
    want = block(x)[0]
    with torch.no_grad():
        _, state = block(x[:, :39])
        _, one = block(x[:, 39:41], state.detach() if copied else state)
        block(tokens(9), state.detach() if copied else state)
        y, _ = block(x[:, 41:], one)
    assert relative(y, want[:, 41:]) < 1e-9


@every_block
@pytest.mark.parametrize("sizes", [(1, 20), (20, 1)], ids=["step-first", "step-last"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_what_inference_mode_made_goes_on_outside_of_it(name, sizes, grad):
    block, x = make(name), tokens(61)
    want = block(x)[0][:, 40:]
    with torch.inference_mode():
        _, state = block(x[:, :39])
        _, state = block.step(x[:, 39:40], state)
    pieces = []
    with torch.set_grad_enabled(grad):
        for piece in x[:, 40:].split(sizes, dim=1):
            y, state = (block.step if piece.shape[1] == 1 else block)(piece, state)
            pieces.append(y)
    y = torch.cat(pieces, 1)
    assert relative(y, want) < 1e-9
    assert y.requires_grad == grad
    if grad:
        y.sum().backward()


@every_block
def test_a_state_goes_from_one_mode_to_another(name):
    block, x = make(name), tokens(60)
    want, _ = block(x)
    with torch.inference_mode():
        first, state = block(x[:, :20])
        first = first.clone()
    with torch.no_grad():
        second, state = block(x[:, 20:40], state)
        for t in (40, 41):
            third, state = block.step(x[:, t : t + 1], state)
    last, _ = block(x[:, 42:].clone().requires_grad_(), state)
    last.sum().backward()
    assert relative(second, want[:, 20:40]) < 1e-9
    assert relative(third, want[:, 41:42]) < 1e-9
    assert relative(last, want[:, 42:]) < 1e-9


@every_block
@pytest.mark.parametrize("options", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("autocast_first", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_state_goes_into_autocast_and_out_of_it(name, options, autocast_first, grad):
    block, x = make(name, options, dtype=torch.float32), tokens(60, dtype=torch.float32)
    want, pieces, state = reference(block, x), [], None
    for index, piece in enumerate(x.split([20, 1, 1, 1, 20, 1, 16], dim=1)):
        step = piece.shape[1] == 1
        # Two steps behind each other in either format.
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=autocast_first == (index in (0, 3, 4)))
        with torch.set_grad_enabled(grad), autocast:
            y, state = (block.step if step else block)(piece, state)
        pieces.append(y.float())
    assert relative(torch.cat(pieces, 1), want) < 2e-2


@every_block
def test_no_state_is_kept_when_none_is_asked_for(name):
    block, x = make(name), tokens(63)
    assert block(x)[1] is not None
    assert block(x, keep_state=False)[1] is None
    with torch.no_grad():
        assert block(x)[1] is not None
        assert block(x, keep_state=False)[1] is None
