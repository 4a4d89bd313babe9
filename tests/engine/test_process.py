"""A worker process: what it answers, and that none is left however it or its supervisor ends."""

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
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from fake_torch import CONFIG, HELLO, PATIENCE_S, SPEAK, gone, lost, said

from longctx.config import BlockRequest, Cell
from longctx.engine import process
from longctx.engine.process import Refused, WorkerProcess

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
    with warnings.catch_warnings(record=True) as warned:
        # Where warnings are errors, as in many test suites, one that is left open is one.
        warnings.simplefilter("always")
        for _ in range(3):
            worker = WorkerProcess(CONFIG, threads=1)
            lost(worker)
            del worker
        gc.collect()
    assert [str(each.message) for each in warned if each.category is ResourceWarning] == []
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
