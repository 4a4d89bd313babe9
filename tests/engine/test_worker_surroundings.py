"""What a worker process is given and kept from: its streams, its environment, its processors."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
from fake_torch import SPEAK, lost, said

from longctx.engine.machine import affinity, cgroup_limits, default_threads, physical_cores
from longctx.engine.process import LOG_TAIL_BYTES, MALLOC_ENVIRONMENT, WorkerProcess

# -- what a block prints and reads ---------------------------------------------------------------------------------


def test_a_block_that_prints_without_end_holds_nothing_up_and_its_end_is_kept(script, start):
    lines = "for _ in range(4):\n    print('x' * (1 << 20))\n    print('y' * (1 << 20), file=sys.stderr)\n"
    script(lines + "print('the end', flush=True)\n" + SPEAK.format("'alive'"))
    worker = start()
    assert said(worker) == "alive"
    worker.close()
    tail = worker.log_tail()
    assert len(tail) <= LOG_TAIL_BYTES
    assert tail.endswith("the end\n")


def test_a_short_output_is_kept_whole_however_it_comes(script, start):
    lines = "for number in range(60):\n    print('line', number, file=sys.stderr, flush=True)\n    time.sleep(0.002)\n"
    script(lines + "os._exit(3)\n")
    assert lost(start()).log_tail.splitlines() == [f"line {number}" for number in range(60)]


def test_bytes_that_are_no_text_are_kept_as_text(script, start):
    script(r"os.write(2, b'\xff\xfe broken \xe2\x82'); os._exit(3)")
    assert " broken " in lost(start()).log_tail


def test_the_last_words_of_a_block_are_kept_even_if_it_did_not_flush_them(script, start, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script("print('about to do it')\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert "about to do it" in lost(start()).log_tail


def test_a_block_that_reads_standard_input_gets_its_end_and_not_the_next_job(script, start):
    child = "subprocess.run(['cat'], stdout=subprocess.PIPE).stdout"
    script(SPEAK.format(f"repr([sys.stdin.read(), os.read(0, 100), {child}])"))
    worker = start()
    for _ in range(2):
        assert said(worker) == "['', b'', b'']"


def test_a_block_that_closes_its_standard_streams_still_answers(script, start):
    script("os.close(0); os.close(1); os.close(2)\n" + SPEAK.format("'alive'"))
    assert said(start()) == "alive"


# -- what a worker is given ----------------------------------------------------------------------------------------


def environment_of(worker: WorkerProcess) -> dict[str, str]:
    return json.loads(said(worker))


TELL_ENVIRONMENT = "import json\n" + SPEAK.format("json.dumps(dict(os.environ))")


def test_the_users_environment_is_passed_on_with_the_threads_set(script, start, monkeypatch):
    monkeypatch.setenv("LONGCTX_TEST_OF_THE_USERS", "a value with spaces and ü")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    script(TELL_ENVIRONMENT)
    found = environment_of(start(threads=2))
    assert found["LONGCTX_TEST_OF_THE_USERS"] == "a value with spaces and ü"
    assert found["PATH"] == os.environ["PATH"]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        assert found[name] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("users", [None, "131072"])
def test_only_the_memory_worker_has_the_allocator_settings_that_slow_work(script, start, monkeypatch, users):
    for name in MALLOC_ENVIRONMENT:
        if users:
            monkeypatch.setenv(name, users)
    script(TELL_ENVIRONMENT)
    assert MALLOC_ENVIRONMENT.items() <= environment_of(start(memory=True)).items()
    assert not MALLOC_ENVIRONMENT.keys() & environment_of(start()).keys()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to do with freed pages")
def test_freed_pages_are_kept_except_to_measure_memory(script, start):
    """Else a block finds them again in some processes and not in others, and takes up to twice as long there."""
    pages = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [libc.malloc(1 << 20) for _ in range(8)]
        for block in blocks:
            libc.memset(block, 1, 1 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
"""
    script(pages + SPEAK.format("str(faults())"))
    touched = 10 * 8 * (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(said(start())) < 0.1 * touched
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not (huge.exists() and "[always]" in huge.read_text()):
        assert int(said(start(memory=True))) > 0.9 * touched


def test_a_worker_goes_first_when_memory_runs_out(script, start):
    if not os.path.exists("/proc/self/oom_score_adj"):
        pytest.skip("this system has no oom_score_adj")
    script(SPEAK.format("open('/proc/self/oom_score_adj').read()"))
    assert said(start()).strip() == "1000"
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"


def test_a_worker_has_a_session_of_its_own_and_as_many_processors_as_threads(script, start):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system pins no process")
    script(SPEAK.format("repr([os.getsid(0) == os.getpid(), sorted(os.sched_getaffinity(0))])"))
    assert said(start(threads=1)) == repr([True, affinity()[:1]])


def test_default_threads_have_a_core_each(script, start):
    threads = default_threads()
    if physical_cores(affinity()) is None or cgroup_limits().cpu_quota_cores:
        pytest.skip("this system does not say which processors share a core, or a quota decides")
    script(SPEAK.format("repr(sorted(os.sched_getaffinity(0)))"))
    assert physical_cores(json.loads(said(start(threads=threads)))) == threads
