"""The environment check of sysinfo: what on this machine would spoil a measurement, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from longctx.terminal.format import memory, number

STEAL_LIMIT, BUSY_LIMIT_CORES = 0.01, 0.25
LITTLE_MEMORY_BYTES = 4 << 30
HOT_C = 80
BUSY_GPU_PERCENT = 5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line: `ok`, `warning` (numbers will be noisier or fewer) or `problem` (something will not work)."""

    level: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def check_environment(
    host: Mapping[str, Any],
    devices: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str | None],
    *,
    results_dir: str,
    torch_failure: str | None,
) -> list[Check]:
    """All lines, from the answers of `describe_host`, `describe_device` and the installed versions."""
    gpus = [device for device in devices if device.get("gpu")]
    return [
        *_torch(devices, torch_failure),
        *_packages(versions),
        *_neighbours(host),
        *_clock(host),
        *_memory(host),
        *(check for gpu in gpus for check in _gpu(gpu, versions)),
        _results_dir(results_dir),
    ]


def _torch(devices: Sequence[Mapping[str, Any]], failure: str | None) -> Iterator[Check]:
    if failure:
        yield Check(level="problem", text=f"torch cannot be used: {failure}", advice="install it again")
        return
    if any(device.get("gpu") for device in devices):
        yield Check(level="ok", text="torch sees a GPU")
    elif devices and devices[0].get("cuda"):
        yield Check(
            level="warning",
            text="this torch is built for CUDA but sees no GPU",
            advice="everything runs on the CPU; if there is a GPU, check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Check(level="ok", text="torch is built without CUDA: everything runs on the CPU")


def _packages(versions: Mapping[str, str | None]) -> Iterator[Check]:
    missing = [name for name in ("lightning", "numpy", "psutil", "plotext") if not versions.get(name)]
    if missing:
        advice = f"pip install {' '.join(missing)}"
        yield Check(level="problem", text=f"not installed: {', '.join(missing)}", advice=advice)
    for name, low, high in (("typer", (0, 26), (0, 30)), ("plotext", (6, 1), (7, 0))):
        found = _numbers(versions.get(name))
        if found and not low <= found < high:
            wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
            text = f"{name} {versions[name]} was not made for this program"
            yield Check(level="problem", text=text, advice=f"pip install '{name}{wanted}'")


def _numbers(version: str | None) -> tuple[int, ...] | None:
    parts = (version or "").split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def _neighbours(host: Mapping[str, Any]) -> Iterator[Check]:
    cores = len(host.get("affinity") or []) or host.get("logical_cores") or 1
    threads = host.get("default_threads") or cores
    busy, steal = host.get("others_busy_cores"), host.get("steal_fraction")
    if busy is not None:
        free = cores - busy
        if free < threads - BUSY_LIMIT_CORES:
            text = f"other programs keep {busy:.1f} of {cores} logical cores busy"
            advice = f"end them, or measure with --threads {int(free)}" if free >= 1 else "end them"
            yield Check(level="warning", text=text, advice=advice)
        else:
            yield Check(level="ok", text=f"other programs use {busy:.1f} of {cores} logical cores")
    if steal is not None and steal > STEAL_LIMIT:
        yield Check(
            level="warning",
            text=f"the hypervisor gave {steal:.1%} of the processors' time to other guests",
            advice="trust ratios of blocks more than times, and use more --rounds",
        )
    elif steal is not None:
        yield Check(level="ok", text="no processor time is stolen by other guests")
    quota = host.get("cpu_quota_cores")
    if quota and quota < 1:
        text = f"the container allows {number(quota)} of a core"
        yield Check(level="warning", text=text, advice="it is paused in between, times will jump; raise the limit")


def _clock(host: Mapping[str, Any]) -> Iterator[Check]:
    governor = host.get("governor")
    if governor in ("powersave", "ondemand", "conservative") and host.get("turbo") is None:
        yield Check(
            level="warning",
            text=f"the CPU's frequency governor is {governor}",
            advice="`sudo cpupower frequency-set -g performance` keeps the clock steady",
        )
    elif governor:
        yield Check(level="ok", text=f"CPU frequency governor: {governor}")


def _memory(host: Mapping[str, Any]) -> Iterator[Check]:
    free, limit = host.get("memory_available_bytes"), host.get("memory_limit_bytes")
    where = " under the container's limit" if limit else ""
    if free is not None and free < LITTLE_MEMORY_BYTES:
        yield Check(
            level="warning",
            text=f"only {memory(free)} of memory are free{where}",
            advice="long lengths will be skipped; close programs or raise the limit",
        )
    elif free is not None:
        yield Check(level="ok", text=f"{memory(free)} of memory are free{where}")
    total, used = host.get("swap_total_bytes"), host.get("swap_used_bytes")
    if total and used and used > 0.5 * total:
        yield Check(
            level="warning", text="swap is in use", advice="what is swapped out is measured as slow; close programs"
        )


def _gpu(device: Mapping[str, Any], versions: Mapping[str, str | None]) -> Iterator[Check]:
    name, nvml = device["device"], device.get("nvml")
    if nvml is None:
        missing = not versions.get("nvidia-ml-py")
        yield Check(
            level="warning",
            text=f"{name}: clocks, throttling and energy cannot be read",
            advice="pip install nvidia-ml-py" if missing else "nvidia-ml-py gets no answer from the driver",
        )
        return
    if nvml.get("throttled"):
        reasons = ", ".join(nvml.get("clock_reasons") or [])
        yield Check(level="warning", text=f"{name} is slowed down ({reasons})", advice="let it cool, check its power")
    if (heat := nvml.get("temperature_c")) is not None and heat >= HOT_C:
        yield Check(level="warning", text=f"{name} is at {heat} C", advice="let it cool, or measure with locked clocks")
    others, use = nvml.get("other_processes"), nvml.get("utilization_percent")
    if use is not None and use > BUSY_GPU_PERCENT:
        yield Check(level="warning", text=f"{name} is {use}% busy", advice="wait for the other work, or end it")
    elif others:
        text = f"{name} is also held by {len(others)} other process{'es' if len(others) > 1 else ''}"
        yield Check(level="warning", text=text, advice="their work would be measured too; `nvidia-smi` names them")
    else:
        yield Check(level="ok", text=f"{name} is idle and ours alone")


def _results_dir(results_dir: str) -> Check:
    path = Path(results_dir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Check(level="ok", text=f"results can be saved under {results_dir}")
    return Check(
        level="problem",
        text=f"results cannot be saved under {results_dir}",
        advice="choose another folder with --results-dir",
    )
