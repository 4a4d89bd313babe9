"""What is not the same around the cells of two runs: machine, versions, settings, code.

Of a fact that a record does not tell nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from longctx.analysis.matching import Pair, Pool, device_kind, device_name
from longctx.results import BenchmarkResult

FATAL = ("kind of device", "device", "dtype", "threads", "TF32 in matmul", "TF32 in cuDNN", "fp32 matmul precision")
"""Facts that leave nothing to compare when they differ."""

_KINDS = {"cuda": "GPU", "cpu": "CPU"}
_ENVIRONMENT = (
    "cpu",
    "uuid",
    "compute_capability",
    "driver",
    "torch",
    "cuda",
    "cudnn",
    "triton",
    "python",
    "os",
    "kernel",
    "architecture",
    "physical_cores",
    "affinity",
    "cpu_quota_cores",
    "governor",
    "turbo",
    "transparent_huge_pages",
)
_NVML = ("power_limit_w", "sm_clock_max_mhz")
_CONFIG = ("cuda_graph", "warmup_runs", "isolation", "profile_memory", "seed")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A fact and what each side says of it, as text; several values where the rows of a side disagree."""

    name: str
    base: str
    new: str

    @property
    def fatal(self) -> bool:
        """Whether it leaves nothing to compare."""
        return self.name in FATAL


def differences(pairs: Iterable[Pair]) -> list[Difference]:
    """What differs between the sides of any cell that both have, the fatal ones first, each said once."""
    found: dict[Difference, None] = {}
    told: list[set[bool]] = [set(), set()]
    for pair in pairs:
        if pair.base is None or pair.new is None:
            continue
        sides = (pair.base, pair.new)
        facts = [_facts_of(pool) for pool in sides]
        for index, pool in enumerate(sides):
            told[index] |= {bool(row.environment) for row in pool.rows}
        for name in dict.fromkeys([*facts[0], *facts[1]]):
            base, new = (side.get(name, []) for side in facts)
            # Rows of one side that were made differently cannot be pooled any more than compared.
            mixed = name in FATAL and len({*base, *new}) > 1
            if base and new and (mixed or set(base) != set(new)):
                found[Difference(name=name, base=", ".join(base), new=", ".join(new))] = None
    if told in ([{True}, {False}], [{False}, {True}]):
        words = ["recorded" if True in side else "not recorded" for side in told]
        found[Difference(name="environment", base=words[0], new=words[1])] = None
    return sorted(found, key=lambda each: not each.fatal)


def _facts_of(pool: Pool) -> dict[str, list[str]]:
    """name -> the different values among the rows of `pool`, in their order."""
    values: dict[str, dict[str, None]] = {}
    for row in pool.rows:
        for name, value in facts(row).items():
            values.setdefault(name, {})[value] = None
    return {name: list(found) for name, found in values.items()}


def facts(result: BenchmarkResult) -> dict[str, str]:
    """What a row tells of how it was made, as text: what its number depends on, and not how busy the machine was."""
    environment, config = _mapping(result.environment), _mapping(result.config)
    flags, nvml = dict(_mapping(environment.get("flags"))), _mapping(environment.get("nvml"))
    threads = environment.get("threads") or flags.get("threads")
    flags.pop("threads", None)
    fatal = {
        "kind of device": _KINDS.get(device_kind(result) or ""),
        "device": device_name(result),
        "dtype": result.dtype,
        "threads": threads,
        "TF32 in matmul": flags.pop("tf32_matmul", None),
        "TF32 in cuDNN": flags.pop("tf32_cudnn", None),
        "fp32 matmul precision": flags.pop("float32_matmul_precision", None),
    }
    found: dict[str, Any] = {}
    for source, names in ((environment, _ENVIRONMENT), (nvml, _NVML), (flags, sorted(flags)), (config, _CONFIG)):
        found |= {name.replace("_", " "): source.get(name) for name in names}
    if not environment.get("gpu"):
        # It is the device then, and was named as that.
        found["cpu"] = None
    if runs := config.get("benchmark_runs"):
        found["samples a round"] = runs if config.get("fixed_runs") else f"at least {runs}"
    found[f"source of {result.block_name}"] = result.source_hash and str(result.source_hash)[:12]
    found[f"path of {result.block_name}"] = result.path
    # Last: no flag of a stranger's file may stand in for one of these.
    found |= fatal
    return {name: text for name, value in found.items() if (text := _text(value))}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """`value` as one word or line, empty for what is not told."""
    if value is None or isinstance(value, Mapping):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
