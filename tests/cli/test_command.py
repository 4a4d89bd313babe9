"""The grammar of lists, and how a command ends: messages, exit codes, signals, closed pipes, cold starts."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from made_records import row, write
from rich.table import Table

from longctx.cli.command import TYPER_ERROR, Interrupted, spread
from longctx.cli.main import build
from longctx.config import going_on
from longctx.errors import MissingError, UsageError

LISTS = {"--blocks", "--sequence-lengths"}


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--blocks A B", "--blocks=A --blocks=B"),
        ("--blocks=A B", "--blocks=A --blocks=B"),
        ("--blocks A --blocks B", "--blocks=A --blocks=B"),
        ("--blocks A,B --quiet", "--blocks=A,B --quiet"),
        (
            "--blocks A B --sequence-lengths 1K 2K --json",
            "--blocks=A --blocks=B --sequence-lengths=1K --sequence-lengths=2K --json",
        ),
        ("--sequence-lengths 1024 -5", "--sequence-lengths=1024 --sequence-lengths=-5"),
        ("--blocks A --d-model 64 B", "--blocks=A --d-model 64 B"),
        ("--blocks A:c=1,d=2 x.py:B:e=3", "--blocks=A:c=1,d=2 --blocks=x.py:B:e=3"),
        ("--blocks A -- B --blocks", "--blocks=A -- B --blocks"),
        ("--blocks -", "--blocks=-"),
        ("word --json", "word --json"),
        ("", ""),
    ],
)
def test_lists_of_several_words(typed: str, read: str) -> None:
    said: list[str] = []
    assert spread(typed.split(), LISTS, said.append) == read.split()
    assert said == []


@pytest.mark.parametrize("typed", ["--blocks", "--blocks --sequence-lengths 1K", "--blocks --json"])
def test_a_list_without_a_value_is_an_error(typed: str) -> None:
    said: list[str] = []
    spread(typed.split(), LISTS, said.append)
    assert said == ["--blocks needs at least one value"]


def test_an_empty_list_ends_in_a_usage_error(call, fake) -> None:
    result = call("sweep", "--blocks", "--sequence-lengths", "1K")
    assert result.exit_code == 2
    assert "error: --blocks needs at least one value" in result.stderr
    assert fake.calls == []


def test_a_stray_word_is_an_error(call, fake) -> None:
    result = call("sweep", "BLADE")
    assert result.exit_code == 2
    assert "unexpected extra argument" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["swep"], "Did you mean 'sweep'"),
        (["sweep", "--block", "A"], "--blocks"),
        (["sweep", "--dtype", "fp8"], "fp8"),
        (["sweep", "--d-model", "many"], "--d-model"),
        (["sweep", "--sequence-lengths", "0"], "a sequence cannot have 0 tokens"),
        (["sweep", "--sequence-lengths", "4096", "-5"], "'-5'"),
        (["sweep", "--sequence-lengths", "99999999M"], "lengths go from 1"),
        (["sweep", "--d-model", "100"], "not divisible by n_heads"),
        (["sweep", "--num-kv-heads", "3"], "not divisible by num_kv_heads"),
        (["sweep", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["sweep", "--rounds", "0"], "rounds must be a whole number of at least 1"),
        (["sweep", "--timeout", "-1"], "timeout must be a positive number"),
        (["quick", "--runs", "0"], "benchmark_runs must be"),
    ],
)
def test_bad_input_is_said_in_words(call, fake, words: list[str], said: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert fake.calls == []


@pytest.mark.parametrize("words", [["--mode", "decode"], ["--cuda-graph"]])
def test_lightning_mode_refuses_what_a_trainer_cannot_do(call, fake, words) -> None:
    result = call("sweep", "--lightning-mode", *words)
    assert result.exit_code == 2
    assert "hint: leave " in result.stderr
    assert fake.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("bad [red]thing", "do this"), 2), (MissingError("no GPU", "use --device cpu"), 5)],
)
def test_an_expected_error_has_message_hint_and_code(call, fake, error, code: int) -> None:
    fake.raises = error
    result = call("quick")
    assert result.exit_code == code
    assert result.stdout == ""
    assert f"error: {error.message}" in result.stderr
    assert f"hint: {error.hint}" in result.stderr


def test_escapes_in_an_error_do_not_reach_the_terminal(call, fake) -> None:
    fake.raises = UsageError("file \x1b[2J\x07\u202ename")
    result = call("quick")
    assert "\x1b" not in result.stderr
    assert "file [2J name" in result.stderr


def test_a_bug_is_one_line_and_a_traceback_on_request(call, fake) -> None:
    fake.raises = RuntimeError("broken inside")
    short = call("quick")
    assert short.exit_code == 1
    assert "RuntimeError: broken inside" in short.stderr
    assert "Traceback" not in short.stderr
    assert "LONGCTX_DEBUG" in short.stderr
    long = call("quick", LONGCTX_DEBUG="1")
    assert long.exit_code == 1
    assert "Traceback" in long.stderr


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)])
def test_an_interruption_says_what_is_saved_and_how_to_go_on(call, fake, stop, code: int) -> None:
    fake.stop_at, fake.stop = 2, stop
    result = call("sweep", "--sequence-lengths", "1K", "2K")
    assert result.exit_code == code
    assert "interrupted; 2 rows are saved in reports/benchmark/run.json; go on with:" in result.stderr
    again = result.stderr.strip().splitlines()[-1].strip()
    assert again.startswith("longctx sweep ")
    assert "--sequence-lengths 1024 2048" in again
    assert again.endswith("--output-file reports/benchmark/run.json --resume")


def test_how_to_go_on_names_the_file_that_was_written() -> None:
    # A bare name would be looked for under the results folder, and nothing of it be found.
    assert going_on("w.json") == ["--output-file", "./w.json", "--resume"]
    assert going_on("a/w.json") == ["--output-file", "a/w.json", "--resume"]


def test_an_interrupted_quick_says_that_nothing_is_saved(call, fake) -> None:
    fake.stop_at, fake.path = 1, None
    result = call("quick")
    assert result.exit_code == 130
    assert "interrupted; 1 row is finished, nothing is saved" in result.stderr


def test_help_leads_with_examples(call) -> None:
    text = plain(call("--help").stdout)
    assert text.index("longctx quick") < text.index("Options")
    for command in ("quick", "sweep", "sysinfo"):
        page = plain(call(command, "--help").stdout)
        assert page.index(f"longctx {command}") < page.index("--json")
    assert "comprehensive" not in text


@pytest.mark.parametrize("columns", [80, 50])
def test_help_never_cuts_the_name_of_an_option(call, columns: int) -> None:
    program = typer.main.get_command(build())
    for words, command in [([], program), *(([name], each) for name, each in program.commands.items())]:
        page = plain(call(*words, "--help", COLUMNS=str(columns)).stdout)
        assert max(map(len, page.splitlines())) <= columns
        shown = [each for each in command.params if not getattr(each, "hidden", False)]
        names = {name for each in shown for name in (*each.opts, *each.secondary_opts) if name.startswith("--")}
        # Examples and texts hold names too: only those count that begin a row, or follow another name there.
        row = r"(?m)^│ +(?:--[\w-]+ +)*{}(?= )"
        cut = {name for name in names | {"--help"} if not re.search(row.format(name), page)}
        assert not cut, (words, cut)


def test_a_terminal_with_room_has_the_page_as_typer_makes_it(call, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = call("sweep", "--help", COLUMNS="120").stdout
    monkeypatch.setattr("longctx.cli._help.HelpTable", Table)
    assert call("sweep", "--help", COLUMNS="120").stdout == ours
    assert "…" not in ours


def test_version(call) -> None:
    import longctx

    assert call("--version").stdout == f"longctx {longctx.__version__}\n"


def test_a_command_is_found_by_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from longctx import cli
    from longctx.cli import main

    (tmp_path / "greet.py").write_text("COMMAND = 'hello'\ndef greet() -> None:\n    'Say hello.'\n    print('hi')\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    commands = main.build().registered_commands
    assert "hello" in [command.name for command in commands]


# -- in processes of their own ---------------------------------------------------------------------------------------


def run(*words: str, code: str | None = None, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "longctx", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_help_breaks_its_lines_where_the_terminal_ends_and_nowhere_else(call) -> None:
    lines = [line.rstrip() for line in plain(call("limits", "--help").stdout).splitlines()]
    text = lines[: next(i for i, line in enumerate(lines) if "Options" in line)]
    prose = next(i for i, line in enumerate(text) if line.startswith(" Lengths are"))
    paragraph = text[prose : text.index("", prose)]
    following = [line.split()[0] for line in paragraph[1:]]
    assert all(len(line) + 1 + len(word) > 78 for line, word in zip(paragraph, following, strict=False))
    # Examples stay as they are written, and nothing is doubled around them.
    assert " longctx limits" in text
    assert not any(first == second == "" for first, second in itertools.pairwise(text))


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["--version"]])
def test_the_light_side_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom longctx.cli.main import main\n"
        f"sys.argv = ['longctx', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'lightning', 'plotext', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr


def test_completion_offers_blocks_after_the_first_too_and_loads_no_torch() -> None:
    environment = dict(
        os.environ, _LONGCTX_COMPLETE="complete_bash", COMP_WORDS="longctx sweep --blocks Dense bl", COMP_CWORD="4"
    )
    code = (
        "import sys, atexit\nfrom longctx.cli.main import main\n"
        "atexit.register(lambda: print('HEAVY' if 'torch' in sys.modules else 'LIGHT'))\nmain()\n"
    )
    done = run(code=code, env=environment)
    assert "LIGHT" in done.stdout
    assert "blADE" in done.stdout


def test_what_typer_raises_is_known_under_its_older_name_too() -> None:
    assert typer.BadParameter.__mro__[-4] is TYPER_ERROR


def test_a_closed_pipe_leaves_no_traceback() -> None:
    environment = dict(os.environ, PYTHON=sys.executable)
    line = '"$PYTHON" -m longctx sweep --help | head -n 1 >/dev/null; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=environment)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_that_goes_away_from_a_table_is_no_failure(tmp_path) -> None:
    rows = [row(f"block{i}", 1024 * n, float(i)) for i in range(1, 60) for n in (1, 2, 4, 8)]
    write(tmp_path / "run.json", [each.to_json() for each in rows])
    environment = dict(os.environ, PYTHON=sys.executable)
    line = f'"$PYTHON" -m longctx report {tmp_path}/run.json | head -n 1 >/dev/null; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=environment)
    # Or all was written before the reader went.
    assert done.stdout.strip() in ("141", "0")
    assert done.stderr == ""


def test_sigterm_ends_in_143_with_the_terminal_put_back() -> None:
    code = (
        "import os, signal, sys, types\n"
        "module = types.ModuleType('longctx.engine.runner')\n"
        "def run_sweep(*args, **options):\n    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()\n"
        "module.run_sweep = run_sweep\nsys.modules['longctx.engine.runner'] = module\n"
        "from longctx.cli.main import main\nsys.argv = ['longctx', 'quick']\nmain()\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    environment.pop("CI", None)
    reader, writer = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 4096):
            shown += chunk
    except OSError:
        pass
    finally:
        os.close(reader)
    assert child.wait(timeout=30) == 143
    assert b"\x1b[?25l" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"interrupted" in shown


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_no_bug_of_ours(tmp_path):
    write(tmp_path / "run.json", [row("Dense", 1024, 1.0).to_json()])
    line = f'"$PYTHON" -m longctx report {tmp_path}/run.json --json > /dev/full'
    environment = dict(os.environ, PYTHON=sys.executable)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and "cannot write: No space left on device" in done.stderr


@pytest.mark.parametrize("words", [["sweep", "--blocks", ""], ["quick", "--blocks", ","], ["limits", "--blocks", ""]])
def test_an_empty_name_is_not_all_blocks(longctx, words):
    code, _, err = longctx(*words)
    assert code == 2 and "--blocks names no block" in err
    code, _, err = longctx("sweep", "--output-file", "")
    assert code == 2 and "has no name" in err
