"""Blocks are found, built and described; whatever is wrong with a user's own is said in words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from longctx import blocks
from longctx.config import BlockRequest, Cell
from longctx.engine.flags import global_state
from longctx.engine.loading import describe_block, load_block
from longctx.errors import UsageError

CPU = torch.device("cpu")

MODULE = """
import torch
from torch import nn

class Plain(nn.Module):
    causal = True

    def __init__(self, d_model, n_heads, width=2, *, dtype=None):
        super().__init__()
        self.width, self.n_heads = width, n_heads
        self.mix = nn.Linear(d_model, d_model, dtype=dtype)

    def forward(self, x):
        return x + self.mix(x), "anything"

    def reference(self, x):
        return x + self.mix(x)

    @staticmethod
    def cost(cell, options):
        return {"flops": 2.0 * cell.length * options["width"], "bytes": 1, "state_bytes": 0}

class Streaming(nn.Module):
    def __init__(self, d_model):
        super().__init__()
    def forward(self, x, state=None):
        return x.cumsum(1), x.sum(1, keepdim=True)
    def init_state(self, batch_size):
        return 0.0
    def step(self, x_t, state):
        return state + x_t, state + x_t

class Needy(nn.Module):
    def __init__(self, dim):
        super().__init__()

class Broken(nn.Module):
    def __init__(self, d_model):
        raise TypeError("no such luck")

class Quitter(nn.Module):
    def __init__(self):
        raise SystemExit(3)

def factory(**kwargs):
    assert set(kwargs) == {"d_model", "n_heads", "num_kv_heads", "device", "dtype", "depth"}, kwargs
    return nn.Linear(kwargs["d_model"], kwargs["d_model"], device=kwargs["device"], dtype=kwargs["dtype"])

def not_a_module(d_model):
    return d_model

