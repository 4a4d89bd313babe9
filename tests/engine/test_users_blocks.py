"""Blocks as people write them: measured as they are, told apart, and no danger to the rows of others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_sweeps import config_of, statuses, sweep

import longctx
from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine import runner
from longctx.engine.importing import said_by
from longctx.engine.loading import load_block
from longctx.engine.process import child_environment
from longctx.engine.runner import run_sweep
from longctx.errors import LongctxError, UsageError

FILE = '''
import threading, time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
import torch
from torch import nn
from longctx.engine import timing

timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0, "cuda": 0.0}, {"cpu": 0.05, "cuda": 0.05}


class Good(nn.Module):
    factor = 1.0
    def __init__(self, d_model):
        super().__init__()
        self.l = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.factor * self.l(x)
    @staticmethod
    def reference(block, x):
        return block.l(x)

class Bad(Good):
    factor = 1.5

class Kept(nn.Module):
    """Makes on first use what it then keeps, as rotary tables and masks are made."""
    def __init__(self, d_model):
        super().__init__()
        self.l, self.table = nn.Linear(d_model, d_model), None
    def forward(self, x):
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos()
        return self.l(x) * self.table[: x.shape[1]]

class Inner(Kept):
    """Takes a gradient step inside its forward."""
    def forward(self, x):
        with torch.enable_grad():
            w = self.l.weight.detach().clone().requires_grad_()
            grad, = torch.autograd.grad((x.detach() @ w).square().mean(), w)
        return x @ (self.l.weight - grad)

class Complex(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.z = nn.Parameter(torch.randn(d_model, dtype=torch.complex64))
        self.l = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.l((x * self.z).real.to(x.dtype) + (x * self.z).imag.to(x.dtype))

class Told(nn.Module):
    """Knows which of its numbers must stay in fp32."""
    def __init__(self, d_model, dtype=None):
        super().__init__()
        self.l = nn.Linear(d_model, d_model, dtype=dtype)
        self.log = nn.Parameter(torch.randn(d_model))
    def forward(self, x):
        assert self.log.dtype == torch.float32
        return self.l(x) * self.log.exp().to(x.dtype)

class DeafToDtype(nn.Module):
    def __init__(self, d_model, dtype=None):
        super().__init__()
        self.l = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.l(x)

class Heads(nn.Module):
    def __init__(self, d_model, batch_first=False):
        super().__init__()
        self.a = nn.MultiheadAttention(d_model, 2, batch_first=batch_first)
    def forward(self, x):
        return self.a(x, x, x, need_weights=False)

class OneAtATime(Good):
    def forward(self, x):
        return self.l(x.view(x.shape[1:])).view(1, *x.shape[1:])

class By64(Good):
    def forward(self, x):
        return self.l(x.unflatten(1, (-1, 64)).flip(2)).flatten(1, 2)
    reference = None

class UpTo100(Good):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.places = nn.Parameter(torch.randn(100, d_model))
    def forward(self, x):
        return self.l(x + self.places[: x.shape[1]].expand(len(x), *x.shape[1:]))
    reference = None

class Config:
    pass

def start(w):
    return w

class Odd(Good):
    def __init__(self, d_model, init=start, config=Config()):
        super().__init__(d_model)

class Busy(Good):
    thread = None
    def forward(self, x):
        if Busy.thread is None:
            Busy.thread = threading.Thread(target=self.spin, daemon=True)
            Busy.thread.start()
        return self.l(x)
    def spin(self):
        while True:
            time.sleep(0.01)

class Pooled(Good):
    pool = ThreadPoolExecutor(1)
    def forward(self, x):
        return self.pool.submit(self.l, x).result()

class Where(Good):
    def forward(self, x):
        with open(Path(__file__).with_name("threads"), "a") as file:
            file.write(f"{[t.name for t in threading.enumerate() if 'spin' in t.name]}\\n")
        return self.l(x)

class Patches(Good):
    def __init__(self, d_model):
        super().__init__(d_model)
        slow = torch.nn.functional.linear
        def linear(*args):
            (Path(__file__).with_name("patched")).touch()
            return slow(*args)
        torch.nn.functional.linear = linear

class Prints(Good):
    def forward(self, x):
        print("hello")
        return self.l(x)

class Immovable(Good):
    def to(self, *args, **kwargs):
        raise ValueError("this one stays here")
'''

COMPILED = """
from pathlib import Path
import torch
from torch import nn
from longctx.engine import timing

timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0, "cuda": 0.0}, {"cpu": 0.05, "cuda": 0.05}
torch._dynamo.config.recompile_limit = 3

