"""`longctx quick`: one length, all blocks, seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from longctx.cli import options

ORDER = 10


def quick(
    blocks: options.Blocks = None,
    seq_len: options.SequenceLength = "2048",
    batch_size: options.BatchSizes = None,
    d_model: options.DModels = None,
    n_heads: options.NHeads = None,
    num_kv_heads: options.NumKvHeads = None,
    layers: options.Layers = None,
    device: options.Device = "auto",
    dtype: options.DTypes = None,
    mode: options.Modes = None,
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", help="Timed calls of each block.", rich_help_panel=options.RUNS)
    ] = 5,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    timeout: options.Timeout = 600.0,
    isolation: options.Isolation = "worker",
    no_memory_profile: options.NoMemoryProfile = False,
    output_file: Annotated[
        str | None,
        typer.Option(
            "--output-file",
            metavar="FILE",
            help="Save the results too; under --results-dir unless it is a path with a folder.",
            show_default="not saved",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    results_dir: options.ResultsDir = "./reports/benchmark",
    json: options.Json = False,
    quiet: options.Quiet = False,
    strict: options.Strict = False,
) -> None:
    """Measure all blocks at one length: a ranking in seconds.

    \b
    longctx quick
    longctx quick --blocks BLADE DPASSM --seq-len 8K
    longctx quick --blocks Dense my_block.py:MyBlock --mode forward train

    One round of a few calls, not saved unless --output-file is given. `longctx sweep` measures with more care.
    """
    from longctx.cli._measure import exit_code, measure, print_json
    from longctx.config import BenchmarkConfig
    from longctx.reproduce import command_line

    given, vary = options.axes(
        batch_size=batch_size,
        d_model=d_model,
        n_heads=n_heads,
        num_kv_heads=num_kv_heads,
        layers=layers,
        dtype=dtype,
        mode=mode,
    )
    names = options.block_names(blocks)
    common = {"rounds": 1, "fixed_runs": True, "save_results": False, "benchmark_runs": 5, "energy": False}
    defaults = BenchmarkConfig(sequence_lengths=[2048], **common)
    config = BenchmarkConfig(
        **(common | {"benchmark_runs": runs, "save_results": output_file is not None}),
        sequence_lengths=[seq_len],
        **given,
        device=device,
        threads=threads,
        seed=seed,
        timeout=timeout,
        isolation=isolation,
        profile_memory=not no_memory_profile,
        results_dir=results_dir,
        output_file=output_file,
        verbose=not quiet,
        blocks=names,
    )
    command = command_line("quick", config, names, defaults=defaults, vary=vary)
    results, view = measure(names, config, vary=vary, command=command, quiet=quiet)
    if json:
        print_json([result.to_json() for result in results])
    else:
        usual = BenchmarkConfig()
        alike = {name: getattr(usual, name) for name in ("sequence_lengths", *common, "output_file")}
        sweep = command_line("sweep", replace(config, **alike), names, defaults=usual, vary=vary)
        _show(results, view.environment, view.path, following=None if quiet else sweep)
    raise typer.Exit(exit_code(results, strict=strict, complete=view.complete))


def _show(results: list, environment: dict, path: str | None, *, following: str | None) -> None:
    from rich.text import Text

    from longctx.analysis.conclusions import conclude_modes
    from longctx.terminal import format as fmt
    from longctx.terminal.console import ascii_only, result_console
    from longctx.terminal.findings import summary
    from longctx.terminal.prose import say
    from longctx.terminal.tables import environment_line, mode_tables, notes, one_dtype

    console = result_console()
    plain = ascii_only(console)
    length = results[0].sequence_length if results else 0
    say(console, environment_line(environment, one_dtype(results)))
    say(console, Text(f"{length:,} tokens, fastest first; `vs` is time over that block's time", style="dim"))
    console.print()
    console.print(mode_tables(results, console.width, ascii_only=plain, ranked=True))
    if len(said := notes(results, ascii_only=plain)):
        console.print()
        say(console, said)
    if len(said := summary(conclude_modes(results), console.width, ascii_only=plain)):
        console.print()
        console.print(said)
    if path:
        console.print(Text(f"results: {fmt.plain(path)}"), soft_wrap=True)
    if following and any(result.ok for result in results):
        line = f"next: {fmt.plain(following)}   (how it scales with length)"
        if len(line) > console.width:
            say(console, "next, how it scales with length:")
            line = f"  {fmt.plain(following)}"
        console.print(Text(line), soft_wrap=True)