made = nn.Linear(4, 4)
number = 7
"""


@pytest.fixture(autouse=True)
def put_back():
    with global_state():
        yield


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return str(path)


def request_of(text: str) -> BlockRequest:
    return BlockRequest.parse(text)


def load(text: str, dtype=torch.float32, **shape):
    cell = Cell(block=request_of(text), length=16, d_model=32, n_heads=4, **shape)
    return load_block(cell.block, cell, CPU, dtype, 0)


def describe(text: str):
    return describe_block(request_of(text), d_model=32, n_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("name", blocks.names())
def test_our_blocks_are_described_without_weights(name):
    found = describe(name.lower())
    assert found["target"] == name
    assert found["has_reference"]
    assert found["has_cost"]
    assert found["causal"]
    assert found["modes"] == ["forward", "train", "decode", "prefill"]
    assert "dropout" in found["options"]
    assert len(found["source_hash"]) == 64


def test_a_block_that_is_not_causal_has_no_decode():
    assert describe("Dense:causal=false")["modes"] == ["forward", "train"]


def test_bad_options_and_shapes_show_before_measuring():
    with pytest.raises(UsageError, match="chunk_size"):
        describe("BLADE:chunk_sise=4")
    with pytest.raises(UsageError, match="Did you mean 'BLADE'"):
        describe("BLAED")
    with pytest.raises(UsageError):
        describe("BLADE:chunk_size=0")
    with pytest.raises(UsageError, match="num_kv_heads"):
        describe_block(request_of("Identity"), d_model=32, n_heads=4, num_kv_heads=3)


def test_the_hash_of_ours_follows_the_files_that_it_is_made_of():
    hashes = {name: describe(name)["source_hash"] for name in blocks.names()}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes == {name: describe(name)["source_hash"] for name in hashes}
    assert describe("BLADE:chunk_size=64")["source_hash"] == hashes["BLADE"]


def test_weights_follow_the_seed_alone():
    first, second = load("Identity"), load("Identity")
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_twin_has_the_rounded_weights_in_fp64(place):
    for text in ("Identity", f"{place}:Plain"):
        loaded = load(text, torch.bfloat16)
        twin = loaded.twin(torch.float64)
        for a, b in zip(loaded.module.parameters(), twin.parameters(), strict=True):
            assert b.dtype == torch.float64
            assert a.dtype == torch.bfloat16
            assert torch.equal(a.double(), b)


def test_a_class_by_file(place):
    found = describe(f"{place}:Plain:width=5")
    assert found["options"] == {"width": 5}
    assert found["user"]
    assert found["causal"]
    assert found["modes"] == ["forward", "train"]
    loaded = load(f"{place}:Plain:width=5", torch.bfloat16)
    assert loaded.module.width == 5
    assert loaded.module.n_heads == 4
    assert not loaded.module.training
    assert loaded.cost.flops == 2 * 16 * 5
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    assert loaded.checked_call(x).dtype == torch.bfloat16
    twin = loaded.twin(torch.float64)
    assert torch.equal(loaded.reference(twin, x.double()), x.double() + twin.mix(x.double()))


def test_a_factory_of_keywords_gets_them_all(place):
    loaded = load(f"{place}:factory:depth=3", torch.float64)
    assert loaded.options == {"depth": 3}
    assert loaded.module.weight.dtype == torch.float64
    assert loaded.cost is None
    assert loaded.reference is None


def test_a_streaming_module_decodes(place):
    loaded = load(f"{place}:Streaming")
    assert "decode" in loaded.modes
    x = torch.randn(1, 6, 32)
    _, state = loaded.prefill(x[:, :5])
    y, _ = loaded.step(x[:, 5:], state)
    torch.testing.assert_close(y, x.sum(1, keepdim=True))
    with pytest.raises(NotImplementedError):
        load(f"{place}:factory:depth=1").step(x, None)


def test_a_class_by_package(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert describe("mine:Plain")["options"] == {"width": 2}
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Plane", "Did you mean 'Plain'"),
        ("number", "of type int"),
        ("made", "already built"),
        ("not_a_module", "returned int"),
        ("Needy", "needs dim"),
        ("Broken", "no such luck"),
        ("Quitter", "SystemExit"),
        ("Plain:wdth=3", "Did you mean 'width'"),
    ],
)
def test_what_is_wrong_with_a_users_block_is_said(place, name, words):
    with pytest.raises(UsageError, match=words) as caught:
        describe(f"{place}:{name}")
    assert caught.value.exit_code == 2


def test_what_a_users_file_imports_is_part_of_its_source(tmp_path):
    (tmp_path / "outer.py").write_text(
        "import json\nfrom torch import nn\nfrom inner_part import deep\n"
        "class Block(nn.Module):\n    def forward(self, x):\n        return deep.scale(x)\n"
    )
    (tmp_path / "inner_part").mkdir()
    (tmp_path / "inner_part/__init__.py").write_text("")
    (tmp_path / "inner_part/deep.py").write_text("from . import deeper\ndef scale(x):\n    return deeper.FACTOR * x\n")
    (tmp_path / "inner_part/unused.py").write_text("")

    def hashed() -> str:
        code = (
            "from longctx.config import BlockRequest\nfrom longctx.engine.loading import describe_block\n"
            f"request = BlockRequest(target={str(tmp_path / 'outer.py:Block')!r})\n"
            "print(describe_block(request, d_model=8, n_heads=1, num_kv_heads=None)['source_hash'])"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    (tmp_path / "inner_part/deeper.py").write_text("FACTOR = 2\n")
    before = hashed()
    (tmp_path / "inner_part/unused.py").write_text("FACTOR = 3\n")
    assert hashed() == before
    (tmp_path / "inner_part/deeper.py").write_text("FACTOR = 3\n")
    assert hashed() != before


def test_files_and_packages_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        describe(f"{tmp_path}/gone.py:Plain")
    with pytest.raises(UsageError, match="there is no module 'no_such_package_here"):
        describe("no_such_package_here.inner:Plain")
    (tmp_path / "bad.py").write_text("import torch\nraise SystemExit(9)\n")
    with pytest.raises(UsageError, match="SystemExit") as caught:
        describe(f"{tmp_path}/bad.py:Plain")
    assert "__main__" in caught.value.hint
    (tmp_path / "worse.py").write_text("def (:\n")
    with pytest.raises(UsageError, match="SyntaxError"):
        describe(f"{tmp_path}/worse.py:Plain")


def test_a_file_that_is_part_of_a_package_is_said_to_be(tmp_path):
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent):
        (each / "__init__.py").touch()
    (folder / "block.py").write_text("from ..shared import NUMBER\n")
    with pytest.raises(UsageError, match="relative import") as caught:
        describe(f"{folder}/block.py:Plain")
    assert caught.value.hint.endswith(f"outer.inner.block:Name, from the folder {tmp_path}")


def test_neighbouring_files_are_imported_from_the_right_folder(tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        (folder / "shared_piece.py").write_text(f"NUMBER = {number}\n")
        (folder / "block.py").write_text(
            "from shared_piece import NUMBER\nfrom torch import nn\n"
            "class Mine(nn.Module):\n    number = NUMBER\n    def forward(self, x):\n        return x\n"
        )
    for number in (1, 2, 1):
        with global_state():
            assert load(f"{tmp_path}/folder{number}/block.py:Mine").module.number == number


def test_an_edited_file_is_loaded_anew(tmp_path):
    path = tmp_path / "edited.py"
    source = "from torch import nn\nclass Mine(nn.Module):\n    number = {}\n"
    path.write_text(source.format(1))
    before = load(f"{path}:Mine")
    path.write_text(source.format(2))
    after = load(f"{path}:Mine")
    assert (before.module.number, after.module.number) == (1, 2)
    assert before.source_hash != after.source_hash
