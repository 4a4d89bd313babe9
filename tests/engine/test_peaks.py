"""What this machine can do at most: kept between runs, the best of all; and rows that claim more."""

from __future__ import annotations

import json

import pytest

from longctx.config import BlockRequest, Cell
from longctx.engine import peaks as module
from longctx.engine.judge import Judge
from longctx.engine.peaks import Peaks, keep_peaks, load_peaks, peaks_key
from longctx.engine.rows import new_row

CPU = {"gpu": None, "cpu": "A processor", "threads": 2, "torch": "2.13.0"}
GPU = {"gpu": "A card", "cpu": "A processor", "threads": 8, "torch": "2.13.0"}
CELL = Cell(block=BlockRequest(target="X"), length=1024)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "longctx" / "peaks.json"


def row(time_s: float, **fields):
    return new_row(CELL, forward_time_median=time_s, samples=[[time_s]], **fields)


def test_the_best_of_all_measurements_is_kept(cache):
    key = peaks_key(CPU)
    assert load_peaks(key) is None
    keep_peaks(key, Peaks(flops={"fp32": 1e11}, copy_bytes=1e10, cache_bytes=1e6))
    best = keep_peaks(key, Peaks(flops={"fp32": 9e10, "fp64": 5e10}, copy_bytes=2e10, cache_bytes=1e6))
    assert best.flops == {"fp32": 1e11, "fp64": 5e10}
    assert load_peaks(key).copy_bytes == 2e10
    assert list(json.loads(cache.read_text())) == [key]


def test_peaks_belong_to_device_torch_and_threads():
    keys = [peaks_key({**CPU, **change}) for change in ({}, {"threads": 1}, {"torch": "2.8.0"}, {"cpu": "Another"})]
    assert len(set(keys)) == 4
    assert peaks_key(GPU) == peaks_key({**GPU, "threads": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"flops": {"fp32": "x"}, "copy_bytes": 1}}'])
def test_a_damaged_cache_is_no_cache(cache, text):
    key = peaks_key(CPU)
    cache.parent.mkdir(parents=True)
    cache.write_text(text.replace("KEY", key))
    assert load_peaks(key) is None
    assert keep_peaks(key, Peaks(flops={"fp32": 1.0}, copy_bytes=1.0)).flops == {"fp32": 1.0}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert keep_peaks("key", Peaks(flops={"fp32": 1.0}, copy_bytes=1.0)).flops == {"fp32": 1.0}


def test_bytes_that_fit_the_last_cache_do_not_bind():
    peaks = Peaks(flops={"fp32": 1e12}, copy_bytes=1e9, cache_bytes=1e6)
    assert peaks.bound_s(flops=None, bytes=1e6, dtype="fp32") == 0.0
    assert peaks.bound_s(flops=None, bytes=3e6, dtype="fp32") == pytest.approx(2e-3)
    assert peaks.bound_s(flops=1e10, bytes=3e6, dtype="fp32") == pytest.approx(1e-2)
    assert peaks.bound_s(flops=1e10, bytes=None, dtype="bf16") == 0.0


def test_a_row_gets_its_share_of_what_is_possible():
    judge = Judge(GPU, lambda dtype: Peaks(flops={"fp32": 1e12}, copy_bytes=1e12))
    honest = row(0.01, flops=5e9, bytes=1e6)
    judge.judge(honest, CELL)
    assert honest.status == "ok" and honest.roofline_fraction == pytest.approx(0.5)


@pytest.mark.parametrize(("environment", "margin"), [(GPU, 1.05), (CPU, 1.30)])
def test_faster_than_the_peak_is_impossible_beyond_the_margin(environment, margin):
    judge = Judge(environment, lambda dtype: Peaks(flops={"fp32": 1e12}, copy_bytes=1e12))
    near, beyond = row(0.01 / margin * 1.01, flops=1e10), row(0.01 / margin * 0.98, flops=1e10)
    judge.judge(near, CELL)
    judge.judge(beyond, CELL)
    assert (near.status, beyond.status) == ("ok", "impossible")
    assert "cost model" in beyond.error["message"]


def test_a_peak_that_was_read_too_low_is_measured_again_before_the_word_is_used():
    rates = iter([1e11, 1e12])
    judge = Judge(CPU, lambda dtype: Peaks(flops={"fp32": next(rates)}, copy_bytes=1e12))
    fast = row(0.02, flops=1e10)
    judge.judge(fast, CELL)
    assert fast.status == "ok" and fast.roofline_fraction == pytest.approx(0.5)


def test_a_block_without_a_cost_model_needs_no_peak():
    def never(dtype):
        raise AssertionError("measured for nothing")

    plain = row(0.02)
    Judge(CPU, never).judge(plain, CELL)
    assert plain.status == "ok" and plain.roofline_fraction is None


def test_peaks_that_cannot_be_measured_condemn_nothing():
    found = row(1e-9, flops=1e15)
    Judge(CPU, lambda dtype: None).judge(found, CELL)
    assert found.status == "ok" and found.roofline_fraction is None


def test_a_worker_measures_and_keeps_peaks(cache, monkeypatch):
    environment, found = module.measure_in_worker("cpu", ("fp32",))
    assert found.flops["fp32"] > 1e9 and found.copy_bytes > 1e8 and found.cache_bytes > 0
    assert load_peaks(peaks_key(environment)).flops["fp32"] == found.flops["fp32"]


@pytest.mark.cuda
def test_peaks_of_a_gpu_are_steady():
    readings = [module.measure_in_worker("cuda", ("bf16",))[1] for _ in range(3)]
    for rates in ([r.flops["bf16"] for r in readings], [r.copy_bytes for r in readings]):
        assert max(rates) / min(rates) < 1.03


def test_nothing_is_condemned_by_a_peak_that_was_read_beside_others():
    judge = Judge(CPU, lambda dtype: Peaks(flops={"fp32": 1e12}, copy_bytes=1e12, contended=True))
    fast = row(0.001, flops=1e10)
    judge.judge(fast, CELL)
    assert fast.status == "ok"
