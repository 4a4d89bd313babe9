"""sysinfo: one document, and a check that tells good surroundings from bad ones."""

from __future__ import annotations

import json
import sys

import pytest

from longctx.cli._environment import check_environment
from longctx.cli.sysinfo import probe

HOST = {
    "affinity": [0, 1, 2, 3],
    "logical_cores": 4,
    "default_threads": 2,
    "others_busy_cores": 0.1,
    "steal_fraction": 0.0,
    "governor": "performance",
    "memory_available_bytes": 16 << 30,
    "memory_limit_bytes": None,
    "swap_total_bytes": 0,
    "swap_used_bytes": 0,
}
GPU = {
    "device": "cuda:0",
    "gpu": "A GPU",
    "cuda": "13.0",
    "nvml": {"throttled": False, "temperature_c": 40, "utilization_percent": 0, "other_processes": []},
}
VERSIONS = dict.fromkeys(("lightning", "numpy", "psutil"), "1.0") | {"typer": "0.29.2", "plotext": "6.1.0"}


def check(tmp_path, *, host=None, devices=({"gpu": None, "cuda": None},), versions=None, failure=None):
    return check_environment(
        HOST | (host or {}),
        list(devices),
        VERSIONS | (versions or {}),
        results_dir=str(tmp_path / "a" / "b"),
        torch_failure=failure,
    )


def test_a_quiet_machine_is_all_ok(tmp_path) -> None:
    assert {line.level for line in check(tmp_path, devices=[{"gpu": None, "cuda": None}, GPU])} == {"ok"}
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"host": {"others_busy_cores": 3.5}}, "warning", "3.5 of 4 logical cores busy"),
        ({"host": {"steal_fraction": 0.2}}, "warning", "20.0%"),
        ({"host": {"governor": "powersave", "turbo": None}}, "warning", "powersave"),
        ({"host": {"memory_available_bytes": 1 << 30}}, "warning", "1.00 GiB"),
        ({"host": {"cpu_quota_cores": 0.5}}, "warning", "0.500 of a core"),
        ({"host": {"swap_total_bytes": 100, "swap_used_bytes": 90}}, "warning", "swap"),
        ({"devices": [{"gpu": None, "cuda": "13.0"}]}, "warning", "sees no GPU"),
        ({"devices": [GPU | {"nvml": None}]}, "warning", "cannot be read"),
        ({"devices": [GPU | {"nvml": GPU["nvml"] | {"temperature_c": 91}}]}, "warning", "91 C"),
        ({"devices": [GPU | {"nvml": GPU["nvml"] | {"other_processes": [7]}}]}, "warning", "1 other process"),
        (
            {"devices": [GPU | {"nvml": GPU["nvml"] | {"throttled": True, "clock_reasons": ["hw_thermal"]}}]},
            "warning",
            "hw_thermal",
        ),
        ({"failure": "ImportError: libfoo"}, "problem", "libfoo"),
        ({"versions": {"plotext": "5.3.2"}}, "problem", "plotext 5.3.2"),
        ({"versions": {"lightning": None}}, "problem", "lightning"),
    ],
)
def test_what_spoils_a_measurement_is_named_with_advice(tmp_path, changes, level: str, said: str) -> None:
    lines = [line for line in check(tmp_path, **changes) if line.level != "ok"]
    assert [line.level for line in lines] == [level]
    assert said in lines[0].text
    assert lines[0].advice


def test_a_results_folder_that_cannot_be(tmp_path) -> None:
    (tmp_path / "a").write_text("a file in the way")
    assert [line.text for line in check(tmp_path) if line.level == "problem"] == [
        f"results cannot be saved under {tmp_path / 'a' / 'b'}"
    ]


def test_the_document_and_the_page(call, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    import longctx.cli.sysinfo as module

    facts = [{"device": "cpu", "gpu": None, "cuda": None, "flags": {"threads": 2, "tf32_matmul": False}}, GPU]
    monkeypatch.setattr(module, "probe", lambda: (facts, None))
    result = call("sysinfo", "--json", "--results-dir", str(tmp_path))
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["devices"] == facts
    assert {line["level"] for line in document["checks"]} <= {"ok", "warning", "problem"}
    assert call("sysinfo", "--device", "cuda").exit_code == 0
    monkeypatch.setattr(module, "probe", lambda: (facts[:1], None))
    assert call("sysinfo", "--device", "cuda").exit_code == 5
    monkeypatch.setattr(module, "probe", lambda: (facts, None))
    # A path stays whole, to be copied.
    monkeypatch.chdir(tmp_path)
    page = call("sysinfo", "--results-dir", "results", COLUMNS="50").stdout
    assert "Environment check" in page
    assert "A GPU" in page
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 50


def test_the_probe_asks_torch_and_survives_one_that_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    facts, failure = probe()
    assert failure is None
    assert facts[0]["device"] == "cpu"
    assert facts[0]["flags"]["threads"] >= 1
    (tmp_path / "torch.py").write_text("raise ImportError('libbroken.so')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts, failure = probe()
    assert (facts, failure) == ([], "ImportError: libbroken.so")
    assert "torch" not in sys.modules or sys.modules["torch"].__file__ != str(tmp_path / "torch.py")
