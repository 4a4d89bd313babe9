"""A comparison as text: the table of verdicts, what stands around it, and the same for other programs.

Names, versions and messages come from files that anyone may have written, as everywhere in `terminal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longctx.analysis.comparison import MORE, SAME, CellComparison, Comparison
from longctx.analysis.matching import Pool
from longctx.analysis.settings import Axis, in_words, varying, without
from longctx.analysis.settle import settling
from longctx.results import BenchmarkResult, jsonable
from longctx.terminal import format as fmt
from longctx.terminal.layout import Column, layout
from longctx.terminal.markdown import markdown_table, markdown_text
from longctx.terminal.tables import WARNING_ADVICE, status_word

if TYPE_CHECKING:
    from rich.text import Text

MOST_LINES = 40
MOST_VALUE = 60
STYLES = {"slower": "bold red", "faster": "green", "same": "", "inconclusive": "yellow"}
UNEXPLAINED = "code and everything recorded are the same on both sides: more likely the machine than the block"


def comparison_table(comparison: Comparison, width: int, *, ascii_only: bool = False) -> Text:
    """Every cell of either side by length: both times, their ratio with its interval, the verdict, peak memory."""
    cells = comparison.cells
    times = [pool.time_s for cell in cells for pool in (cell.base, cell.new) if pool and pool.ok]
    unit = fmt.column_unit(times)
    verdicts = [verdict_text(cell) for cell in cells]
    memory = [memory_text(cell) for cell in cells]
    columns = [
        Column(header="block", cells=[fmt.plain(c.traits.name) for c in cells], right=False, flexible=True),
        Column(header="tokens", cells=[fmt.tokens(c.traits.length) for c in cells]),
        *_setting_columns(cells),
        Column(header=f"base {unit.name}", cells=[_time(c.base, unit) for c in cells], keep=3),
        Column(header=f"new {unit.name}", cells=[_time(c.new, unit) for c in cells], keep=4),
        Column(header="ratio", cells=[quotient(c.shift and c.shift.ratio) for c in cells]),
        Column(header="interval", cells=[interval_text(c) for c in cells], keep=5),
        Column(header="verdict", cells=verdicts, right=False),
        Column(header="memory", cells=memory, keep=6, right=False),
        Column(header="warnings", cells=[_warnings(c) for c in cells], keep=1, right=False),
    ]
    columns = [column for column in columns if column.keep is None or set(column.cells) - {fmt.NONE, ""}]
    styles = {}
    for index, cell in enumerate(cells):
        lost = "bold red" if cell.no_longer_ok else "yellow"
        styles[index, "verdict"] = STYLES.get(cell.verdict, lost if cell.verdict == "not ok" else "dim")
        if cell.memory and cell.memory.word != SAME:
            styles[index, "memory"] = "bold red" if cell.memory.word == MORE else "green"
    breaks = [i for i in range(1, len(cells)) if cells[i].traits.length != cells[i - 1].traits.length]
    return layout(columns, width, ascii_only=ascii_only, styles=styles, breaks=breaks)


def _setting_columns(cells: Sequence[CellComparison]) -> list[Column]:
    """What is not the same in all cells, apart from block and length: without it two rows would look alike."""
    rows = list(map(_row, cells))
    return [Column(header=axis.header, cells=[_value(axis, row) for row in rows], right=False) for axis in _axes(cells)]


def _axes(cells: Sequence[CellComparison]) -> list[Axis]:
    return without(varying(map(_row, cells)), ("device",))


def _row(cell: CellComparison) -> BenchmarkResult:
    return (cell.new or cell.base).rows[-1]


def _value(axis: Axis, row: BenchmarkResult) -> str:
    value = axis.of(row)
    return fmt.NONE if value is None else fmt.shorten(fmt.plain(axis.figure.format(value)), 12)


def quotient(value: float | None) -> str:
    """A ratio with the third digit after the point, which guards of 2% need: `1.021x`."""
    return f"{value:.3f}x" if value is not None and value < 10 else fmt.ratio(value)


def interval_text(cell: CellComparison) -> str:
    """`0.981-1.034`, or `-`."""
    shift = cell.shift
    if shift is None or shift.low is None:
        return fmt.NONE
    return "-".join(quotient(bound).removesuffix("x") for bound in (shift.low, shift.high))


def verdict_text(cell: CellComparison) -> str:
    """The verdict as people read it; of a cell that is not ok, its status on both sides."""
    if cell.verdict != "not ok":
        return cell.verdict.replace("-", " ")
    statuses = [fmt.shorten(fmt.plain(pool.status), 11) for pool in (cell.base, cell.new)]
    return statuses[0] if len(set(statuses)) == 1 else " -> ".join(statuses)


def memory_text(cell: CellComparison) -> str:
    """`same`, `more +12.0 MiB`, `less -3.00 MiB`, or `-`."""
    memory = cell.memory
    if memory is None:
        return fmt.NONE
    if memory.word == SAME:
        return SAME
    grown = memory.new_bytes - memory.base_bytes
    return f"{memory.word} {'+' if grown > 0 else ''}{fmt.memory(grown)}"


def _time(pool: Pool | None, unit: fmt.Unit) -> str:
    if pool is None:
        return fmt.NONE
    return status_word(pool.fault) if pool.fault else unit.text(pool.time_s)


def _warnings(cell: CellComparison) -> str:
    return fmt.listed(cell.warnings, 32)


# -- what stands around the table ----------------------------------------------------------------------------------


def legend(comparison: Comparison) -> Text:
    """The files of both sides, and what the figures are."""
    from rich.text import Text

    guards = sorted({cell.guard for cell in comparison.cells if cell.guard is not None})
    shares = sorted({round(c.shift.confidence * 100) for c in comparison.cells if c.shift and c.shift.confidence})
    words = "ratio is new time / base time"
    if shares:
        words += f", with its {' or '.join(f'{share}%' for share in shares[-3:])} interval"
    if guards:
        words += f"; a shift up to {' or '.join(f'{guard * 100:g}%' for guard in guards)} is none"
    text = Text(style="dim")
    for side, paths in (("base", comparison.base), ("new", comparison.new)):
        text.append(f"{side + ':':<5} {', '.join(map(fmt.plain, paths))}\n")
    return text.append(words)


def notes(comparison: Comparison) -> Text:
    """Why cells have no figure, what must be known of verdicts: warnings, shifts that nothing explains."""
    from rich.text import Text

    said: dict[tuple[str, str], list[str]] = {}
    warned: dict[str, dict[str, list[str]]] = {}
    axes = _axes(comparison.cells)
    for cell in comparison.cells:
        if cell.verdict != "inconclusive" and cell.reason:
            said.setdefault((verdict_text(cell), fmt.plain(cell.reason)), []).append(_place(cell, axes))
        if cell.unexplained and cell.verdict in ("slower", "faster"):
            said.setdefault((cell.verdict, UNEXPLAINED), []).append(_place(cell, axes))
        for side, pool in (("base", cell.base), ("new", cell.new)):
            for word in pool.warnings if pool else ():
                warned.setdefault(word, {}).setdefault(side, []).append(_place(cell, axes))
    text = Text()
    for (word, why), places in said.items():
        text.append(f"{word}: ", style="yellow").append(f"{_few(places)} ({fmt.shorten(why, 200)})\n")
    for word, sides in warned.items():
        shown = {side: _few(places, comparison) for side, places in sides.items()}
        both = len(shown) > 1 and len(set(shown.values())) == 1
        where = f"{shown['base']} on both sides" if both else "; ".join(f"{at} in {side}" for side, at in shown.items())
        text.append(f"{fmt.shorten(fmt.plain(word), MOST_VALUE)}: ", style="yellow").append(where)
        text.append(f" ({WARNING_ADVICE[word]})\n" if word in WARNING_ADVICE else "\n")
    text.rstrip()
    return text


def _place(cell: CellComparison, axes: Sequence[Axis]) -> str:
    """`Dense (train) at 4K`. axes: those to name besides block and length."""
    setting = f" ({fmt.plain(in_words(_row(cell), axes))})" if axes else ""
    return f"{fmt.shorten(fmt.plain(cell.traits.name), MOST_VALUE)}{setting} at {fmt.tokens(cell.traits.length)}"


def _few(places: Sequence[str], comparison: Comparison | None = None, most: int = 6) -> str:
    """The first places; of all cells of `comparison` only that they are all."""
    if comparison and len(places) == len(comparison.cells) > 1:
        return "all cells"
    names = list(dict.fromkeys(places))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def difference_lines(comparison: Comparison) -> list[str]:
    """`torch: 2.12.0 -> 2.13.0`, one a fact, those that leave nothing to compare first."""
    lines = []
    for each in comparison.differences[:MOST_LINES]:
        name, base, new = (fmt.shorten(fmt.plain(text), MOST_VALUE) for text in (each.name, each.base, each.new))
        lines.append(f"{name}: {base} -> {new}")
    more = len(comparison.differences) - len(lines)
    return lines + ([f"and {more} more, in --json"] if more > 0 else [])


def environment(comparison: Comparison) -> Text:
    """What differs around the cells, or that nothing does."""
    from rich.text import Text

    lines = difference_lines(comparison)
    if not lines:
        return Text("Nothing that was recorded of machine, versions, settings and code differs.", style="dim")
    return Text("\n").join([Text("Not the same on both sides", style="bold"), *(Text(f"  {line}") for line in lines)])


def settle_lines(comparison: Comparison) -> list[str]:
    """Why cells are inconclusive, and the commands that would settle them, each on a line that can be copied."""
    reasons: dict[str, list[str]] = {}
    axes = _axes(comparison.cells)
    for cell in comparison.cells:
        if cell.verdict == "inconclusive":
            reasons.setdefault(fmt.plain(cell.reason), []).append(_place(cell, axes))
    if not reasons:
        return []
    lines = [f"inconclusive: {_few(places)}: {reason}" for reason, places in reasons.items()]
    commands = settling(comparison)
    if commands:
        lines.append("To settle it, each side with the code and on the machine that it was made with:")
        lines += [f"  {fmt.plain(command.text)}" for command in commands]
    open_cells = [cell for cell in comparison.cells if cell.verdict == "inconclusive"]
    if not all(cell.more_rounds_help for cell in open_cells):
        lines.append(
            "More rounds do not take away what two runs differ by: `longctx sweep --blocks NEW --against BASE` "
            "measures both in turns."
        )
    elif not commands:
        lines.append("To settle it, measure both sides with `longctx sweep --rounds 5` or more.")
    return lines


# -- for other programs --------------------------------------------------------------------------------------------


def document(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain data for JSON. Seconds and bytes; a figure that does not exist is None."""
    return jsonable(
        {
            "base": list(comparison.base),
            "new": list(comparison.new),
            "summary": comparison.sentence,
            "counts": {
                verdict: comparison.count(verdict)
                for verdict in ("slower", "faster", "same", "inconclusive", "not ok", "only-in-base", "only-in-new")
            },
            "regressions": len(comparison.regressions),
            "cells": [_cell_document(cell) for cell in comparison.cells],
            "differences": [
                {"name": each.name, "base": each.base, "new": each.new, "fatal": each.fatal}
                for each in comparison.differences
            ],
            "settle": [{"side": command.side, "command": command.text} for command in settling(comparison)],
        }
    )


