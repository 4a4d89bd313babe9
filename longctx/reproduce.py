"""The command that measures the same again, as it is stored in every row."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longctx.config import BenchmarkConfig

_FLAGS = {
    "d_model": "--d-model",
    "n_heads": "--n-heads",
    "num_kv_heads": "--num-kv-heads",
    "layers": "--layers",
    "batch_size": "--batch-size",
    "device": "--device",
    "dtype": "--dtype",
    "mode": "--mode",
    "warmup_runs": "--warmup-runs",
    "rounds": "--rounds",
    "threads": "--threads",
    "seed": "--seed",
    "timeout": "--timeout",
    "max_time": "--max-time",
    "isolation": "--isolation",
    "results_dir": "--results-dir",
}
_SWITCHES = {
    "torch_benchmark": ("--torch-benchmark", "--no-torch-benchmark"),
    "cudnn_benchmark": ("--cudnn-benchmark", "--no-cudnn-benchmark"),
    "cudnn_deterministic": ("--cudnn-deterministic", None),
    "profile_memory": (None, "--no-memory-profile"),
    "gate": (None, "--no-gate"),
    "energy": (None, "--no-energy"),
    "cuda_graph": ("--cuda-graph", None),
    "lightning_mode": ("--lightning-mode", None),
}


def command_line(
    command: str,
    config: BenchmarkConfig,
    blocks: Iterable[str],
    *,
    defaults: BenchmarkConfig,
    vary: Mapping[str, Sequence[Any]] | None = None,
    more: Iterable[str] = (),
) -> str:
    """`longctx COMMAND ...` that measures the same again, but for the file that it saves to.

    command: sweep or quick. defaults: what it does when nothing is said; only what differs from that is written.
    vary: as `variants` takes it. more: words that are no part of a configuration.
    """
    words = ["longctx", command]
    if blocks := list(map(str, blocks)):
        words += ["--blocks", *blocks]
    if config.sequence_lengths != defaults.sequence_lengths:
        lengths = map(str, config.sequence_lengths)
        words += ["--seq-len", *lengths] if command == "quick" else ["--sequence-lengths", *lengths]
    for each, flag in _FLAGS.items():
        value = getattr(config, each)
        if len(values := list(dict.fromkeys((vary or {}).get(each, ())))) > 1:
            words += [flag, *map(str, values)]
        elif value != getattr(defaults, each):
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if command == "quick" and config.benchmark_runs != defaults.benchmark_runs:
        words += ["--runs", str(config.benchmark_runs)]
    elif command != "quick" and config.exact_runs:
        words += ["--benchmark-runs", str(config.benchmark_runs)]
    for each, (on, off) in _SWITCHES.items():
        value = getattr(config, each)
        if value != getattr(defaults, each) and (switch := on if value else off):
            words.append(switch)
    return shlex.join([*words, *more])
