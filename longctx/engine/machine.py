"""The host that a number is made on: processors, memory, container limits, neighbours.

Light: standard library and psutil, so that the supervisor, which loads no torch, can ask too. `root` parameters are
where /proc and /sys are looked for; None in an answer means that this system does not say.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from longctx.config import LIGHTNING, Cell

STEAL_LIMIT = 0.01
"""Share of a window that the hypervisor may give to others before a sample counts as contended."""

BUSY_LIMIT_CORES = 0.25
"""Cores by which other processes may overlap with the cores that the measured work needs."""

SWITCHES_PER_SECOND = 100.0
"""Involuntary context switches per second and thread; a thread that has its core to itself sees under 20."""

_UNLIMITED = 1 << 60
_ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


# -- container limits ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CgroupLimits:
    """The tightest limits of the control groups that this process is in."""

    version: int | None = None
    cpu_quota_cores: float | None = None
    memory_limit_bytes: int | None = None
    memory_usage_bytes: int | None = None
    """In use under that limit, less the page cache that would be given up first."""

    @property
    def memory_free_bytes(self) -> int | None:
        """What the limit leaves, None without one."""
        if self.memory_limit_bytes is None:
            return None
        return max(0, self.memory_limit_bytes - (self.memory_usage_bytes or 0))


def cgroup_limits(root: str | Path = "/") -> CgroupLimits:
    """Limits of control groups, version 1 or 2, of this process and of every group above it."""
    quotas: list[float] = []
    memory: list[tuple[int, int]] = []
    version = None
    for kind, controllers, folders in _cgroup_folders(Path(root)):
        version = max(version or 0, kind)
        for folder in folders:
            if kind == 2 or "cpu" in controllers:
                quotas += _cpu_quota(folder, kind)
            if kind == 2 or "memory" in controllers:
                memory += _memory_limit(folder, kind)
    limit, usage = min(memory, key=lambda pair: pair[0] - pair[1], default=(None, None))
    return CgroupLimits(
        version=version,
        cpu_quota_cores=min(quotas, default=None),
        memory_limit_bytes=limit,
        memory_usage_bytes=usage,
    )


def _cgroup_folders(root: Path) -> Iterator[tuple[int, set[str], list[Path]]]:
    """(version, controllers, folders from this process's group up to the mount) of each hierarchy."""
    mounts: dict[str, Path] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) > 4 and kind and kind[0] in ("cgroup", "cgroup2"):
            names = [""] if kind[0] == "cgroup2" else kind[-1].split(",")
            for name in names:
                mounts.setdefault(name, root / fields[4].lstrip("/"))
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = set(controllers.split(",")) if controllers else {""}
        mount = next((mounts[name] for name in sorted(names) if name in mounts), None)
        if mount is None:
            continue
        # Inside a container the path may be the host's; then only the mount itself can be read.
        own = mount / path.lstrip("/")
        folders = [mount]
        if own.is_dir() and own != mount:
            folders = [own, *[parent for parent in own.parents if parent.is_relative_to(mount)]]
        yield (1 if controllers else 2), names, folders


def _cpu_quota(folder: Path, version: int) -> list[float]:
    if version == 2:
        words = (_text(folder / "cpu.max") or "").split()
        quota, period = (_int(words[0]), _int(words[1])) if len(words) == 2 else (None, None)
    else:
        quota = _int(_text(folder / "cpu.cfs_quota_us"))
        period = _int(_text(folder / "cpu.cfs_period_us"))
    return [quota / period] if quota and period and quota > 0 else []


def _memory_limit(folder: Path, version: int) -> list[tuple[int, int]]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage = _int(_text(folder / names[0])), _int(_text(folder / names[1]))
    if limit is None or limit >= _UNLIMITED:
        return []
    stat = dict(line.split(None, 1) for line in _lines(folder / "memory.stat") if " " in line)
    return [(limit, max(0, (usage or 0) - (_int(stat.get(names[2])) or 0)))]


# -- what may be used ----------------------------------------------------------------------------------------------


def affinity() -> list[int]:
    """Numbers of the logical processors on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(processors: Iterable[int], root: str | Path = "/") -> int | None:
    """How many physical cores the given logical processors lie on."""
    cores = set()
    for number in processors:
        folder = Path(root, f"sys/devices/system/cpu/cpu{number}/topology")
        place = tuple(_text(folder / name) for name in ("physical_package_id", "core_id"))
        if None in place:
            return None
        cores.add(place)
    return len(cores) or None


def spread_over_cores(count: int, root: str | Path = "/") -> list[int]:
    """`count` of the logical processors that we may use, on as many physical cores as there are."""
    first, siblings, cores = [], [], set()
    for number in affinity():
        folder = Path(root, f"sys/devices/system/cpu/cpu{number}/topology")
        core = tuple(_text(folder / name) for name in ("physical_package_id", "core_id"))
        if None in core or core not in cores:
            first.append(number)
        else:
            siblings.append(number)
        cores.add(core)
    return (first + siblings)[:count]


def default_threads() -> int:
    """Threads for CPU work: one for each physical core that affinity and the container's quota leave us."""
    allowed = affinity()
    cores = physical_cores(allowed) or min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))
    quota = cgroup_limits().cpu_quota_cores
    return max(1, min(cores, math.floor(quota + 0.01) if quota else cores))


def available_memory_bytes() -> int:
    """Memory that this process could still take: of the host, or what its container leaves if that is less."""
    free = psutil.virtual_memory().available
    group = cgroup_limits().memory_free_bytes
    return int(free if group is None else min(free, group))


