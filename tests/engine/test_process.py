"""A worker process: what it answers, what it is kept from, and that none is left however it or its supervisor ends.

Most tests put a file of their own in the place of torch, which a worker imports for its first job: what a block does to
its process happens there too, without waiting for the real one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from longctx.config import BenchmarkConfig, BlockRequest, Cell
from longctx.engine import process
from longctx.engine.machine import affinity, cgroup_limits, default_threads, physical_cores
from longctx.engine.process import LOG_TAIL_BYTES, MALLOC_ENVIRONMENT, Refused, WorkerLost, WorkerProcess

CONFIG = BenchmarkConfig(device="cpu", d_model=32, n_heads=2, threads=1).to_json()
HELLO = {"job": "hello"}
PATIENCE_S = 60.0

SPEAK = "from longctx.errors import LongctxError; raise LongctxError({})\n"
"""Ends the job with a message from inside: the worker lives on, and this is what it says."""

SUPERVISOR = """
import json, sys
from longctx.engine.process import Refused, WorkerProcess

worker = WorkerProcess(json.loads(sys.argv[1]), threads=1)
print(worker.pid, flush=True)
while True:
    try:
        worker.ask({"job": "hello"}, timeout=60.0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except Refused as refused:
        print(refused.message, flush=True)
        break
"""


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether the process ends. One that nobody has reaped yet is gone too."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def group_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def text_of(path: Path) -> str:
    """What is written to `path`, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path.name} was never written")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Puts code in the place of torch, for workers started after it. `folder` names the test's folder in it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> None:
        head = f"import os, resource, signal, subprocess, sys, time\nfolder = {str(tmp_path)!r}\n"
        # A crash on purpose needs no core file.
        head += "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        (tmp_path / "torch.py").write_text(head + code)

    return write


@pytest.fixture
def start():
    """Starts workers, and ends them with the test."""
    with contextlib.ExitStack() as stack:

        def start(*, threads: int = 1, memory: bool = False) -> WorkerProcess:
            worker = WorkerProcess(CONFIG, threads=threads, memory=memory)
            stack.callback(worker.close)
            return worker

        yield start


@pytest.fixture
def supervisor(script):
    """Starts a supervisor in a process group of its own: (it, the pid of its worker)."""
    with contextlib.ExitStack() as stack:

        def start() -> tuple[subprocess.Popen, int]:
            words = [sys.executable, "-c", SUPERVISOR, json.dumps(CONFIG)]
            started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
            stack.callback(started.communicate)
            stack.callback(started.kill)
            return started, int(started.stdout.readline())

        yield start


def said(worker: WorkerProcess, *, timeout: float = PATIENCE_S) -> str:
    """What the code in the place of torch says of itself."""
    with pytest.raises(Refused) as caught:
        worker.ask(HELLO, timeout=timeout)
    return caught.value.message


def lost(worker: WorkerProcess, *, timeout: float = PATIENCE_S) -> WorkerLost:
    with pytest.raises(WorkerLost) as caught:
        worker.ask(HELLO, timeout=timeout)
    assert gone(worker.pid)
    return caught.value


# -- with the real torch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    worker = WorkerProcess(CONFIG, threads=1)
    yield worker
    worker.close()


def test_hello_says_what_the_device_is(real):
    answer = real.ask(HELLO, timeout=PATIENCE_S)
    assert (answer["device"], answer["dtype"]) == ("cpu", "fp32")
    assert answer["environment"]["torch"] == torch.__version__
    assert answer["environment"]["flags"]["threads"] == 1


def test_a_job_that_the_user_can_mend_is_refused_and_the_worker_goes_on(real):
    with pytest.raises(Refused) as caught:
        real.ask({"job": "describe", "target": "BLAED", "options": {}}, timeout=PATIENCE_S)
    error = caught.value.as_error()
    assert error.exit_code == 2
    assert "BLADE" in error.message
    answer = real.ask({"job": "describe", "target": "BLADE", "options": {"chunk_size": 8}}, timeout=PATIENCE_S)
    assert answer["identity"]["options"]["chunk_size"] == 8
    assert answer["identity"]["options"]["state_dim"] == 64


