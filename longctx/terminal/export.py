"""Results as documents for other programs: CSV for tables and pandas, Markdown for a pull request, JSON.

Names and messages come from files that anyone may have written: each format escapes what it would act upon.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longctx.analysis.conclusions import Conclusions, conclude, conclude_modes
from longctx.analysis.crossover import Crossover
from longctx.analysis.ranking import BASE, kept_samples, ratio_to
from longctx.analysis.settings import by_mode, in_words, varying
from longctx.analysis.statistics import positive, spread_between, spread_within
from longctx.analysis.summary import problems, slopes
from longctx.results import BenchmarkResult, jsonable
from longctx.terminal.findings import (
    advice_lines,
    crossing_line,
    exponent,
    findings_document,
    floor,
    interval,
    kind,
    memory_name,
    span,
    time_word,
)
from longctx.terminal.format import percent, plain
from longctx.terminal.tables import MODE_HEADS, lightning_of

COLUMNS = (
    "block_name",
    "sequence_length",
    "batch_size",
    "mode",
    "dtype",
    "training_step",
    "status",
    "forward_time_median",
    "forward_time_mean",
    "forward_time_std",
    "forward_time_min",
    "forward_time_max",
    "throughput_tokens_per_sec",
    "peak_memory_mb",
    "allocated_memory_mb",
    "reserved_memory_mb",
    "memory_efficiency_mb_per_token",
    "peak_bytes_per_token",
    "total_memory_mb",
    "flops",
    "bytes",
    "tflops",
    "roofline_fraction",
    "forward_part_s",
    "backward_part_s",
    "state_bytes",
    "path",
)
SHAPE = ("d_model", "n_heads", "num_kv_heads", "layers")
"""Columns from the configuration of a row: a sweep may hold several of each."""

OPTIONAL = {
    "forward_part_s": ("forward (ms)", 1e3),
    "backward_part_s": ("backward (ms)", 1e3),
    "state_bytes": ("state (MiB)", 2.0**-20),
}
"""Columns of modes that have them: field -> heading, and the factor to its unit."""
OF_LIGHTNING = ("bare_step_s", "overhead_share")
"""Figures of mode lightning."""


def document(
    results: Sequence[BenchmarkResult], *, crossovers: Mapping[str, Sequence[Crossover]] | None = None
) -> dict[str, Any]:
    """The results with what was derived from them: ratios to Dense, laws, crossovers, best blocks. Plain data for JSON.

    crossovers: those asked for, by mode, in place of those against Dense.
    """
    return jsonable(
        {
            "results": [result.to_json() for result in results],
            "ratios_to_dense": [
                {
                    "block_name": result.block_name,
                    "sequence_length": result.sequence_length,
                    "key": result.key,
                    **_ratio_fields(result, results),
                }
                for result in results
            ],
            "local_slopes": [
                {
                    "mode": mode,
                    "name": row.name,
                    "time": row.time and row.time.slope,
                    "memory": row.memory and row.memory.slope,
                }
                for mode, rows in by_mode(results).items()
                for row in slopes(rows)
            ],
            **findings_document(conclude_modes(results), crossovers),
        }
    )


def to_csv(runs: Mapping[str, Sequence[BenchmarkResult]]) -> str:
    """One line a row of all runs (label -> rows), the label first if there are several.

    Numbers stand in full and in the units of the results file; what does not exist is empty.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    several = len(runs) > 1
    head = [*COLUMNS, *SHAPE, *OF_LIGHTNING, "spread_within", "spread_between"]
    head += ["ratio_to_dense", "ratio_low", "ratio_high", "gate_error", "warnings", "error"]
    writer.writerow(["run", *head] if several else head)
    for label, results in runs.items():
        for result in results:
            gate = result.gate if isinstance(result.gate, dict) else {}
            error = result.error if isinstance(result.error, dict) else {}
            cells = [label] if several else []
            cells += [getattr(result, name) for name in COLUMNS]
            config = result.config if isinstance(result.config, dict) else {}
            samples = kept_samples(result)
            cells += [config.get(name) for name in SHAPE]
            cells += [lightning_of(result, name) for name in OF_LIGHTNING]
            cells += [spread_within(samples), spread_between(samples)]
            cells += [*_ratio_fields(result, results).values(), gate.get("error")]
            cells += [" ".join(map(str, result.warnings)), error.get("message")]
            writer.writerow([_csv_cell(cell) for cell in cells])
    return out.getvalue()


def to_markdown(
    results: Sequence[BenchmarkResult],
    *,
    environment: str = "",
    crossovers: Mapping[str, Sequence[Crossover]] | None = None,
) -> str:
    """Tables in GitHub's Markdown, for each mode: every row with its ratio to Dense, growth, crossovers, best blocks;
    then rows that are not ok, and the summary. crossovers: as `document` takes them."""
    modes, parts, said = by_mode(results), [], []
    for mode, rows in modes.items():
        found = conclude(rows)
        if len(modes) > 1 or mode != "forward":
            parts.append(f"**{markdown_text(MODE_HEADS.get(mode, mode))}**")
        parts.append(_rows_table(rows))
        parts += _findings(found, found.crossovers if crossovers is None else crossovers.get(mode, ()))
        if found.sentences:
            said.append(" ".join([*([f"{mode.capitalize()}:"] if len(modes) > 1 else []), *found.sentences]))
    axes, failed = varying(results), problems(results)
    if failed:
        lines = [
            f"- {markdown_text(r.block_name)} at {r.sequence_length:,}"
            + (f" ({markdown_text(in_words(r, axes))})" if axes else "")
            + f": {markdown_text(r.status)}"
            + (f", {markdown_text(why)}" if why else "")
            for r, why in failed
        ]
        parts.append("\n".join(lines))
    parts += map(markdown_text, said)
    if environment:
        parts.append(markdown_text(environment))
    return "\n\n".join(parts) + "\n"