def predict_memory_bytes(cell: Cell, options: Mapping[str, Any]) -> int:
    """A floor of what one call of `cell` takes: no implementation of any block can do with less. Bytes.

    Input and output, the shell's weights and, in training, gradients and what the optimizer keeps. It is there to
    refuse a length that cannot fit; a cell that passes may still run out of memory. options: of the block; none of them
    lowers the floor.
    """
    size = _ELEMENT_BYTES[cell.dtype]
    # A user's own module may hold no weights at all.
    weights = 0 if cell.block.is_user else cell.layers * 12 * cell.d_model**2
    activations = 2 * cell.batch_size * cell.length * cell.d_model
    # Gradients; with an optimizer also its two moments of every weight.
    of_weights, of_activations = {"train": (2, 2), LIGHTNING: (4, 2)}.get(cell.mode, (1, 1))
    return size * (of_weights * weights + of_activations * activations)


# -- neighbours ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ContentionSample:
    """Counters at one moment; two of them tell how much of the machine others had in between. Seconds."""

    at_s: float
    steal_s: float | None
    busy_s: float | None
    """Processor time used on the processors that we may run on, by anyone, stolen time aside."""
    own_s: float
    processors: int
    involuntary_switches: int | None
    load1: float | None

    def until(self, later: ContentionSample, *, threads: int = 1) -> dict[str, Any]:
        """{window_s, steal_fraction, others_busy_cores, switches_per_s, load1, contended} between two samples.

        threads: cores that the measured work needs. contended is None when the window is too short to tell.
        """
        window = later.at_s - self.at_s
        found: dict[str, Any] = {"window_s": window, "load1": later.load1, "contended": None}
        found |= dict.fromkeys(("steal_fraction", "others_busy_cores", "switches_per_s"))
        # The kernel counts in ticks of 10 ms: over less than a tenth of a second they say nothing.
        if window < 0.1:
            return found
        contended = False
        if self.steal_s is not None and later.steal_s is not None:
            found["steal_fraction"] = max(0.0, later.steal_s - self.steal_s) / (window * self.processors)
            contended |= found["steal_fraction"] > STEAL_LIMIT
        if self.busy_s is not None and later.busy_s is not None:
            others = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
            found["others_busy_cores"] = max(0.0, others) / window
            contended |= found["others_busy_cores"] > self.processors - threads + BUSY_LIMIT_CORES
        if self.involuntary_switches is not None and later.involuntary_switches is not None:
            found["switches_per_s"] = (later.involuntary_switches - self.involuntary_switches) / window
            contended |= found["switches_per_s"] > SWITCHES_PER_SECOND * max(1, threads)
        found["contended"] = bool(contended)
        return found


def contention_sample(root: str | Path = "/") -> ContentionSample:
    """Counters of this process and of the processors that it may use, now."""
    allowed = affinity()
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    busy = steal = None
    for line in _lines(Path(root, "proc/stat")):
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
            # user nice system idle iowait irq softirq steal
            ticks = [int(value) for value in fields[:8]] + [0] * (8 - len(fields))
            busy = (busy or 0.0) + (sum(ticks[:3]) + ticks[5] + ticks[6]) / tick
            steal = (steal or 0.0) + ticks[7] / tick
    try:
        import resource

        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except ImportError:
        switches = None
    return ContentionSample(
        at_s=time.monotonic(),
        steal_s=steal,
        busy_s=busy,
        own_s=time.process_time(),
        processors=len(allowed),
        involuntary_switches=switches,
        load1=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


# -- the whole picture ---------------------------------------------------------------------------------------------


def describe_host(*, window_s: float = 0.2, root: str | Path = "/") -> dict[str, Any]:
    """What this host is and what it can give us. Takes `window_s` seconds to watch its neighbours."""
    before = contention_sample(root)
    time.sleep(window_s)
    neighbours = before.until(contention_sample(root), threads=0)
    limits = cgroup_limits(root)
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    allowed = affinity()
    return {
        "python": platform.python_version(),
        "os": _os_name(Path(root)),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(Path(root)),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "affinity": allowed,
        "usable_physical_cores": physical_cores(allowed, root),
        "default_threads": default_threads(),
        "cgroup_version": limits.version,
        "cpu_quota_cores": limits.cpu_quota_cores,
        "memory_total_bytes": memory.total,
        "memory_available_bytes": available_memory_bytes(),
        "memory_limit_bytes": limits.memory_limit_bytes,
        "memory_limit_usage_bytes": limits.memory_usage_bytes,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "steal_fraction": neighbours["steal_fraction"],
        "others_busy_cores": neighbours["others_busy_cores"],
        "governor": _text(Path(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "turbo": _turbo(Path(root)),
        "transparent_huge_pages": _chosen(Path(root, "sys/kernel/mm/transparent_hugepage/enabled")),
    }


def _os_name(root: Path) -> str:
    fields = dict(line.split("=", 1) for line in _lines(root / "etc/os-release") if "=" in line)
    return fields.get("PRETTY_NAME", "").strip('"') or platform.system()


def _cpu_model(root: Path) -> str | None:
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or None


def _turbo(root: Path) -> bool | None:
    no_turbo = _text(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    boost = _text(root / "sys/devices/system/cpu/cpufreq/boost")
    if no_turbo is not None:
        return no_turbo == "0"
    return None if boost is None else boost == "1"


def _chosen(path: Path) -> str | None:
    """The word in brackets of `always [madvise] never`."""
    return next((word.strip("[]") for word in (_text(path) or "").split() if word.startswith("[")), None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _lines(path: Path) -> list[str]:
    return (_text(path) or "").splitlines()


def _int(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None
