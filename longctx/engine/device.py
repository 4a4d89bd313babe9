"""The device and number format that are measured on, and what is known about them."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from longctx.engine.flags import flag_state
from longctx.errors import MissingError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# Bits of NVML's clock event reasons that mean the chip is held below what was asked of it. A software power cap is
# not among them: large matrix products always meet it.
_THROTTLE_BITS = {0x08: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "hw_power_brake"}
_OTHER_BITS = {0x01: "idle", 0x02: "application_clocks", 0x04: "sw_power_cap", 0x10: "sync_boost", 0x100: "display"}


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device. Raises MissingError for a GPU that is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no usable NVIDIA GPU"
        raise MissingError(
            f"device {name!r} was asked for, but {why}",
            "use --device cpu; or check `nvidia-smi` and that torch is a CUDA build (`longctx sysinfo`)",
        )
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        raise UsageError(f"device {name!r} cannot be measured", "use auto, cpu, cuda or cuda:N")
    index = device.index if device.index is not None else torch.cuda.current_device()
    count = torch.cuda.device_count()
    if index >= count:
        raise MissingError(
            f"there is no GPU number {index}: torch sees {count}, counted from 0",
            "choose --device cuda:0, or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> tuple[str, torch.dtype]:
    """`auto` or a name as (name, dtype): auto is bf16 on a GPU (fp16 where it has no bf16) and fp32 on a CPU."""
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            with torch.cuda.device(device):
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in DTYPES:
        raise UsageError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {name!r}")
    return name, DTYPES[name]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Versions, the device, its present state and the numeric flags. None where something is not known."""
    facts: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": _triton_version(),
        "driver": None,
        "gpu": None,
        "uuid": None,
        "compute_capability": None,
        "sm_count": None,
        "l2_bytes": None,
        "gpu_memory_total_bytes": None,
        "gpu_memory_free_bytes": None,
        "nvml": None,
        "flags": flag_state(),
    }
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    snapshot = nvml_snapshot(device)
    return facts | {
        "driver": snapshot.get("driver") if snapshot else None,
        "gpu": properties.name,
        "uuid": _uuid(device),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "gpu_memory_total_bytes": total,
        "gpu_memory_free_bytes": free,
        "nvml": snapshot,
    }


def nvml_snapshot(device: torch.device) -> dict[str, Any] | None:
    """Clocks, temperature, power, throttling and other processes of a GPU now. None without GPU or nvidia-ml-py.

    Keys: driver, sm_clock_mhz, sm_clock_max_mhz, memory_clock_mhz, temperature_c, power_w, power_limit_w,
    energy_mj (millijoules since the driver was loaded), clock_reasons, throttled, utilization_percent,
    other_processes (their ids). A value that this GPU does not tell is None.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handle = _nvml_handle(nvml, device)
        if handle is None:
            return None

        def ask(name: str, *arguments: Any) -> Any:
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                return getattr(nvml, name)(*arguments)
            return None

        driver = ask("nvmlSystemGetDriverVersion")
        bits = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if bits is None:
            bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        power = ask("nvmlDeviceGetPowerUsage", handle)
        limit = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        processes = ask("nvmlDeviceGetComputeRunningProcesses", handle)
        use = ask("nvmlDeviceGetUtilizationRates", handle)
        names = _THROTTLE_BITS | _OTHER_BITS
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "energy_mj": ask("nvmlDeviceGetTotalEnergyConsumption", handle),
            "clock_reasons": None if bits is None else [name for bit, name in names.items() if bits & bit],
            "throttled": None if bits is None else any(bits & bit for bit in _THROTTLE_BITS),
            "utilization_percent": None if use is None else use.gpu,
            # In a container the driver lists ids of the host's name space, so our own cannot always be told apart.
            "other_processes": None if processes is None else [p.pid for p in processes if p.pid != os.getpid()],
        }
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _nvml_handle(nvml: Any, device: torch.device) -> Any:
    """The GPU by its uuid: NVML does not follow CUDA_VISIBLE_DEVICES, so its numbers are not torch's."""
    uuid = _uuid(device)
    candidates = []
    if uuid:
        candidates = [f"GPU-{uuid}", f"MIG-{uuid}", uuid]
    for candidate in candidates:
        for key in (candidate, candidate.encode()):
            with contextlib.suppress(nvml.NVMLError, TypeError):
                return nvml.nvmlDeviceGetHandleByUUID(key)
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        with contextlib.suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return None


def _uuid(device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(uuid) if uuid else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