def _rows_table(results: Sequence[BenchmarkResult]) -> str:
    """The rows of one mode by length; what differs between them besides has a column each."""
    axes = varying(results)
    shown = [name for name in OPTIONAL if any(getattr(row, name) is not None for row in results if row.ok)]
    if results[0].mode not in ("decode", "prefill"):
        shown = [name for name in shown if name != "state_bytes"]
    head = [
        "block",
        *(axis.header for axis in axes),
        "tokens",
        "time (ms)",
        "rounds +-",
        f"time / {BASE}",
        "tokens/s",
        "peak (MiB)",
    ]
    head += [*(OPTIONAL[name][0] for name in shown), "status"]
    rows = []
    for result in sorted(results, key=lambda r: r.sequence_length):
        status = result.status if result.ok else f"**{markdown_text(result.status)}**"
        if result.warnings:
            status += f" ({markdown_text(', '.join(map(str, result.warnings)))})"
        ok = result.ok
        rows.append(
            [
                markdown_text(result.block_name),
                *("" if (value := axis.of(result)) is None else markdown_text(value) for axis in axes),
                f"{result.sequence_length:,}",
                _figure(result.time_s if ok else None, 1e3),
                _spread(spread_between(kept_samples(result)) if ok else None),
                _ratio_in_words(_ratio_fields(result, results)),
                _figure(result.throughput_tokens_per_sec if ok else None),
                _figure(result.peak_memory_mb if ok else None),
                *(_figure(getattr(result, name) if ok else None, OPTIONAL[name][1]) for name in shown),
                status,
            ]
        )
    if any(isinstance(result.lightning, dict) for result in results):
        head[-1:-1] = ["bare (ms)", "overhead"]
        for cells, result in zip(rows, sorted(results, key=lambda r: r.sequence_length), strict=True):
            share = lightning_of(result, "overhead_share")
            bare = _figure(lightning_of(result, "bare_step_s"), 1e3)
            cells[-1:-1] = [bare, "" if share is None else f"{share:.1%}"]
    first = 1 + len(axes)
    return markdown_table(head, rows, right=range(first, len(head) - 1))


def _findings(found: Conclusions, crossovers: Sequence[Crossover]) -> list[str]:
    """Growth, crossovers and best blocks as parts of a Markdown document."""
    parts = []
    if found.growths:
        head = ["block", "time k", "95%", "time is", "floor", f"{memory_name(found.growths)} k", "fit", "lengths"]
        rows = []
        for g in found.growths:
            law = g.time or g.memory
            cells = [exponent(g.time), interval(g.time), time_word(g), floor(g.time), exponent(g.memory)]
            rows.append([markdown_text(g.curve.name), *map(markdown_text, [*cells, kind(law), span(law)])])
        parts.append(markdown_table(head, rows, right=(1, 2, 4, 5)))
        parts += [markdown_text(line) for line in advice_lines(found.growths)]
    if crossovers:
        parts.append("\n".join(f"- {markdown_text(crossing_line(c))}" for c in crossovers))
    if found.best:
        head = ["tokens", "least time", "least memory", "least energy", "Pareto set"]
        rows = [
            [f"{b.length:,}" + (f" ({markdown_text(b.setting)})" if b.setting else "")]
            + [markdown_text(", ".join(listed)) for listed in (b.time, b.memory, b.energy, b.pareto)]
            for b in found.best
        ]
        parts.append(markdown_table(head, rows, right=(0,)))
    return parts


def _spread(share: float | None) -> str:
    return "" if share is None else percent(share)


def _ratio_fields(result: BenchmarkResult, results: Iterable[BenchmarkResult]) -> dict[str, float | None]:
    """Time over Dense's, and the extremes of that over rounds where there were several."""
    found = ratio_to(result, results)
    several = found is not None and found.rounds > 1
    return {
        "ratio": found.value if found else None,
        "ratio_low": found.low if several else None,
        "ratio_high": found.high if several else None,
    }


def _ratio_in_words(fields: Mapping[str, float | None]) -> str:
    """`0.53`, over several rounds `0.53 (0.51 to 0.56)`."""
    value, low, high = fields.values()
    if value is None:
        return ""
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = plain(value)
    # A spreadsheet runs a text cell that begins so as a formula.
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _figure(value: float | None, factor: float = 1.0) -> str:
    number = positive(value)
    if number is None:
        return ""
    number *= factor
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def markdown_text(value: object) -> str:
    """`value` as plain text in Markdown: nothing in it formats, links, mentions or ends a table cell."""
    text = plain(value)
    text = re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", text)
    # Entities for what HTML, mentions and issue references would act upon.
    return re.sub(r"[<>&@#]", lambda match: f"&#{ord(match[0])};", text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int]) -> str:
    right = set(right)
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
