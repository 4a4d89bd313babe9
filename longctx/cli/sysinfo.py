"""`longctx sysinfo`: what this machine is, what it can reach, what will spoil a measurement."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longctx.cli import options
from longctx.errors import MissingError

if TYPE_CHECKING:
    from rich.console import Console

ORDER = 60
PROBE_TIMEOUT_S = 120.0
PACKAGES = ("torch", "triton", "lightning", "numpy", "psutil", "rich", "typer", "plotext", "nvidia-ml-py")

# In a process of its own: a torch that cannot be loaded, or a driver that hangs, is an answer here and no accident.
_PROBE = """
import json, sys
import torch
from longctx.engine.device import describe_device
from longctx.engine.flags import pinned_flags
pinned_flags({})
names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]
facts = [describe_device(torch.device(name)) for name in names]
with open(sys.argv[1], "w") as file:
    json.dump(facts, file)
"""


def sysinfo(
    results_dir: options.ResultsDir = "./reports/benchmark",
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Measure the fastest matrix products and copies, and keep them.")
    ] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Show versions, processors, memory, GPUs, and what would spoil a measurement now.

    \b
    longctx sysinfo
    longctx sysinfo --json
    longctx sysinfo --peaks          how fast this machine can multiply and copy

    The environment check ends it: each line is ok, a warning or a problem, with what to do.
    """
    if peaks:
        _show_peaks(device, as_json=as_json)
        return
    from longctx.cli._environment import check_environment
    from longctx.engine.machine import describe_host
    from longctx.terminal.console import result_console, status_console

    progress = status_console()
    if progress.is_interactive and not as_json:
        with progress.status("watching the neighbours, loading torch"):
            host = describe_host(window_s=0.5)
            devices, failure = probe()
    else:
        host = describe_host(window_s=0.5)
        devices, failure = probe()
    if device.startswith("cuda") and not any(each.get("gpu") for each in devices):
        why = f"device {device!r} was asked for, but torch finds no usable NVIDIA GPU"
        raise MissingError(why, "`longctx sysinfo` without --device says what it finds")
    versions = {"longctx": _version("longctx"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    checks = check_environment(host, devices, versions, results_dir=results_dir, torch_failure=failure)
    if as_json:
        document = {
            "versions": versions,
            "host": host,
            "devices": devices,
            "torch_failure": failure,
            "checks": [check.to_json() for check in checks],
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    _show(result_console(), host, devices, versions, checks)


def _show_peaks(device: str, *, as_json: bool) -> None:
    from longctx.engine.peaks import cache_path, measure_in_worker
    from longctx.terminal.console import result_console, status_console
    from longctx.terminal.format import memory, number, percent
    from longctx.terminal.prose import say
    from longctx.terminal.tables import environment_line, facts

    status_console().print("measuring for some seconds ...")
    environment, found = measure_in_worker(device)
    if as_json:
        document = {"flops_per_s": dict(found.flops), "copy_bytes_per_s": found.copy_bytes, "spread": found.spread}
        typer.echo(json.dumps(document | {"environment": environment}, indent=2, allow_nan=False))
        return
    spread = found.spread or {}

    def line(value: str, name: str) -> str:
        return f"{value}  (best of many, median {percent(abs(spread.get(name, 0.0)))} slower)"

    values = {f"{name} products": line(f"{number(rate / 1e12)} TFLOP/s", name) for name, rate in found.flops.items()}
    values["copy"] = line(f"{memory(found.copy_bytes)}/s", "copy")
    console = result_console()
    say(console, environment_line(environment))
    console.print(facts(values, console.width))
    console.print(f"kept in {cache_path()}", soft_wrap=True)


def probe() -> tuple[list[dict[str, Any]], str | None]:
    """What torch says of every device, the CPU first; and why it says nothing, or None."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="longctx-") as folder:
        path = Path(folder, "facts.json")
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE, str(path)],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=PROBE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return [], f"torch gave no answer within {PROBE_TIMEOUT_S:.0f} s"
        if done.returncode == 0:
            return json.loads(path.read_text(encoding="utf-8")), None
    last = done.stderr.decode(errors="replace").strip().splitlines()
    return [], last[-1] if last else f"torch ended its process with code {done.returncode}"


def _version(package: str) -> str | None:
    if package == "longctx":
        from longctx import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- showing ---------------------------------------------------------------------------------------------------------


def _show(
    console: Console,
    host: dict[str, Any],
    devices: list[dict[str, Any]],
    versions: dict[str, str | None],
    checks: list[Any],
) -> None:
    from rich.text import Text

    from longctx.terminal.format import plain
    from longctx.terminal.prose import say
    from longctx.terminal.tables import facts

    flags = devices[0].get("flags", {}) if devices else {}
    sections = [
        ("Versions", {name: version or "not installed" for name, version in versions.items()} | _build(devices)),
        ("Machine", _machine(host)),
        *((f"GPU {device['device']}", _gpu(device)) for device in devices if device.get("gpu")),
        ("Torch as it measures", {name.replace("_", " "): value for name, value in flags.items()}),
    ]
    for title, values in sections:
        if values:
            console.print(Text(title, style="bold"))
            console.print(facts(values, console.width))
            console.print()
    console.print(Text("Environment check", style="bold"))
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    for check in checks:
        line = Text("  ").append(f"{check.level:<8}", style=styles[check.level]).append(f" {plain(check.text)}")
        if check.advice:
            line.append(f": {plain(check.advice)}", style="dim")
        say(console, line, indent=11)


def _build(devices: list[dict[str, Any]]) -> dict[str, Any]:
    if not devices:
        return {}
    return {"CUDA of torch": devices[0].get("cuda") or "none", "cuDNN": devices[0].get("cudnn") or "none"}


def _machine(host: dict[str, Any]) -> dict[str, Any]:
    from longctx.terminal.format import memory, number

    quota, limit = host.get("cpu_quota_cores"), host.get("memory_limit_bytes")
    load = host.get("load_average")
    affinity = host.get("affinity") or []
    return {
        "system": f"{host.get('os')}, kernel {host.get('kernel')}, {host.get('architecture')}",
        "CPU": host.get("cpu"),
        "cores": f"{host.get('physical_cores')} physical, {host.get('logical_cores')} logical",
        "usable cores": f"{host.get('usable_physical_cores')} physical, {len(affinity)} logical",
        "CPU limit": f"{number(quota)} cores (container)" if quota else "none",
        "threads": f"{host.get('default_threads')} by default",
        "memory": f"{memory(host.get('memory_total_bytes'))}, {memory(host.get('memory_available_bytes'))} free",
        "memory limit": f"{memory(limit)}, {memory(host.get('memory_limit_usage_bytes'))} used" if limit else "none",
        "swap": f"{memory(host.get('swap_used_bytes'))} of {memory(host.get('swap_total_bytes'))} used",
        "load": ", ".join(f"{value:.2f}" for value in load) if load else None,
        "governor": host.get("governor"),
        "turbo": host.get("turbo"),
        "huge pages": host.get("transparent_huge_pages"),
    }


def _gpu(device: dict[str, Any]) -> dict[str, Any]:
    from longctx.terminal.format import memory, number

    nvml = device.get("nvml") or {}
    total, free = device.get("gpu_memory_total_bytes"), device.get("gpu_memory_free_bytes")
    clock, top = nvml.get("sm_clock_mhz"), nvml.get("sm_clock_max_mhz")
    power, limit = nvml.get("power_w"), nvml.get("power_limit_w")
    others = nvml.get("other_processes")
    return {
        "name": device.get("gpu"),
        "driver": device.get("driver"),
        "compute": f"capability {device.get('compute_capability')}, {device.get('sm_count')} multiprocessors",
        "L2 cache": memory(device.get("l2_bytes")),
        "memory": f"{memory(total)}, {memory(free)} free",
        "clocks": f"{clock} MHz of {top} MHz, memory {nvml.get('memory_clock_mhz')} MHz" if clock else None,
        "temperature": f"{nvml['temperature_c']} C" if nvml.get("temperature_c") is not None else None,
        "power": f"{number(power)} W of {number(limit)} W" if power is not None else None,
        "throttled": nvml.get("throttled"),
        "clock reasons": ", ".join(nvml.get("clock_reasons") or []) or None,
        "utilization": f"{nvml['utilization_percent']}%" if nvml.get("utilization_percent") is not None else None,
        "other processes": (", ".join(map(str, others)) or "none") if others is not None else None,
    }
