"""The options that commands share: one spelling, one meaning, one help text each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from longctx.config import DTYPES, MODES
from longctx.errors import UsageError, did_you_mean

MODEL, RUNS, AGAINST, OUTPUT = "What to measure", "How to measure", "Against another", "Output"
"""Headings under which options stand in the help."""


def _blocks(incomplete: str) -> list[str]:
    from longctx.blocks import names

    typed = incomplete.casefold()
    return [name for name in names() if name.casefold().startswith(typed)]


def complete_blocks(incomplete: str) -> list[str]:
    """Names for the shell, in the case in which their beginning was typed: a shell drops what does not match."""
    return [incomplete + name[len(incomplete) :] for name in _blocks(incomplete)]


Blocks = Annotated[
    list[str] | None,
    typer.Option(
        "--blocks",
        metavar="NAME...",
        help="Blocks, as several words: BLADE DPASSM. NAME:option=value sets options, NAME:option=1,2 makes a row "
        "of each value; path/to/file.py:Name is a module of your own. All six if not given.",
        autocompletion=complete_blocks,
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
SequenceLengths = Annotated[
    list[str] | None,
    typer.Option(
        "--sequence-lengths",
        metavar="N...",
        help="Lengths in tokens, as several words: 1K 4K 64K 1M, or plain numbers.",
        show_default="1024 2048 4096 8192",
        rich_help_panel=MODEL,
    ),
]
SequenceLength = Annotated[
    str, typer.Option("--seq-len", metavar="N", help="Length in tokens: 2048, 64K, 1M.", rich_help_panel=MODEL)
]
BatchSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--batch-size",
        metavar="N...",
        help="Sequences a call, as several words: 1 4 16.",
        show_default="1",
        rich_help_panel=MODEL,
    ),
]
DModels = Annotated[
    list[str] | None,
    typer.Option("--d-model", metavar="N...", help="Model width.", show_default="512", rich_help_panel=MODEL),
]
NHeads = Annotated[
    list[str] | None,
    typer.Option("--n-heads", metavar="N...", help="Attention heads.", show_default="8", rich_help_panel=MODEL),
]
NumKvHeads = Annotated[
    list[str] | None,
    typer.Option(
        "--num-kv-heads",
        metavar="N...",
        help="Key-value heads, for grouped-query attention; must divide the heads.",
        show_default="as many as heads",
        rich_help_panel=MODEL,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="N...",
        help="Blocks in a row, each with weights of its own.",
        show_default="1",
        rich_help_panel=MODEL,
    ),
]
DType = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "fp64"],
    typer.Option("--dtype", help="Number format; auto is bf16 on a GPU, fp32 on a CPU.", rich_help_panel=MODEL),
]


def _complete(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


DTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        metavar="NAME...",
        help=f"Number formats, of auto, {', '.join(DTYPES)}; auto is bf16 on a GPU, fp32 on a CPU.",
        autocompletion=_complete(("auto", *DTYPES)),
        show_default="auto",
        rich_help_panel=MODEL,
    ),
]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        metavar="NAME...",
        help="What is timed of a block. forward; train: forward, loss and backward; decode: one token after so many; "
        "prefill: forward with the state kept.",
        autocompletion=_complete(MODES),
        show_default="forward",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Threads for work on a CPU.",
        show_default="one a physical core",
        rich_help_panel=RUNS,
    ),
]
WarmupRuns = Annotated[
    int, typer.Option("--warmup-runs", metavar="N", help="Calls before timing, at least.", rich_help_panel=RUNS)
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="For inputs, weights and the order of cells.", rich_help_panel=RUNS)
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="For one cell; then it is given up.", rich_help_panel=RUNS)
]
Isolation = Annotated[
    Literal["worker", "none"],
    typer.Option(
        "--isolation",
        help="worker: in processes of their own, so that a crash or a hang costs one row. none: in this process.",
        rich_help_panel=RUNS,
    ),
]
NoMemoryProfile = Annotated[
    bool,
    typer.Option("--no-memory-profile", help="Leave the memory readings out.", rich_help_panel=RUNS),
]
MaxTime = Annotated[
    float | None,
    typer.Option(
        "--max-time",
        metavar="SECONDS",
        help="For the whole run; what is measured by then is kept.",
        show_default="no limit",
        rich_help_panel=RUNS,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Measure only what the output file does not hold yet.", rich_help_panel=OUTPUT),
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="With --resume: try rows that crashed or timed out again.", rich_help_panel=OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Write over an output file that exists.", rich_help_panel=OUTPUT)]
ResultsDir = Annotated[
    str,
    typer.Option("--results-dir", metavar="DIR", help="Folder that results are saved under.", rich_help_panel=OUTPUT),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Options from a TOML file, by their names; what is on the command line wins.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output-file",
        metavar="FILE",
        help="Results file; under --results-dir unless it is a path with a folder.",
        show_default="named by date and time",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only the final result.", rich_help_panel=OUTPUT)]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Exit with 3 when any cell is not ok.", rich_help_panel=OUTPUT),
]


def axes(**given: list[str] | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options that take several values, by field of a configuration: (the first value of each that is given, all values
    of those that have several). Raises UsageError."""
    choices = {"mode": MODES, "dtype": ("auto", *DTYPES)}
    read: dict[str, list[Any]] = {}
    for name, values in given.items():
        found = words(values)
        if values is not None and not found:
            raise UsageError(f"{_flag(name)} needs at least one value")
        if name in choices:
            found = [choice(name, word, choices[name]) for word in found]
        else:
            found = [_whole(name, word) for word in found]
        if found:
            read[name] = list(dict.fromkeys(found))
    return {name: found[0] for name, found in read.items()}, {name: v for name, v in read.items() if len(v) > 1}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def choice(name: str, word: str, allowed: tuple[str, ...]) -> str:
    """The one of `allowed` that `word` names in any case. Raises UsageError that says which option it was."""
    if word.casefold() not in allowed:
        hint = f"there are {', '.join(allowed)}"
        raise UsageError(f"{_flag(name)} cannot be {word!r}.{did_you_mean(word, allowed)}", hint)
    return word.casefold()


def _whole(name: str, word: str) -> int:
    # Python would read `1_000` and other scripts' digits, which nobody means.
    if not (word.isascii() and word.isdigit()):
        raise UsageError(f"{_flag(name)} takes whole numbers, not {word!r}", f"write {_flag(name)} 1 4 16")
    return int(word)


def block_names(blocks: list[str] | None) -> list[str]:
    """What --blocks names, as blocks are written; none where it is left out. Raises UsageError if it names none."""
    from longctx.config import parse_blocks

    names = [str(request) for request in parse_blocks(blocks or [])]
    if blocks is not None and not names:
        raise UsageError("--blocks names no block", "leave it out for all of ours")
    return names


def words(values: list[str] | None) -> list[str]:
    """The words of a list in which commas separate too, in order, without duplicates and empty ones."""
    parts = [part.strip() for value in values or [] for part in value.split(",")]
    return list(dict.fromkeys(filter(None, parts)))
