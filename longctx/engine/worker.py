"""The process that measures: `python -m longctx.engine.worker FD`. Jobs come as JSON lines on standard input, events go
as JSON lines to the file descriptor FD; whatever a block prints goes elsewhere and disturbs neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _die_with(supervisor: int) -> None:
    """Never outlive the supervisor, and go first when memory runs out: a row is cheaper than the machine."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _keep_freed_pages() -> None:
    """Let glibc keep the pages of blocks up to 32 MiB when they are freed.

    Left to itself it gives them back in one process and keeps them in the next, as chance has laid out its heap, and
    the same block can take twice as long there for as long as the process lives.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # as it is set where memory is measured
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
            library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _set_aside() -> None:
    """Never look for garbage again among what is there now, torch and all that it has loaded for its first cell.

    Every cell has garbage collected several times, and each time took a fifth of a second for a million objects that
    stay.
    """
    gc.collect()
    gc.freeze()


def main() -> None:
    """Answer jobs until standard input ends."""
    channel = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    os.set_inheritable(channel.fileno(), False)
    _die_with(int(sys.argv[2]))
    _keep_freed_pages()
    # A file of the user's that reads its arguments gets none, rather than ours.
    del sys.argv[1:]
    jobs = os.fdopen(os.dup(0), "r")
    # A block that reads standard input gets nothing, rather than the next job.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def emit(event: dict[str, Any]) -> None:
        channel.write(json.dumps(event, default=str) + "\n")

    start = json.loads(jobs.readline() or "{}")
    if not start:
        return
    if start["affinity"]:
        # Before torch is imported: its thread pools take the processors that they find.
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, start["affinity"])
    from longctx.engine.session import Session

    orders = (json.loads(line) for line in jobs)
    session = Session(start["config"], emit, orders=orders, beside=start.get("beside"))
    for job in orders:
        session.run(job)
        if job["job"] == "measure" and not gc.get_freeze_count():
            _set_aside()


if __name__ == "__main__":
    main()
