"""The options that commands share: one spelling, one meaning, one help text each."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
        help="Blocks, as several words: BLADE DPASSM. NAME:option=value sets options; path/to/file.py:Name is a "
        "module of your own. All six if not given.",
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
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Sequences a call.", rich_help_panel=MODEL)]
DModel = Annotated[int, typer.Option("--d-model", metavar="N", help="Model width.", rich_help_panel=MODEL)]
NHeads = Annotated[int, typer.Option("--n-heads", metavar="N", help="Attention heads.", rich_help_panel=MODEL)]
NumKvHeads = Annotated[
    int | None,
    typer.Option(
        "--num-kv-heads",
        metavar="N",
        help="Key-value heads, for grouped-query attention; must divide the heads.",
        show_default="as many as heads",
        rich_help_panel=MODEL,
    ),
]
DType = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "fp64"],
    typer.Option("--dtype", help="Number format; auto is bf16 on a GPU, fp32 on a CPU.", rich_help_panel=MODEL),
]
Mode = Annotated[
    Literal["forward", "train", "decode", "prefill"],
    typer.Option("--mode", help="What is timed of a block.", rich_help_panel=MODEL),
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
ResultsDir = Annotated[
    str,
    typer.Option("--results-dir", metavar="DIR", help="Folder that results are saved under.", rich_help_panel=OUTPUT),
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


def words(values: list[str] | None) -> list[str]:
    """The words of a list in which commas separate too, in order, without duplicates and empty ones."""
    parts = [part.strip() for value in values or [] for part in value.split(",")]
    return list(dict.fromkeys(filter(None, parts)))