def note(line):
    with open(Path(__file__).with_name("graphs"), "a") as file:
        file.write(f"{line}\\n")

def backend(graph, inputs):
    shape = list(inputs[-1].shape)
    def run(*tensors):
        note(shape)
        return graph(*tensors)
    return run

class Compiled(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.l = nn.Linear(d_model, d_model)
    @torch.compile(backend=backend)
    def forward(self, x):
        if not torch.compiler.is_compiling():
            note("none")
        return self.l(x).relu()
"""


@pytest.fixture
def users(tmp_path):
    """`users("Name")` is the request for a block of a file of the user's."""
    path = tmp_path / "theirs.py"
    path.write_text(FILE)
    return lambda name: f"{path}:{name}"


def loaded(text: str, dtype: torch.dtype = torch.float32):
    cell = Cell(block=BlockRequest.parse(text), length=64, d_model=8, n_heads=2)
    return load_block(cell.block, cell, torch.device("cpu"), dtype, 0)


@pytest.mark.parametrize("names", [("Good", "Bad"), ("Bad", "Good")])
def test_each_block_of_a_file_is_checked_for_itself(users, tmp_path, names):
    rows, _ = sweep([users(name) for name in names], tmp_path, sequence_lengths=[16])
    assert {row.block_name: row.status for row in rows} == {"Good": "ok", "Bad": "wrong"}


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_what_a_block_keeps_from_its_first_call_can_be_trained_with(users, tmp_path, mode):
    rows, _ = sweep([users("Kept"), users("Inner")], tmp_path, sequence_lengths=[16], mode=mode)
    assert [row.status for row in rows] == ["ok"] * 2, [row.error for row in rows]


def test_complex_numbers_stay_complex(users):
    module = loaded(users("Complex")).module
    assert module.z.dtype == torch.complex64 and module.z.imag.any()
    half = loaded(users("Complex"), torch.bfloat16).module
    assert half.z.dtype == torch.complex64 and half.l.weight.dtype == torch.bfloat16
    wide = loaded(users("Complex")).twin(torch.float64)
    assert wide.z.dtype == torch.complex128 and wide.l.weight.dtype == torch.float64


def test_a_block_that_is_told_its_format_keeps_what_it_makes_of_it(users):
    told = loaded(users("Told"), torch.bfloat16).module
    assert told.log.dtype == torch.float32 and told.l.weight.dtype == torch.bfloat16
    assert loaded(users("DeafToDtype"), torch.bfloat16).module.l.weight.dtype == torch.bfloat16


def test_lengths_that_a_block_cannot_do_are_not_asked_of_it(users, tmp_path):
    rows, _ = sweep([users("By64"), users("UpTo100")], tmp_path, sequence_lengths=[64, 256])
    assert statuses(rows) == {
        ("By64", 64): "ok",
        ("By64", 256): "ok",
        ("UpTo100", 64): "ok",
        ("UpTo100", 256): "failed",
    }


def test_options_without_a_name_of_their_own_are_the_same_in_the_next_process(users, tmp_path):
    (first,), _ = sweep([users("Odd")], tmp_path, sequence_lengths=[16])
    (again,), _ = sweep([users("Odd")], tmp_path, sequence_lengths=[16], resume=True)
    assert again == first
    assert "0x" not in str(first.block_options)


def test_threads_that_a_block_leaves_behind_slow_no_other(users, tmp_path):
    rows, _ = sweep(
        [users("Busy"), users("Where"), users("Pooled")], tmp_path, sequence_lengths=[16, 24], isolation="worker"
    )
    assert {row.status for row in rows} == {"ok"}
    assert set((tmp_path / "threads").read_text().splitlines()) == {"[]"}


def test_what_a_block_puts_in_the_place_of_torch_is_in_no_other_row(users, tmp_path):
    seen = []

    def look(event):
        if type(event).__name__ == "CellStarted":
            (tmp_path / "patched").unlink(missing_ok=True)
        if type(event).__name__ == "CellFinished":
            seen.append((event.result.block_name, (tmp_path / "patched").exists()))

    blocks = [users("Patches"), users("Good")]
    rows, _ = sweep(blocks, tmp_path, sequence_lengths=[16, 24], isolation="worker", on_event=look)
    assert {row.status for row in rows} == {"ok"}
    assert set(seen) == {("Patches", True), ("Good", False)}


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_block_that_takes_the_batch_for_the_sequence_says_so(users, tmp_path, mode):
    blocks = [users("Heads"), users("Heads") + ":batch_first=true", users("OneAtATime"), users("Good")]
    rows, _ = sweep(blocks, tmp_path, sequence_lengths=[16, 24], mode=mode)
    assert {row.status for row in rows} == {"ok"}
    assert {row.block_name for row in rows if "mixes_batch" in row.warnings} == {"Heads"}
    assert sum("mixes_batch" in row.warnings for row in rows) == 2


def test_a_compiled_block_is_measured_as_compiled_for_its_own_shape(tmp_path):
    path, ran = tmp_path / "compiled.py", []
    path.write_text(COMPILED)

    def look(event):
        if type(event).__name__ == "CellFinished":
            d_model = event.result.config["d_model"]
            ran.append((f"[1, {event.cell.length}, {d_model}]", (tmp_path / "graphs").read_text().split("\n")[-2]))

    config = {"sequence_lengths": [16, 24, 40, 56], "profile_memory": False, "isolation": "worker"}
    rows, _ = sweep([f"{path}:Compiled"], tmp_path, on_event=look, **config)
    assert [row.status for row in rows] == ["ok"] * 4
    assert [wanted for wanted, _ in ran] == [graph for _, graph in ran]


def test_a_file_that_is_changed_while_the_sweep_runs(users, tmp_path):
    path = tmp_path / "theirs.py"

    def edit(event):
        if type(event).__name__ == "CellFinished" and event.round == 0:
            path.write_text(FILE.replace("return self.factor * self.l(x)", "return self.l(x) * self.factor"))

    (row,), _ = sweep([users("Good")], tmp_path, sequence_lengths=[16], rounds=2, on_event=edit)
    assert row.status == "failed" and "changed" in row.error["message"]
    assert len(row.samples) == 1


def test_a_row_without_a_check_gets_one_when_it_is_asked_for(users, tmp_path):
    (row,), _ = sweep([users("Bad")], tmp_path, sequence_lengths=[16], gate=False)
    assert row.status == "ok" and row.gate is None
    (row,), _ = sweep([users("Bad")], tmp_path, sequence_lengths=[16], rounds=2, resume=True)
    assert row.status == "wrong"


def test_an_end_before_a_row_is_judged_leaves_none(users, tmp_path, monkeypatch):
    def interrupted(self, row, cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Judge, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep([users("Good")], tmp_path, sequence_lengths=[16])
    assert not list(tmp_path.rglob("*.json"))


def test_what_a_block_prints_in_this_process_is_no_part_of_what_we_print(users, tmp_path, capsys):
    sweep([users("Prints")], tmp_path, sequence_lengths=[16], isolation="none")
    printed = capsys.readouterr()
    assert "hello" in printed.err and "hello" not in printed.out


def test_a_file_that_reads_its_arguments_gets_none(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(FILE + "import argparse\nargparse.ArgumentParser().parse_args()\n")
    (row,), _ = sweep([f"{path}:Good"], tmp_path, sequence_lengths=[16], isolation="worker")
    assert row.status == "ok"


def test_a_block_that_cannot_be_moved_is_refused_in_words(users, tmp_path):
    with pytest.raises(
        LongctxError, match=r"Immovable cannot be built: ValueError in theirs.py, .*this one stays here"
    ):
        sweep([users("Immovable")], tmp_path, sequence_lengths=[16])


def test_an_error_that_cannot_say_what_it_is():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert "cannot be made" in said_by(Mute())


def test_workers_find_this_package_before_any_other(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    package = str(Path(runner.__file__).parents[2])
    assert child_environment()["PYTHONPATH"].split(os.pathsep) == [package, "/somewhere/else"]
    # What is installed stays behind what the user has put in front of it.
    monkeypatch.setattr(longctx, "__file__", "/lib/site-packages/longctx/__init__.py")
    assert child_environment()["PYTHONPATH"] == "/somewhere/else"
    paths = child_environment(elsewhere=True)["PYTHONPATH"].split(os.pathsep)
    assert paths == ["/somewhere/else", "/lib/site-packages"]


def test_a_configuration_of_paths_and_of_one_length(tmp_path):
    config = BenchmarkConfig(results_dir=tmp_path, output_file=tmp_path / "run.json", sequence_lengths=16)
    assert json.loads(json.dumps(config.to_json()))["sequence_lengths"] == [16]
    with pytest.raises(UsageError, match="seed"):
        BenchmarkConfig(seed=1 << 70)


def test_a_results_file_stays_as_private_as_it_was(tmp_path):
    config = config_of(tmp_path, sequence_lengths=[16])
    path = runner.results_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[]")
    path.chmod(0o600)
    config.force = True
    run_sweep(["Identity"], config)
    assert path.stat().st_mode & 0o777 == 0o600