def test_events_arrive_in_order_before_the_answer(real):
    cell = Cell(block=BlockRequest(target="Identity"), length=16, d_model=32, n_heads=2)
    plan = {"warmup_runs": 1, "runs": 2, "exact": True, "memory": False}
    events = []
    job = {"job": "measure", "cell": cell.to_json(), "plan": plan}
    answer = real.ask(job, timeout=PATIENCE_S, on_event=events.append)
    assert [e["phase"] for e in events if e["event"] == "phase"] == ["build", "gate", "warmup", "timing"]
    counts = [e["count"] for e in events if e["event"] == "sample"]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    assert answer["found"]["status"] == "ok"
    assert len(answer["found"]["samples_round"]) == 2
    assert answer["found"]["samples_round"][-1] == events[-1]["seconds"]


# -- how a worker ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "SIGSEGV"),
        ("os.abort()", "SIGABRT", "SIGABRT"),
        ("os._exit(3)", "Exit", "exit code 3"),
        ("os._exit(0)", "Exit", "exit code 0"),
        ("raise ValueError('a bug of ours')", "Exit", "exit code 1"),
    ],
)
def test_a_worker_that_dies_is_lost_in_words(script, start, code, kind, words):
    script(f"print('last words', flush=True)\n{code}\n")
    found = lost(start())
    assert (found.status, found.kind) == ("crashed", kind)
    assert words in found.message
    assert found.log_tail.startswith("last words")
    assert "a bug of ours" in found.log_tail or "ValueError" not in code


def test_a_worker_killed_from_outside_is_lost(script, start):
    script("time.sleep(600)")
    worker = start()
    threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL)).start()
    found = lost(worker)
    assert (found.status, found.kind) == ("crashed", "SIGKILL")


def test_a_kill_that_the_kernel_counts_as_out_of_memory_is_one(script, start, monkeypatch):
    script("os.kill(os.getpid(), signal.SIGKILL)")
    kills = iter(range(100))
    monkeypatch.setattr(process, "_oom_kills", lambda: next(kills))
    found = lost(start())
    assert (found.status, found.kind) == ("oom", "SIGKILL")
    assert "memory" in found.message


def test_a_worker_that_closes_its_pipe_and_lives_on_is_ended(script, start):
    script("os.closerange(3, 256)\ntime.sleep(600)\n")
    assert lost(start()).status == "crashed"


def test_a_worker_that_hangs_is_ended_at_its_limit(script, start):
    script("print('still here', flush=True)\ntime.sleep(600)\n")
    worker = start()
    began = time.monotonic()
    found = lost(worker, timeout=0.7)
    assert 0.7 <= time.monotonic() - began < 10.0
    assert (found.status, found.kind) == ("timeout", "Timeout")
    assert "0.7 s" in found.message
    assert found.log_tail == "still here\n"


