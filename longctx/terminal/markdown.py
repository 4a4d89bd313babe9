"""A run as Markdown: tables to paste into a pull request or the appendix of a paper.

Names and messages come from files that anyone may have written: what Markdown would act upon is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from longctx.analysis.conclusions import Conclusions, conclude
from longctx.analysis.crossover import Crossover
from longctx.analysis.ranking import BASE, kept_samples
from longctx.analysis.settings import by_mode, class_of, in_words, varying
from longctx.analysis.statistics import positive, spread_between
from longctx.analysis.summary import problems
from longctx.results import BenchmarkResult
from longctx.terminal.export import ratio_fields
from longctx.terminal.findings import (
    BEST_HEAD,
    CROSSING_HEAD,
    GROWTH_HEAD,
    advice_lines,
    best_heads,
    crossing_line,
    exponent,
    floor,
    interval,
    kind,
    memory_name,
    span,
    time_word,
)
from longctx.terminal.format import number, percent, plain, ratio
from longctx.terminal.limits import CARDS_HEAD, limits_parts
from longctx.terminal.roofline import ROOFLINE_HEAD, has_roof, roofline_columns
from longctx.terminal.tables import MODE_HEADS, Column, lightning_of

OPTIONAL = {
    "forward_part_s": ("forward (ms)", 1e3),
    "backward_part_s": ("backward (ms)", 1e3),
    "state_bytes": ("state (MiB)", 2.0**-20),
}
"""Columns of modes that have them: field -> heading, and the factor to its unit."""


def to_markdown(
    results: Sequence[BenchmarkResult],
    *,
    environment: str = "",
    crossovers: Mapping[str, Sequence[Crossover]] | None = None,
) -> str:
    """Tables in GitHub's Markdown, for each mode: every row with its ratio to Dense, growth, crossovers, best blocks;
    then the roofline, rows that are not ok, and the summary. crossovers: as `document` takes them."""
    modes, parts, said = by_mode(results), [], []
    for mode, rows in modes.items():
        found = conclude(rows)
        if len(modes) > 1 or mode != "forward":
            parts.append(f"**{markdown_text(MODE_HEADS.get(mode, mode))}**")
        parts.append(_rows_table(rows))
        parts += _findings(found, found.crossovers if crossovers is None else crossovers.get(mode, ()))
        if found.sentences:
            said.append(" ".join([*([f"{mode.capitalize()}:"] if len(modes) > 1 else []), *found.sentences]))
    if has_roof(results):
        parts += [markdown_text(ROOFLINE_HEAD), columns_table(roofline_columns(results))]
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


def limits_markdown(results: Sequence[BenchmarkResult], *, environment: str = "") -> str:
    """The answer of `longctx limits` in Markdown: what its screen shows."""
    parts = []
    for part in limits_parts(results):
        parts += [f"**{markdown_text(part.head)}**", columns_table(part.table)]
        if part.cards:
            parts += [markdown_text(CARDS_HEAD), columns_table(part.cards)]
        if part.ends:
            parts.append("\n".join(f"- {markdown_text(line)}" for line in part.ends))
        parts += map(markdown_text, part.sentences)
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
                _ratio_in_words(ratio_fields(result, results)),
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
    if any(map(class_of, results)):
        first += 1
        head.insert(1, "class")
        for cells, result in zip(rows, sorted(results, key=lambda r: r.sequence_length), strict=True):
            cells.insert(1, markdown_text(class_of(result) or ""))
    return markdown_table(head, rows, right=range(first, len(head) - 1))


def _findings(found: Conclusions, crossovers: Sequence[Crossover]) -> list[str]:
    """Growth, crossovers and best blocks as parts of a Markdown document, each under its title."""
    parts = []
    if found.growths:
        head = ["block", "time k", "95%", "time is", "floor", f"{memory_name(found.growths)} k", "fit", "lengths"]
        rows = []
        for g in found.growths:
            law = g.time or g.memory
            cells = [exponent(g.time), interval(g.time), time_word(g), floor(g.time), exponent(g.memory)]
            rows.append([markdown_text(g.curve.name), *map(markdown_text, [*cells, kind(law), span(law)])])
        parts += [markdown_text(GROWTH_HEAD), markdown_table(head, rows, right=(1, 2, 4, 5))]
        parts += [markdown_text(line) for line in advice_lines(found.growths)]
    if crossovers:
        parts += [CROSSING_HEAD, "\n".join(f"- {markdown_text(crossing_line(c))}" for c in crossovers)]
    if found.best:
        fields = {**best_heads(found.growths), "Pareto set": "pareto"}
        fields = {head: name for head, name in fields.items() if any(getattr(b, name) for b in found.best)}
        rows = [
            [f"{b.length:,}" + (f" ({markdown_text(b.setting)})" if b.setting else "")]
            + [markdown_text(", ".join(getattr(b, name))) for name in fields.values()]
            for b in found.best
        ]
        parts += [BEST_HEAD, markdown_table(["tokens", *fields], rows, right=(0,))]
    return parts


def _spread(share: float | None) -> str:
    return "" if share is None else percent(share)


def _ratio_in_words(fields: Mapping[str, float | None]) -> str:
    """`0.53`, over several rounds `0.53 (0.51 to 0.56)`."""
    value, low, high = fields.values()
    if value is None:
        return ""
    value, low, high = (None if quotient is None else ratio(quotient)[:-1] for quotient in (value, low, high))
    return value if low is None or high is None else f"{value} ({low} to {high})"


def _figure(value: float | None, factor: float = 1.0) -> str:
    found = positive(value)
    return "" if found is None else number(found * factor)


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


def columns_table(columns: Sequence[Column]) -> str:
    """A table of the terminal as Markdown, with all of its columns."""
    rows = zip(*([markdown_text(cell) for cell in column.cells] for column in columns), strict=True)
    return markdown_table([c.header for c in columns], rows, right=[i for i, c in enumerate(columns) if c.right])
