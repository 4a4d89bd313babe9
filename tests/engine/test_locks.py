"""A lock excludes, also between processes; it goes with its holder, however that ends; it names who holds it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from longctx.engine import locks
from longctx.engine.locks import held
from longctx.errors import LongctxError

HOLDER = """
import sys, time
from longctx.engine import locks
from longctx.engine.locks import held
with held("a device", "the device"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A temporary folder of this test's own: a sweep that runs on this machine meanwhile has nothing to do with it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder():
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_is_held_for_the_block_and_free_again_after_it():
    for _ in range(2):
        with held("a device", "the device"):
            pass
    with contextlib.suppress(ZeroDivisionError), held("a device", "the device"):
        raise ZeroDivisionError
    with held("a device", "the device"):
        pass


def test_two_in_one_process_exclude_each_other():
    with held("a device", "the device"):
        with pytest.raises(LongctxError, match=f"the device.*{os.getpid()}"), held("a device", "the device"):
            pytest.fail("held twice")
        # The attempt has not taken it from its holder either.
        with pytest.raises(LongctxError), held("a device", "the device"):
            pytest.fail("held twice")


def test_other_resources_stay_free():
    with held("a device", "the device"), held("another device", "it"), held("file /a", "/a"), held("file /b", "/b"):
        pass


def test_another_process_is_refused_with_the_name_of_the_holder(holder):
    with pytest.raises(LongctxError) as caught, held("a device", "the device cpu"):
        pytest.fail("held twice")
    assert caught.value.exit_code == 2
    assert "the device cpu" in caught.value.message
    assert f"process {holder.pid}" in caught.value.message
    assert "wait" in caught.value.hint


def test_a_lock_is_given_up_when_its_holder_is_killed(holder):
    holder.kill()
    holder.wait()
    with held("a device", "the device"):
        pass


def test_a_program_that_the_holder_starts_does_not_keep_the_lock():
    with held("a device", "the device"):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        with held("a device", "the device"):
            pass
    finally:
        child.kill()
        child.wait()


def test_locks_lie_in_a_folder_of_the_users_own(folder):
    with held("a device", "the device"):
        (made,) = folder.iterdir()
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        assert str(os.getuid()) in made.name


def test_a_file_in_the_place_of_the_folder_is_said_as_such(folder):
    (folder / f"longctx-{os.getuid()}").write_text("in the way")
    with pytest.raises(LongctxError, match=f"longctx-{os.getuid()}") as caught, held("a device", "the device"):
        pytest.fail("there is nowhere to hold a lock")
    assert caught.value.hint


def test_who_holds_a_lock_can_be_asked_without_taking_it():
    resource = "file /nowhere/asked.json"
    assert locks.holder(resource) is None
    with held(resource, "it"):
        assert locks.holder(resource) == os.getpid()
    assert locks.holder(resource) is None
    with held(resource, "it"):
        pass
