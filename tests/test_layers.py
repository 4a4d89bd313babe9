"""The picture of design section 2: who may import whom, and that the light side loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longctx

PACKAGE = Path(longctx.__file__).parent
ROOMS = ("cli", "terminal", "analysis", "engine", "blocks", "ops")
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "results": set(),
    "reproduce": {"config"},
    "events": {"config", "results"},
    "analysis": {"results", "config"},
    "terminal": {"analysis", "results", "config", "events"},
    "engine": {"blocks", "ops", "results", "config", "events", "reproduce", "analysis"},
    "blocks": {"ops", "config"},
    "ops": set(),
    # Names of blocks are read off their files; `longctx.blocks` itself imports no torch.
    "cli": {"terminal", "analysis", "engine", "results", "config", "events", "reproduce", "blocks", "_version"},
    "training": {"engine", "blocks", "results", "config"},
    "__main__": {"cli"},
    "_version": set(),
    "__init__": {"_version", "config", "results", "engine", "blocks"},
}
LIGHT_ENGINE = {
    "run_against",
    "dry_run",
    "run_limits",
    "runner",
    "preparation",
    "turns",
    "process",
    "locks",
    "rows",
    "machine",
    "run_selftest",
    "peaks",
    "judge",
}
UPWARDS = {("engine", "session"): ("training", "cell")}
"""A cell that Lightning's Trainer runs: its worker loads training, which is built on the engine, inside a function."""
HEAVY = ("torch", "lightning", "pytorch_lightning", "plotext", "triton")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    place = path.relative_to(PACKAGE)
    return place.parts[0] if len(place.parts) > 1 else place.stem


def imports_of(path: Path) -> list[tuple[str, ...]]:
    """What a file imports of this package, wherever in the file, as paths below it: ("engine", "runner")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module]
            if node.module == "longctx" or (node.module or "").removeprefix("longctx.") in ROOMS:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [tuple(name.split(".")[1:]) for name in names if name == "longctx" or name.startswith("longctx.")]
    return [parts for parts in found if parts]


def modules_at_the_top(path: Path) -> set[str]:
    """The rooms that a file imports as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[1] for name in names if name.startswith("longctx.")}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_picture(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is new: say in MAY_IMPORT what it may import"
    for parts in imports_of(path):
        if parts[0] in (room, "errors", *longctx.__all__):
            continue
        if parts == UPWARDS.get((room, path.stem)):
            assert "training" not in modules_at_the_top(path), f"{path.name} loads training with itself"
            continue
        assert parts[0] in MAY_IMPORT[room], f"{room} imports {'.'.join(parts)}"
        if room == "cli" and parts[0] == "engine" and len(parts) > 1:
            # The self-test and sysinfo ask processes of their own.
            assert parts[1] in LIGHT_ENGINE, f"{path.name} imports engine.{parts[1]}"


@pytest.mark.parametrize("name", sorted(LIGHT_ENGINE))
def test_the_light_engine_imports_only_its_light_files_at_module_level(name):
    tree = ast.parse((PACKAGE / "engine" / f"{name}.py").read_text(encoding="utf-8"))
    modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    engine = {module.rpartition(".")[2] for module in modules if module.startswith("longctx.engine.")}
    assert engine <= LIGHT_ENGINE


@pytest.mark.parametrize(
    "code",
    [
        "import longctx; longctx.BenchmarkConfig()",
        "import longctx.cli.main; longctx.cli.main.build()",
        "import longctx.engine.runner, longctx.engine.run_selftest",
        "import longctx.terminal.live, longctx.terminal.tables, longctx.terminal.export, longctx.terminal.plots",
        "from longctx import blocks; assert blocks.names()[:2] == ['Dense', 'Identity'], blocks.names()",
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(code):
    check = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sweep", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
from longctx.cli.main import main
sys.argv = ["longctx", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_plot_loads_no_torch(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('[{"block_name": "A", "sequence_length": 64, "forward_time_mean": 0.5}]')
    code = f"""
import sys
from longctx.cli.main import main
sys.argv = ["longctx", "plot", {str(path)!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch", "lightning") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