def _cell_document(cell: CellComparison) -> dict[str, Any]:
    traits, shift, memory, row = cell.traits, cell.shift, cell.memory, _row(cell)
    return {
        "block_name": traits.name,
        "block_options": row.block_options,
        "sequence_length": traits.length,
        "batch_size": traits.batch_size,
        "mode": traits.mode,
        "dtype": traits.dtype,
        "d_model": traits.d_model,
        "n_heads": traits.n_heads,
        "num_kv_heads": traits.num_kv_heads,
        "verdict": cell.verdict,
        "reason": cell.reason or None,
        "regression": cell.regression,
        "unexplained": cell.unexplained,
        "guard": cell.guard,
        "ratio": shift and shift.ratio,
        "interval": [shift.low, shift.high] if shift and shift.low is not None else None,
        "confidence": shift and shift.confidence,
        "memory": memory and memory.word,
        "warnings": cell.warnings,
        **{side: pool and _pool_document(pool) for side, pool in (("base", cell.base), ("new", cell.new))},
    }


def _pool_document(pool: Pool) -> dict[str, Any]:
    return {
        "status": pool.status,
        "time_s": pool.time_s,
        "round_medians_s": pool.rounds,
        "peak_memory_bytes": pool.peaks_bytes,
        "warnings": pool.warnings,
        "files": list(pool.paths),
    }


