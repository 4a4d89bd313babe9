"""One sweep per device and per results file at a time: two on one device would measure each other."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from longctx.errors import LongctxError


@contextlib.contextmanager
def held(resource: str, words: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock on `resource` while the block runs. It is given up with the process, however that ends.

    words: what it is, for the message. Raises LongctxError, naming the process that holds it, rather than wait for
    longer than `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    path = _path(resource)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _take(handle):
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise LongctxError(
                    f"another sweep is using {words} (process {holder})",
                    "two at once would measure each other: wait for it, or end it",
                )
            time.sleep(0.02)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(resource: str) -> int | None:
    """The process that holds the lock on `resource`, 0 if it does not say which it is, None if nobody does."""
    path = _path(resource)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared and at once let go: a sweep that begins in this very moment is told that a reader has it.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(handle)
    return None


def _path(resource: str) -> Path:
    return _folder() / f"{hashlib.sha256(resource.encode()).hexdigest()[:16]}.lock"


def _folder() -> Path:
    """A folder of this user's own that all of their processes on this machine share."""
    folder = Path(tempfile.gettempdir(), f"longctx-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LongctxError(
            f"cannot make {folder}: {error.strerror}", "remove it, or set TMPDIR to a folder of your own"
        ) from None
    if folder.stat().st_uid != os.getuid():
        raise LongctxError(f"{folder} belongs to another user", "remove it, or set TMPDIR to a folder of your own")
    return folder
