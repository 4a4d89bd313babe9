"""Devices and formats are chosen or refused in words; flags are pinned, and whatever a block changes is put back."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings

import pytest
import torch

from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine import machine
from longctx.engine.device import describe_device, nvml_snapshot, resolve_device, resolve_dtype
from longctx.engine.flags import flag_state, flushes_denormals, global_state, pinned_flags
from longctx.errors import MissingError, UsageError


def test_a_gpu_that_is_not_there_is_an_error_and_not_a_cpu_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError) as caught:
        resolve_device("cuda")
    assert caught.value.exit_code == 5
    assert "--device cpu" in caught.value.hint
    assert resolve_device("auto") == torch.device("cpu")


def test_a_gpu_number_that_is_not_there_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MissingError, match="2"):
        resolve_device("cuda:7")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError):
        resolve_device("toaster")


def test_formats():
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == ("fp32", torch.float32)
    assert resolve_dtype("bf16", cpu) == ("bf16", torch.bfloat16)
    with pytest.raises(UsageError):
        resolve_dtype("int3", cpu)


def test_a_cpu_is_described_with_nothing_made_up():
    facts = describe_device(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert facts["flags"]["threads"] == torch.get_num_threads()
    for name in ("gpu", "uuid", "driver", "gpu_memory_total_bytes", "nvml"):
        assert facts[name] is None
    assert nvml_snapshot(torch.device("cpu")) is None


def test_flags_are_pinned_as_configured():
    with global_state():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        flags = pinned_flags(BenchmarkConfig(threads=1, cudnn_benchmark=False, cudnn_deterministic=True).to_json())
        assert flags == flag_state()
        assert flags["tf32_matmul"] is False
        assert flags["tf32_cudnn"] is False
        assert flags["float32_matmul_precision"] == "highest"
        assert flags["threads"] == 1
        assert flags["cudnn_benchmark"] is False
        assert flags["cudnn_deterministic"] is True
        assert flags["flush_denormal"] is True


def vandalise(folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_flush_denormal(not flushes_denormals())
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mkldnn.enabled = False
    torch.set_autocast_enabled("cpu", True)
    torch.set_anomaly_enabled(True)
    torch.manual_seed(99)
    random.seed(99)
    os.environ["LONGCTX_TEST_LEFT_BEHIND"] = "1"
    os.environ.pop("PATH", None)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.stdout = None
    sys.setrecursionlimit(5000)
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)


def everything() -> dict:
    return {
        "flags": flag_state(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "grad": torch.is_grad_enabled(),
        "sdpa": torch.backends.cuda.flash_sdp_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "seed": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "stdout": sys.stdout,
        "recursion": sys.getrecursionlimit(),
        "warnings": list(warnings.filters),
        "alarm": signal.getsignal(signal.SIGALRM),
        "timer": signal.getitimer(signal.ITIMER_REAL),
    }


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there is no SIGALRM here")
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_block_changes_is_put_back(tmp_path, fails):
    before = everything()
    with pytest.raises(ZeroDivisionError) if fails else warnings.catch_warnings(), global_state():
        vandalise(str(tmp_path))
        if fails:
            raise ZeroDivisionError
    assert everything() == before


def test_mixing_old_and_new_precision_switches_is_undone():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision switches")
    before = flag_state()
    with global_state():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert flag_state() == before


# -- the host ------------------------------------------------------------------------------------------------------


def write(root, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_limits_of_control_groups_version_2_are_the_tightest_on_the_way_up(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "proc/self/cgroup": "0::/box/job\n",
            "sys/fs/cgroup/box/memory.max": "1000000\n",
            "sys/fs/cgroup/box/memory.current": "700000\n",
            "sys/fs/cgroup/box/memory.stat": "anon 1\ninactive_file 200000\n",
            "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/box/job/memory.max": "max\n",
            "sys/fs/cgroup/box/job/memory.current": "600000\n",
            "sys/fs/cgroup/box/job/cpu.max": "max 100000\n",
        },
    )
    limits = machine.cgroup_limits(tmp_path)
    assert limits.version == 2
    assert limits.cpu_quota_cores == 1.5
    assert limits.memory_limit_bytes == 1_000_000
    assert limits.memory_free_bytes == 500_000


def test_limits_of_control_groups_version_1_where_the_path_is_the_hosts(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "31 20 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "96000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    limits = machine.cgroup_limits(tmp_path)
    assert (limits.version, limits.cpu_quota_cores, limits.memory_free_bytes) == (1, 2.0, 4_000_000)


def test_without_limits_nothing_is_made_up(tmp_path):
    assert machine.cgroup_limits(tmp_path) == machine.CgroupLimits()
    assert machine.physical_cores([0, 1], tmp_path) is None


def test_two_threads_of_one_core_are_one_core(tmp_path):
    for number in range(4):
        folder = f"sys/devices/system/cpu/cpu{number}/topology"
        write(tmp_path, {f"{folder}/physical_package_id": "0\n", f"{folder}/core_id": f"{number % 2}\n"})
    assert machine.physical_cores([0, 1, 2, 3], tmp_path) == 2
    assert machine.physical_cores([0, 2], tmp_path) == 1


def sample(**values):
    empty = {"at_s": 0.0, "steal_s": 0.0, "busy_s": 0.0, "own_s": 0.0, "involuntary_switches": 0, "load1": 0.0}
    return machine.ContentionSample(**{**empty, "processors": 2, **values})


@pytest.mark.parametrize(
    ("later", "contended"),
    [
        ({"busy_s": 2.0, "own_s": 2.0}, False),
        ({"busy_s": 2.6, "own_s": 2.0}, True),
        ({"busy_s": 2.0, "own_s": 2.0, "steal_s": 0.05}, True),
        ({"busy_s": 2.0, "own_s": 2.0, "involuntary_switches": 1000}, True),
        ({"busy_s": None, "steal_s": None, "involuntary_switches": None}, False),
    ],
)
def test_neighbours_are_seen_in_the_counters(later, contended):
    assert sample().until(sample(at_s=1.0, **later), threads=2)["contended"] is contended


def test_a_window_too_short_for_the_kernels_ticks_says_nothing():
    found = sample().until(sample(at_s=0.05, busy_s=1.0, steal_s=1.0))
    assert found["contended"] is None
    assert found["steal_fraction"] is None


def test_predicted_memory_is_a_floor_that_grows_with_the_cell():
    def need(length, **values):
        cell = Cell(block=BlockRequest(target="Identity"), length=length, d_model=64, **values)
        return machine.predict_memory_bytes(cell, {})

    assert need(1000) == 4 * (12 * 64**2 + 2 * 1000 * 64)
    assert need(1000, dtype="bf16") * 2 == need(1000)
    assert need(1000, mode="train") == 2 * need(1000)
    assert need(1 << 30, batch_size=8) > 1 << 40


def test_the_host_is_described():
    facts = machine.describe_host(window_s=0.11)
    assert facts["default_threads"] == machine.default_threads() >= 1
    assert 0 < facts["memory_available_bytes"] <= facts["memory_total_bytes"]
    assert facts["python"].count(".") == 2


@pytest.mark.cuda
def test_random_states_of_all_gpus_are_put_back():
    torch.cuda.init()
    seeds = torch.cuda.get_rng_state_all()
    with global_state():
        torch.cuda.manual_seed_all(99)
    assert len(seeds) == torch.cuda.device_count()
    assert all(torch.equal(*pair) for pair in zip(seeds, torch.cuda.get_rng_state_all(), strict=True))
