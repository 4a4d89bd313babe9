"""What a sweep with --against found: one line a pair, with the ratio, its interval and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longctx.analysis.paired import PairedCell
from longctx.analysis.settings import in_words, varying
from longctx.terminal import format as fmt
from longctx.terminal.layout import Column, layout
from longctx.terminal.tables import status_word

if TYPE_CHECKING:
    from rich.text import Text

    from longctx.results import BenchmarkResult

STYLES = {"faster": "bold green", "slower": "bold red", "same": "green", "inconclusive": "yellow", "not ok": "yellow"}


def paired_table(cells: Sequence[PairedCell], width: int, *, ascii_only: bool = False) -> Text:
    """Block, tokens, its time and the other's, ratio of the pairs with interval, verdict, and why there is none."""
    rows = sorted(cells, key=lambda cell: cell.ours.sequence_length)
    axes = varying(cell.ours for cell in rows)
    outcomes = [cell.outcome for cell in rows]
    unit = fmt.column_unit(row.time_s for cell in rows for row in (cell.ours, cell.theirs) if row.ok)
    columns = [
        Column(header="block", cells=[fmt.plain(c.ours.block_name) for c in rows], right=False, flexible=True),
        Column(header="against", cells=[fmt.plain(c.theirs.block_name) for c in rows], right=False, flexible=True),
        *(Column(header=axis.header, cells=[fmt.plain(axis.of(cell.ours)) for cell in rows]) for axis in axes),
        Column(header="tokens", cells=[fmt.tokens(cell.ours.sequence_length) for cell in rows]),
        Column(header=f"time {unit.name}", cells=[_time(cell.ours, unit) for cell in rows], keep=2),
        Column(header=f"against {unit.name}", cells=[_time(cell.theirs, unit) for cell in rows], keep=1),
        Column(header="ratio", cells=[_ratio(outcome.ratio) for outcome in outcomes]),
        Column(header="interval", cells=[_interval(o.low, o.high) for o in outcomes], keep=3),
        Column(header="verdict", cells=[outcome.verdict for outcome in outcomes], right=False),
    ]
    styles = {(index, "verdict"): STYLES.get(outcome.verdict, "") for index, outcome in enumerate(outcomes)}
    breaks = [i for i in range(1, len(rows)) if rows[i].ours.sequence_length != rows[i - 1].ours.sequence_length]
    return layout(columns, width, ascii_only=ascii_only, styles=styles, breaks=breaks)


def reasons(cells: Sequence[PairedCell]) -> Text:
    """One line for each undecided pair: why."""
    from rich.text import Text

    text, axes = Text(), varying(cell.ours for cell in cells)
    for cell in cells:
        if cell.outcome.verdict == "inconclusive":
            place = f"{fmt.plain(cell.ours.block_name)} at {fmt.tokens(cell.ours.sequence_length)}"
            place += f" ({fmt.plain(in_words(cell.ours, axes))})" if axes else ""
            text.append("inconclusive: ", style=STYLES["inconclusive"])
            text.append(f"{place}, {fmt.plain(cell.outcome.reason)}\n")
    text.rstrip()
    return text


def _time(row: BenchmarkResult, unit: fmt.Unit) -> str:
    return unit.text(row.time_s) if row.ok else status_word(row)


def _ratio(value: float | None) -> str:
    """Three decimals, where `fmt.ratio` has two: it is small differences that pairs are taken for."""
    return fmt.NONE if value is None else f"{value:.3f}x"


def _interval(low: float | None, high: float | None) -> str:
    return fmt.NONE if low is None or high is None else f"{low:.3f}-{high:.3f}"
