"""What all tests share: GPU tests that say why they are skipped, torch's global state put back after each."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile

import pytest


def _gpu_missing() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU; torch sees none here"


def _keep_to_own_processors() -> None:
    """With `-n` each test process, and all that it starts, keeps to processors of its own: what one measures is not
    disturbed by another, and workers that take the first processor they may use do not all take the same."""
    name, count = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
    if not name.startswith("gw") or not hasattr(os, "sched_setaffinity"):
        return
    if share := sorted(os.sched_getaffinity(0))[int(name.removeprefix("gw")) :: int(count)]:
        os.sched_setaffinity(0, share)


# Before anything imports torch, other conftest files included: it makes as many threads as there are processors then,
# and two that share one processor wait for each other at every step.
_keep_to_own_processors()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = _gpu_missing() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory):
    """Locks lie in the temporary folder: a sweep that runs beside the tests must not hold theirs."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("temporary"))
    tempfile.tempdir = None
    yield
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


def torch_state() -> dict[str, object]:
    """The process-wide settings of torch that a test, or what it tests, could leave changed."""
    import torch

    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture
def global_state():
    """A function that reads torch's process-wide settings, to compare before and after."""
    return torch_state


@pytest.fixture(autouse=True)
def _restore_globals():
    """Every test starts from the same seed and leaves dtype, threads, precision and seed as they were.

    Tests of the light side run in this process too: for them torch is not imported here.
    """
    import_seed = random.getstate()
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        random.setstate(import_seed)
        return
    before, generator = torch_state(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    random.setstate(import_seed)
    torch.set_default_dtype(before["default dtype"])
    torch.set_default_device(None if before["default device"].type == "cpu" else before["default device"])
    torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision(before["matmul precision"])
    torch.backends.cudnn.benchmark = before["cudnn.benchmark"]
    torch.backends.cudnn.deterministic = before["cudnn.deterministic"]
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    torch.set_grad_enabled(before["grad"])
    torch.set_rng_state(generator)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """New uninitialised tensors are full of NaN (or the lowest integer), so that unwritten memory shows."""
    import torch

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(False if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

    def poisoning(allocate):
        def call(*args, **kwargs):
            with torch.no_grad():
                tensor = poison(allocate(*args, **{**kwargs, "requires_grad": False}))
            return tensor.requires_grad_(kwargs.get("requires_grad", False))

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))


@pytest.fixture
def interpreted(request: pytest.FixtureRequest):
    """A function that runs code, or the whole test file as a program, under Triton's interpreter: kernels on a CPU.

    In a process of its own, as Triton must be told before it is imported. A program ends by printing "ok".
    """
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernels on a CPU, is not installed")

    def run(code: str | None = None) -> None:
        command = [sys.executable, "-W", "ignore", *([request.path.name] if code is None else ["-c", code])]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, cwd=request.path.parent, capture_output=True, text=True)
        assert done.stdout == "ok\n", done.stderr[-2000:]

    return run