@pytest.mark.parametrize("all_of_it", [False, True])
def test_time_in_which_the_supervisor_was_stopped_costs_no_row(script, tmp_path, all_of_it):
    # Ctrl-Z stops the supervisor alone, a suspended machine its worker too.
    script("time.sleep(1.0)\n" + SPEAK.format("'alive'"))
    ask = (
        "import json, sys\n"
        "from longctx.engine.process import Refused, WorkerProcess\n"
        "worker = WorkerProcess(json.loads(sys.argv[1]), threads=1)\n"
        "print(worker.pid, flush=True)\n"
        "try:\n"
        "    worker.ask({'job': 'hello'}, timeout=4.0)\n"
        "except Refused as refused:\n"
        "    print(refused.message, flush=True)\n"
        "finally:\n"
        "    worker.close()\n"
    )
    words = [sys.executable, "-c", ask, json.dumps(CONFIG)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as stopped:
        worker = int(stopped.stdout.readline())
        for pid in [worker] * all_of_it + [stopped.pid]:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(7.0)
        for pid in [worker] * all_of_it + [stopped.pid]:
            os.kill(pid, signal.SIGCONT)
        assert stopped.stdout.read().strip() == "alive"


def test_a_limit_of_years_is_no_limit(script, start):
    script(SPEAK.format("'alive'"))
    assert said(start(), timeout=1e9) == "alive"


CHILD = """
child = subprocess.Popen(["sleep", "600"])
with open(f"{folder}/child", "w") as file:
    file.write(str(child.pid))
"""


@pytest.mark.parametrize("end", ["time.sleep(600)", "os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_a_block_started_ends_with_its_worker(script, start, tmp_path, end):
    script(CHILD + end)
    worker = start()
    found = lost(worker, timeout=3.0 if "sleep" in end else PATIENCE_S)
    assert found.status == ("timeout" if "sleep" in end else "crashed")
    assert gone(int((tmp_path / "child").read_text()))
    assert not [pid for pid in psutil.pids() if group_of(pid) == worker.pid and not gone(pid)]


def test_closing_ends_the_worker_and_what_it_started_whatever_they_do(script, start, tmp_path):
    script(CHILD + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SPEAK.format("'alive'"))
    worker = start()
    assert said(worker) == "alive"
    worker.close()
    assert gone(worker.pid)
    assert gone(int((tmp_path / "child").read_text()))
    worker.close()


def test_a_worker_that_dies_is_noticed_while_a_process_that_it_forked_lives_on(script, start):
    script("if os.fork() == 0:\n    time.sleep(600)\nos._exit(3)\n")
    found = lost(start(), timeout=8.0)
    assert (found.status, found.kind) == ("crashed", "Exit")


def test_a_worker_leaves_no_descriptor_and_no_thread_behind(script, start):
    script("os._exit(3)")
    gc.collect()
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        worker = WorkerProcess(CONFIG, threads=1)
        lost(worker)
        del worker
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


# -- how its supervisor ends ---------------------------------------------------------------------------------------


def test_a_worker_dies_with_a_supervisor_that_is_killed(script, supervisor, tmp_path):
    script("with open(f'{folder}/started', 'w') as file:\n    file.write('x')\ntime.sleep(600)\n")
    ours, pid = supervisor()
    text_of(tmp_path / "started")
    assert psutil.pid_exists(pid)
    ours.kill()
    assert gone(pid)


def test_an_idle_worker_ends_with_its_supervisor(script, supervisor):
    script(SPEAK.format("'alive'"))
    ours, pid = supervisor()
    assert ours.stdout.readline() == "alive\n"
    assert ours.wait(timeout=PATIENCE_S) == 0
    assert gone(pid)


def test_a_worker_whose_supervisor_is_gone_already_does_nothing(script):
    script("time.sleep(600)")
    receive, send = os.pipe()
    words = [sys.executable, "-m", "longctx.engine.worker", str(send), str(os.getppid())]
    job = json.dumps({"config": CONFIG, "affinity": None}) + "\n" + json.dumps(HELLO) + "\n"
    ended = subprocess.run(words, pass_fds=(send,), input=job, text=True, timeout=PATIENCE_S)
    os.close(send)
    assert ended.returncode == 1
    assert os.read(receive, 100) == b""
    os.close(receive)


def test_ctrl_c_reaches_the_supervisor_and_not_its_worker(script, supervisor, tmp_path):
    wait = "while not os.path.exists(f'{folder}/go'):\n    time.sleep(0.02)\n"
    script("with open(f'{folder}/started', 'w') as file:\n    file.write('x')\n" + wait + SPEAK.format("'alive'"))
    ours, pid = supervisor()
    text_of(tmp_path / "started")
    os.killpg(ours.pid, signal.SIGINT)
    assert ours.stdout.readline() == "interrupted\n"
    assert not gone(pid, within_s=0.2)
    (tmp_path / "go").touch()
    assert ours.stdout.readline() == "alive\n"


def test_an_interrupt_sent_to_the_worker_itself_is_ignored(script, start):
    script("os.kill(os.getpid(), signal.SIGINT)\n" + SPEAK.format("'alive'"))
    assert said(start()) == "alive"


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
