"""`longctx sweep`: lengths x blocks, with care, saved, resumable."""

from __future__ import annotations

from typing import Annotated

import typer

from longctx.cli import options

ORDER = 20
ALIASES = ("comprehensive",)


def sweep(
    blocks: options.Blocks = None,
    sequence_lengths: options.SequenceLengths = None,
    batch_size: options.BatchSizes = None,
    d_model: options.DModels = None,
    n_heads: options.NHeads = None,
    num_kv_heads: options.NumKvHeads = None,
    layers: options.Layers = None,
    device: options.Device = "auto",
    dtype: options.DTypes = None,
    mode: options.Modes = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="OTHER",
            help="Measure every block in turns with OTHER, and say which is faster: a block, or the folder of another "
            "checkout, for the same blocks of your own as they are there.",
            autocompletion=options.complete_blocks,
            show_default=False,
            rich_help_panel=options.AGAINST,
        ),
    ] = None,
    guard: Annotated[
        float | None,
        typer.Option(
            "--guard",
            metavar="PERCENT",
            help="With --against: a difference up to this is none.",
            show_default="3 on a CPU, 1 on a GPU",
            rich_help_panel=options.AGAINST,
        ),
    ] = None,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression",
            help="With --against: exit with 4 if a block is slower than OTHER, or fails where OTHER does not.",
            rich_help_panel=options.AGAINST,
        ),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            metavar="N",
            help="Fresh processes that measure every cell once each.",
            show_default="3; with --against 5, and 4 more where they tell nothing",
            rich_help_panel=options.RUNS,
        ),
    ] = None,
    warmup_runs: options.WarmupRuns = 3,
    benchmark_runs: Annotated[
        int | None,
        typer.Option(
            "--benchmark-runs",
            metavar="N",
            help="Timed calls of a cell in each round, exactly.",
            show_default="at least 10, until the median is known to 1%, 3 s at most",
            rich_help_panel=options.RUNS,
        ),
    ] = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    timeout: options.Timeout = 600.0,
    max_time: options.MaxTime = None,
    isolation: options.Isolation = "worker",
    torch_benchmark: Annotated[
        bool,
        typer.Option(
            "--torch-benchmark/--no-torch-benchmark",
            help="Let torch search for its fastest algorithms.",
            rich_help_panel=options.RUNS,
        ),
    ] = True,
    cudnn_benchmark: Annotated[
        bool,
        typer.Option(
            "--cudnn-benchmark/--no-cudnn-benchmark",
            help="Let cuDNN search for its fastest algorithms.",
            rich_help_panel=options.RUNS,
        ),
    ] = True,
    cudnn_deterministic: Annotated[
        bool,
        typer.Option(
            "--cudnn-deterministic", help="Only deterministic algorithms of cuDNN.", rich_help_panel=options.RUNS
        ),
    ] = False,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Time the replay of a captured CUDA graph: forward, train.",
            rich_help_panel=options.RUNS,
        ),
    ] = False,
    no_memory_profile: options.NoMemoryProfile = False,
    no_gate: Annotated[
        bool,
        typer.Option(
            "--no-gate",
            help="Do not check blocks against their references first.",
            rich_help_panel=options.RUNS,
        ),
    ] = False,
    no_energy: Annotated[
        bool,
        typer.Option(
            "--no-energy",
            help="Do not measure energy, which takes two seconds a cell on a GPU.",
            rich_help_panel=options.RUNS,
        ),
    ] = False,
    lightning_mode: Annotated[
        bool,
        typer.Option(
            "--lightning-mode",
            help="Time the training step of a language model of --layers blocks in Lightning's Trainer, beside the "
            "same step in a plain loop.",
            rich_help_panel=options.MODEL,
        ),
    ] = False,
    config: options.Config = None,
    output_file: options.OutputFile = None,
    results_dir: options.ResultsDir = "./reports/benchmark",
    resume: options.Resume = False,
    retry: options.Retry = False,
    force: options.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure nothing: list the cells, the least time and memory of each, and which cannot fit.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    strict: options.Strict = False,
) -> None:
    """Measure blocks over lengths: time, memory, scaling, saved as it goes.

    \b
    longctx sweep
    longctx sweep --blocks BLADE DPASSM --sequence-lengths 1K 4K 16K 64K
    longctx sweep --blocks BLADE:chunk_size=256,1024 my_block.py:MyBlock
    longctx sweep --mode forward train decode --batch-size 1 4 16
    longctx sweep --output-file run.json --resume
    longctx sweep --config bench.toml --rounds 5 --dry-run
    longctx sweep --lightning-mode --layers 4
    longctx sweep --blocks my_block.py:MyBlock --against ../main --fail-on-regression

    Every cell is measured in each of --rounds fresh processes, after a check against its reference. Exit codes: 0 ok,
    3 no cell is ok, 6 a result is wrong or impossible, 130 interrupted, with all that was measured saved; with
    --against also 4 for a regression and, under --strict, 7 for a pair that is inconclusive.
    """
    from longctx.cli._against import check, sweep_against
    from longctx.cli._measure import exit_code, measure, print_json
    from longctx.config import AGAINST_ROUNDS, DEFAULT_RUNS, BenchmarkConfig
    from longctx.errors import UsageError
    from longctx.reproduce import command_line

    check(against=against, guard=guard, fail_on_regression=fail_on_regression)
    names = options.block_names(blocks)
    defaults = BenchmarkConfig(fixed_runs=False)
    usual_rounds = defaults.rounds if against is None else AGAINST_ROUNDS
    given, vary = options.axes(
        batch_size=batch_size,
        d_model=d_model,
        n_heads=n_heads,
        num_kv_heads=num_kv_heads,
        layers=layers,
        dtype=dtype,
        mode=mode,
    )
    lengths = options.words(sequence_lengths) if sequence_lengths is not None else defaults.sequence_lengths
    if dry_run and against is not None:
        raise UsageError("--dry-run and --against do not go together", "name both sides as --blocks to see their cells")
    made = BenchmarkConfig(
        sequence_lengths=lengths,
        **given,
        device=device,
        rounds=usual_rounds if rounds is None else rounds,
        warmup_runs=warmup_runs,
        benchmark_runs=DEFAULT_RUNS if benchmark_runs is None else benchmark_runs,
        fixed_runs=benchmark_runs is not None,
        threads=threads,
        seed=seed,
        timeout=timeout,
        max_time=max_time,
        isolation=isolation,
        torch_benchmark=torch_benchmark,
        cudnn_benchmark=cudnn_benchmark,
        cudnn_deterministic=cudnn_deterministic,
        cuda_graph=cuda_graph,
        lightning_mode=lightning_mode,
        profile_memory=not no_memory_profile,
        gate=not no_gate,
        energy=not no_energy,
        output_file=output_file,
        results_dir=results_dir,
        resume=resume,
        retry=retry,
        force=force,
        verbose=not quiet,
        blocks=names,
    )
    if against is not None:
        judging = {"guard": guard, "strict": strict, "fail_on_regression": fail_on_regression}
        judging["settle"] = rounds is None
        raise typer.Exit(sweep_against(names, against, made, vary=vary, json=json, **judging))
    command = command_line("sweep", made, names, defaults=defaults, vary=vary)
    if dry_run:
        from longctx.cli import _dry_run

        _dry_run.dry_run(names, made, vary, command=command, json=json)
        return
    results, view = measure(names, made, vary=vary, command=command, quiet=quiet)
    if json:
        print_json([result.to_json() for result in results])
    else:
        from longctx.cli._show import show, tail
        from longctx.terminal.console import result_console

        show(result_console(), results, view.environment)
        tail(result_console(), view, command)
    raise typer.Exit(exit_code(results, strict=strict, complete=view.complete))
