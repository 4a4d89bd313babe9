"""`longctx limits`: the longest context that fits on this device, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from longctx.cli import options

if TYPE_CHECKING:
    from longctx.events import Event
    from longctx.results import BenchmarkResult

ORDER = 25


def limits(
    blocks: options.Blocks = None,
    mode: options.Modes = None,
    batch_size: options.BatchSizes = None,
    d_model: options.DModels = None,
    n_heads: options.NHeads = None,
    num_kv_heads: options.NumKvHeads = None,
    layers: options.Layers = None,
    device: options.Device = "auto",
    dtype: options.DTypes = None,
    resolution: Annotated[
        float,
        typer.Option(
            "--resolution",
            metavar="SHARE",
            help="How close to the limit to look: 0.05 ends within 5% of it.",
            rich_help_panel=options.RUNS,
        ),
    ] = 0.05,
    max_length: Annotated[
        str | None,
        typer.Option(
            "--max-length",
            metavar="N",
            help="Ask for no longer context: 128K, 1M.",
            show_default="no limit",
            rich_help_panel=options.RUNS,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="For one length; one that takes longer is too long.",
            rich_help_panel=options.RUNS,
        ),
    ] = 120.0,
    max_time: options.MaxTime = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    output_file: options.OutputFile = None,
    results_dir: options.ResultsDir = "./reports/benchmark",
    resume: options.Resume = False,
    retry: options.Retry = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the longest context that fits on this device, by trying: memory, time or --max-length ends it.

    \b
    longctx limits
    longctx limits --blocks Dense BLADE --mode forward train --batch-size 1 4
    longctx limits --blocks my_block.py:MyBlock --timeout 20 --max-length 1M

    Lengths are doubled until one does not fit, and the gap is closed to --resolution. Every length runs in a process
    that may die of it. On a CPU none is tried that is predicted to need more than 90% of the free memory. Exit codes:
    0 ok, 3 no block fits at any length, 130 interrupted, with all that was tried saved.
    """
    from longctx.cli._measure import print_json, watched
    from longctx.config import BenchmarkConfig, parse_length
    from longctx.engine.run_limits import limits_command, run_limits
    from longctx.terminal.limits import limits_document, limits_view

    names = options.block_names(blocks)
    longest = None if max_length is None else parse_length(max_length)
    given, vary = options.axes(
        batch_size=batch_size,
        d_model=d_model,
        n_heads=n_heads,
        num_kv_heads=num_kv_heads,
        layers=layers,
        dtype=dtype,
        mode=mode,
    )
    config = BenchmarkConfig(
        **given,
        device=device,
        timeout=timeout,
        max_time=max_time,
        threads=threads,
        seed=seed,
        fixed_runs=False,
        output_file=output_file,
        results_dir=results_dir,
        resume=resume,
        retry=retry,
        force=force,
        verbose=not quiet,
        blocks=names,
    )
    asked = {"resolution": resolution, "max_length": longest, "vary": vary}
    command = limits_command(config, names, **asked)

    def run(on_event: Callable[[Event], None]) -> list[BenchmarkResult]:
        return run_limits(names or None, config, **asked, on_event=on_event, command=command)

    results, view = watched(run, config, command=command, quiet=quiet, view_for=limits_view)
    if json:
        print_json(limits_document(results))
    else:
        from longctx.cli._show import tail
        from longctx.terminal.console import ascii_only, result_console
        from longctx.terminal.limits import limits_text
        from longctx.terminal.prose import say
        from longctx.terminal.tables import environment_line, one_dtype

        console = result_console()
        if results:
            say(console, environment_line(view.environment, one_dtype(results)))
            console.print()
            console.print(limits_text(results, console.width, ascii_only=ascii_only(console)))
        tail(console, view, command)
    raise typer.Exit(0 if any(result.ok for result in results) else 3)
