"""`longctx test` as a command: its table, its document, its exit code, and a runner that misses a fault."""

import json

import pytest

from longctx.cli.main import build
from longctx.engine import run_selftest, runner
from longctx.results import BenchmarkResult

EMPTY = {"figure": None, "limit": None, "unit": "", "note": ""}


def check(part, name, *, passed=True, **fields):
    return {"event": "check", "part": part, "name": name, "passed": passed, **EMPTY, **fields}


FINE = [
    check("block:BLADE", "forward", figure=2e-7, limit=1e-5),
    check("block:BLADE", "gradients", figure=9e-6, limit=1e-4),
    check("timer", "delay of 50 ms", figure=0.3, limit=2.0, unit="%", note="read 50.15 ms of 50.00 ms"),
]
BAD = check("block:x.py:\x1b[31mMine", "forward", passed=False, figure=float("inf"), limit=1e-5, note="[red]torch")


@pytest.fixture
def verify(capfd, monkeypatch):
    """Runs the command over given checks: (exit code, stdout, stderr, the parts that it asked for)."""

    def run(*words, checks, columns=100):
        asked = []

        def run_checks(parts, *, device, dtype):
            asked.extend(parts)
            yield {"event": "ready", "device": "cpu", "dtype": "fp32"}
            yield {"event": "part", "part": "timer"}
            yield from checks

        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(run_selftest, "run_checks", run_checks)
        monkeypatch.setattr(run_selftest, "check_faults", lambda *, device: iter(()))
        with pytest.raises(SystemExit) as end:
            build()(["test", *words], prog_name="longctx")
        out, err = capfd.readouterr()
        return end.value.code, out, err, asked

    return run


def test_what_passed_is_one_line_a_part(verify):
    code, out, err, asked = verify(checks=FINE)
    assert code == 0 and "checking timer" in err
    assert "BLADE: 2 checks" in out and "9.0e-06" in out and "all 3 checks passed on cpu in fp32" in out
    assert {"block:Dense", "block:BigBird", "timer", "memory"} <= set(asked)
    _, out, _, _ = verify("--verbose", checks=FINE)
    assert "BLADE: forward" in out and "read 50.15 ms" in out


@pytest.mark.parametrize("columns", [120, 80, 50])
def test_a_failure_is_named_and_ends_in_three(verify, columns):
    code, out, _, _ = verify(checks=[*FINE, BAD], columns=columns)
    assert code == 3 and "FAILED" in out and "1 of 4 checks failed" in out and "[red]torch" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= columns


def test_a_long_reason_breaks_between_words(verify):
    note = "it needs as many tokens as --max-length says, and a launch-bound cell has none of them"
    _, out, _, _ = verify(checks=[check("timer", "delay", passed=False, note=note)], columns=50)
    assert set(note.split()) <= set(out.split())
    assert max(map(len, out.splitlines())) <= 50


def test_the_document_is_strict_json(verify):
    code, out, _, _ = verify("--json", checks=[*FINE, BAD])
    document = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 3 and document["passed"] is False and document["device"] == "cpu"
    assert len(document["checks"]) == 4 and document["checks"][-1]["figure"] is None


def test_blocks_are_known_before_anything_runs(verify):
    code, out, err, asked = verify("--blocks", "BLAED", checks=FINE)
    assert (code, out, asked) == (2, "", []) and "BLADE" in err
    *_, asked = verify("--blocks", "blade:chunk_size=64", "mine.py:Mine", checks=FINE)
    assert asked[:2] == ["block:blade:chunk_size=64", "block:mine.py:Mine"]


def test_a_runner_that_misses_faults_is_found(monkeypatch):
    def run_sweep(blocks, config):
        names = [block.rpartition(":")[2] for block in blocks if not block.endswith("Hang")]
        rows = [BenchmarkResult(block_name=name, sequence_length=64, forward_time_median=1.0) for name in names]
        for row in rows:
            row.first_call_s = 2.5
        return rows

    monkeypatch.setattr(runner, "run_sweep", run_sweep)
    checks = {c["name"]: c for c in run_selftest.check_faults(device="cpu") if c["event"] == "check"}
    assert [name for name, c in checks.items() if c["passed"]] == ["the sweep goes on"]
    notes = " ".join(c["note"] for c in checks.values())
    assert "expected crashed" in notes and "no row" in notes and "no warning suspect" in notes
    assert "first call 2.50 s, then 1.00 s" in notes
    assert "SideStream" not in notes


def test_crashes_hangs_and_cheats_are_caught(monkeypatch):
    monkeypatch.setitem(run_selftest.FAULT_TIMEOUT_S, "cpu", 6.0)
    checks = [event for event in run_selftest.check_faults(device="cpu") if event["event"] == "check"]
    assert len(checks) == len(run_selftest.FAULTS) - 1
    assert all(c["passed"] for c in checks), checks