def to_markdown(comparison: Comparison) -> str:
    """For a comment on a pull request: the sentence, the table, and what else is known, folded away."""
    unit = fmt.column_unit(p.time_s for c in comparison.cells for p in (c.base, c.new) if p and p.ok)
    rows, axes = [], _axes(comparison.cells)
    for cell in comparison.cells:
        verdict = markdown_text(verdict_text(cell))
        verdict = f"**{verdict}**" if cell.verdict in ("slower", "faster") or cell.no_longer_ok else verdict
        if cell.warnings:
            verdict += f" ({markdown_text(_warnings(cell))})"
        memory = markdown_text(memory_text(cell))
        rows.append(
            [
                markdown_text(fmt.shorten(fmt.plain(cell.traits.name), MOST_VALUE)),
                *(markdown_text(_value(axis, _row(cell))) for axis in axes),
                f"{cell.traits.length:,}",
                *(markdown_text(_time(pool, unit)) for pool in (cell.base, cell.new)),
                quotient(cell.shift and cell.shift.ratio),
                interval_text(cell),
                verdict,
                f"**{memory}**" if cell.memory and cell.memory.word == MORE else memory,
            ]
        )
    head = [
        "block",
        *(axis.header for axis in axes),
        "tokens",
        f"base ({unit.name})",
        f"new ({unit.name})",
        "ratio",
        "interval",
        "verdict",
        "memory",
    ]
    parts = [f"**{comparison.sentence}**", markdown_table(head, rows, right=range(1 + len(axes), 6 + len(axes)))]
    said = [*notes(comparison).plain.splitlines(), *settle_lines(comparison)]
    folded = {
        "Environment": difference_lines(comparison) or ["nothing that was recorded differs"],
        "Notes": [*legend(comparison).plain.splitlines(), *(line for line in said if line)],
    }
    for title, lines in folded.items():
        listed = "\n".join(f"- {markdown_text(line)}" for line in lines)
        parts.append(f"<details><summary>{title}</summary>\n\n{listed}\n\n</details>")
    return "\n\n".join(parts) + "\n"
