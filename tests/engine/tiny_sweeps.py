"""Sweeps in tiny shapes over blocks of the tests' own, which fail in every way, and what there is to see of them."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil

from longctx.config import DEFAULT_RUNS, BenchmarkConfig
from longctx.engine.runner import run_sweep

BLOCKS = '''
import os, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from longctx.engine import timing

# A test needs no steady clock.
timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0, "cuda": 0.0}, {"cpu": 0.05, "cuda": 0.05}
HERE = Path(__file__).parent


def note(name, text):
    with open(HERE / name, "a") as file:
        file.write(f"{text}\\n")


class Plain(nn.Module):
    causal = True

    def forward(self, x):
        return x.cumsum(1) / 7


class Counted(Plain):
    """Leaves a line for every call."""

    def forward(self, x):
        note("calls", x.shape[1])
        return super().forward(x)


class Slow(Plain):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


class Raises(Plain):
    def forward(self, x):
        raise ValueError("what is this?")


class NotFinite(Plain):
    def forward(self, x):
        return x / 0


class Quits(Plain):
    def forward(self, x):
        sys.exit(4)


class TooLarge(Plain):
    def forward(self, x):
        raise MemoryError


class TooLargeToBuild(Plain):
    def __init__(self):
        super().__init__()
        raise MemoryError


class Short(Plain):
    def forward(self, x):
        return x[:, :-1]


class Segfault(Plain):
    def forward(self, x):
        print("last words", flush=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)


class Hang(Plain):
    def forward(self, x):
        time.sleep(3600)


class DiesWhenBuilt(Plain):
    def __init__(self):
        super().__init__()
        os._exit(5)


class Vandal(Plain):
    def __init__(self):
        super().__init__()
        torch.manual_seed(99)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)

    def forward(self, x):
        torch.manual_seed(99)
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        os.environ["LONGCTX_TEST_VANDAL"] = "1"
        os.chdir("/")
        return super().forward(x)


class Careful(Plain):
    """Says how it finds its process."""

    def __init__(self):
        super().__init__()
        state = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), os.getcwd()]
        state += [os.environ.get("LONGCTX_TEST_VANDAL"), sys.float_info.min / 2, torch.rand(()).item()]
        note("found" if (HERE / "measuring").exists() else "described", state)


class Flaky(Plain):
    """Fails at 16 tokens once there is a file that says so."""

    def forward(self, x):
        if x.shape[1] == 16 and (HERE / "raise").exists():
            raise ValueError("not today")
        if x.shape[1] == 16 and (HERE / "oom").exists():
            raise MemoryError
        return super().forward(x)


class Priced(Plain):
    def __init__(self, width=1.0):
        super().__init__()

    def cost(self, cell, options):
        return {"flops": float("nan"), "bytes": float("inf"), "state_bytes": 8.0}


class Where(Plain):
    """Tells which process runs it."""

    def forward(self, x):
        note("processes", f"{os.getpid()} {'MALLOC_TRIM_THRESHOLD_' in os.environ}")
        return super().forward(x)


note("imports", os.getpid())
'''

DIES_WHEN_IMPORTED = "import os\nprint('so long', flush=True)\nos._exit(6)\n"


class Stop(Exception):
    """A test has seen enough."""


def config_of(folder: Path, **values) -> BenchmarkConfig:
    shared = {
        "d_model": 32,
        "n_heads": 2,
        "sequence_lengths": [16],
        "device": "cpu",
        # One: others may be at work on this machine, and two threads would wait for each other.
        "threads": 1,
        "rounds": 1,
        "warmup_runs": 1,
        "benchmark_runs": 2,
        "fixed_runs": True,
        "profile_memory": False,
        "isolation": "none",
        "results_dir": str(folder / "out"),
        "output_file": "run.json",
    }
    return BenchmarkConfig(**{**shared, **values})


def paired_config(folder: Path, **values) -> BenchmarkConfig:
    """Of a sweep with --against: each side in a process, five rounds of as many samples as it takes."""
    paired = {"rounds": 5, "benchmark_runs": DEFAULT_RUNS, "fixed_runs": False, "isolation": "worker"}
    return config_of(folder, **{**paired, **values})


def sweep(blocks, folder: Path, *, on_event=None, **values):
    """(results, events) of a sweep that saves to `saved(folder)`."""
    events = []

    def receive(event):
        events.append(event)
        if on_event is not None:
            on_event(event)

    return run_sweep(blocks, config_of(folder, **values), on_event=receive), events


def saved(folder: Path) -> Path:
    return folder / "out" / "run.json"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def statuses(rows) -> dict[tuple[str, int], str]:
    return {(row.block_name, row.sequence_length): row.status for row in rows}


def edit(path: Path, **by_cell) -> None:
    """Change records of a results file: `edit(path, Counted_16={"status": "crashed"})`."""
    records = json.loads(path.read_text())
    for record in records:
        record |= by_cell.get(f"{record['block_name']}_{record['sequence_length']}", {})
    path.write_text(json.dumps(records))


def children() -> set[psutil.Process]:
    """Processes that this one has, ended ones aside."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child)
    return found


def all_gone(processes, within_s: float = 10.0) -> bool:
    """Whether the processes end. One that nobody has reaped yet has."""
    deadline = time.monotonic() + within_s
    left = set(processes)
    while left and time.monotonic() < deadline:
        for process in list(left):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            left.remove(process)
        time.sleep(0.02)
    return not left
