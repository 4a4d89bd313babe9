"""Torch's process-wide settings: pinned before measuring, put back after each cell.

A block may change any of them while it is built or run; the next row must not notice.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from longctx.engine.machine import default_threads

_SDPA = ("flash", "mem_efficient", "math", "cudnn")


def pinned_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set every numeric flag that a time depends on, and say how they stand: the answer of `flag_state`.

    config: `BenchmarkConfig.to_json()`. fp32 means fp32: TF32 is off for matrix products and for cuDNN.
    cuDNN's search for the fastest algorithm runs when both `cudnn_benchmark` and `torch_benchmark` allow it.
    Call it early: threads that torch starts later inherit the treatment of denormals.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(config.get("threads") or default_threads())
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = bool(config.get("cudnn_benchmark", True) and config.get("torch_benchmark", True))
    torch.backends.cudnn.deterministic = bool(config.get("cudnn_deterministic", False))
    return flag_state()


def flag_state() -> dict[str, Any]:
    """The numeric flags and threads as they stand, for the record of a result."""
    return {
        "tf32_matmul": _read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "tf32_cudnn": _read(lambda: torch.backends.cudnn.allow_tf32),
        "float32_matmul_precision": _read(torch.get_float32_matmul_precision),
        "fp16_reduced_precision_reduction": _read(
            lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "bf16_reduced_precision_reduction": _read(
            lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "flush_denormal": flushes_denormals(),
        "openmp_spins": os.environ.get("GOMP_SPINCOUNT") or os.environ.get("OMP_WAIT_POLICY"),
    }


def flushes_denormals() -> bool:
    """Whether this thread treats denormal numbers as zero; torch itself does not tell."""
    # Python's floats go by the same control register, and no default device or dtype of a block gets in the way.
    return sys.float_info.min / 2 == 0.0


@contextlib.contextmanager
def global_state() -> Iterator[None]:
    """Put back, on leaving, everything process-wide that a block could have changed.

    Default dtype and device, threads, random states, grad mode, determinism, precision and TF32, cuDNN and SDPA
    switches, autocast, denormals, current GPU and stream, environment variables, working directory, sys.path,
    standard streams, signal handlers and alarms, warning filters, garbage collection, recursion limit.
    """
    restore = [*_python_state(), *_torch_state(), *_cuda_state()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        try:
            yield
        finally:
            for put_back in restore:
                # One that fails (a GPU after a device-side fault) must not keep the others from being put back.
                with contextlib.suppress(Exception):
                    put_back()


def _python_state() -> list[Callable[[], Any]]:
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    streams, hooks = (sys.stdout, sys.stderr, sys.stdin), (sys.excepthook, sys.unraisablehook)
    seed, recursion, collecting = random.getstate(), sys.getrecursionlimit(), gc.isenabled()
    profile, trace, mask = sys.getprofile(), sys.gettrace(), os.umask(0)
    os.umask(mask)

    def put_back_environment() -> None:
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)

    def put_back_streams() -> None:
        sys.stdout, sys.stderr, sys.stdin = streams
        sys.excepthook, sys.unraisablehook = hooks
        sys.setprofile(profile)
        sys.settrace(trace)

    put_backs = [
        put_back_environment,
        lambda: os.chdir(folder),
        lambda: sys.path.__setitem__(slice(None), path),
        put_back_streams,
        lambda: random.setstate(seed),
        lambda: sys.setrecursionlimit(recursion),
        gc.enable if collecting else gc.disable,
        lambda: os.umask(mask),
        *_signal_state(),
    ]
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        put_backs.append(lambda: os.sched_setaffinity(0, allowed))
    if numpy := sys.modules.get("numpy"):
        numpy_seed = numpy.random.get_state()
        put_backs.append(lambda: numpy.random.set_state(numpy_seed))
    return put_backs


def _signal_state() -> list[Callable[[], Any]]:
    handlers = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        # None: installed from C, and not to be set from Python.
        if handler is not None:
            handlers[number] = handler

    def put_back() -> None:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                # Only the main thread may set handlers; a block run elsewhere could not have changed them either.
                signal.signal(number, handler)

    if not hasattr(signal, "setitimer"):
        return [put_back]
    timer = signal.getitimer(signal.ITIMER_REAL)
    if timer != (0.0, 0.0):
        return [put_back]
    return [lambda: signal.setitimer(signal.ITIMER_REAL, 0), put_back]


def _torch_state() -> list[Callable[[], Any]]:
    backends = torch.backends
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # A default device is a function mode: setting "cpu" anew would leave one on the stack where there was none.
    plain_device = device.type == "cpu"
    threads, grad, flush = torch.get_num_threads(), torch.is_grad_enabled(), flushes_denormals()
    anomaly, anomaly_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    precision = _read(torch.get_float32_matmul_precision)
    matmul = {
        name: _read(lambda name=name: getattr(backends.cuda.matmul, name))
        for name in (
            "allow_tf32",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
        )
    }
    cudnn = {
        name: _read(lambda name=name: getattr(backends.cudnn, name))
        for name in ("enabled", "benchmark", "deterministic", "allow_tf32", "benchmark_limit")
    }
    mkldnn = {name: _read(lambda name=name: getattr(backends.mkldnn, name)) for name in ("enabled", "deterministic")}
    sdpa = {name: getattr(backends.cuda, f"{name}_sdp_enabled")() for name in _SDPA}
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}
    autocast_cache = torch.is_autocast_cache_enabled()

    def put_back_device() -> None:
        if torch.get_default_device() != device:
            torch.set_default_device(None if plain_device else device)

    def put_back_precision() -> None:
        # Setting comes before reading: after a mix of torch's old and new precision switches reading raises.
        torch.set_float32_matmul_precision(precision or "highest")

    def put_back_backends() -> None:
        for owner, values in ((backends.cuda.matmul, matmul), (backends.cudnn, cudnn), (backends.mkldnn, mkldnn)):
            for name, value in values.items():
                if value is not None:
                    with contextlib.suppress(Exception):
                        setattr(owner, name, value)
        for name, value in sdpa.items():
            getattr(backends.cuda, f"enable_{name}_sdp")(value)

    def put_back_autocast() -> None:
        for kind, (enabled, kind_dtype) in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, kind_dtype)
        torch.set_autocast_cache_enabled(autocast_cache)

    return [
        lambda: torch.set_default_dtype(dtype),
        put_back_device,
        lambda: torch.set_num_threads(threads) if torch.get_num_threads() != threads else None,
        lambda: torch.set_flush_denormal(flush),
        lambda: torch.set_grad_enabled(grad),
        lambda: torch.set_anomaly_enabled(anomaly, anomaly_nan),
        lambda: torch.use_deterministic_algorithms(deterministic, warn_only=warn_only),
        lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill),
        put_back_precision,
        put_back_backends,
        put_back_autocast,
    ]


def _cuda_state() -> list[Callable[[], Any]]:
    if not torch.cuda.is_initialized():
        return []
    index = torch.cuda.current_device()
    stream = torch.cuda.current_stream(index)
    # Generators live on the host: reading those of GPUs that are not used makes no context there.
    seeds = torch.cuda.get_rng_state_all()
    return [
        lambda: torch.cuda.set_device(index),
        lambda: torch.cuda.set_stream(stream),
        lambda: torch.cuda.set_rng_state_all(seeds),
    ]


def _read(getter: Callable[[], Any]) -> Any:
    """A setting, or None where this torch cannot tell it (it raises once old and new switches were mixed)."""
    try:
        return getter()
    except (AttributeError, RuntimeError):
        return None
