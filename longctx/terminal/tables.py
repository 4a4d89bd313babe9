"""Results as tables of text that stay true on any width: columns are left out and names shortened, numbers never."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longctx.analysis.ranking import BASE, base_of, ratio
from longctx.analysis.statistics import positive
from longctx.analysis.summary import rankings, reason
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt

if TYPE_CHECKING:
    from rich.text import Text

GAP = 2
NAME_WIDTH, NAME_WIDTH_NARROW = 20, 12
"""What a name keeps while columns are still there to be left out; the second on screens under 60 columns."""
LEAST_NAME_WIDTH = 8

WARNING_ADVICE = {
    "unstable": "samples disagree; close other programs, or raise --rounds",
    "suspect": "time grows too slowly with length to be believed",
    "throttled": "the chip was slowed down while measuring; let it cool, or lower its clocks",
    "launch_bound": "the time is that of launching kernels, not of their work; use longer lengths",
    "contended": "other programs used this machine while measuring",
}
STYLES = {"ok": "green", "wrong": "bold red", "impossible": "bold red", "skipped": "dim", "unsupported": "dim"}
BAD = "yellow"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of strings. keep: columns with a smaller number are left out first; None: never left out."""

    header: str
    cells: list[str]
    keep: int | None = None
    right: bool = True
    flexible: bool = False
    """A name: it may be shortened in its middle."""

    @property
    def natural(self) -> int:
        from rich.cells import cell_len

        return max(map(cell_len, [self.header, *self.cells]))


def layout(
    columns: Sequence[Column],
    width: int,
    *,
    ascii_only: bool = False,
    styles: Mapping[tuple[int, str], str] | None = None,
    breaks: Iterable[int] = (),
) -> Text:
    """The table that fits into `width`: the least important columns left out, then names shortened, then rows as
    blocks of `name value` lines.

    styles: (row, header) -> Rich style of that cell. breaks: rows before which a blank line stands.
    """
    shown = list(columns)
    kept = NAME_WIDTH if width >= 60 else NAME_WIDTH_NARROW
    while (room := _name_room(shown, width)) < _wanted(shown, kept):
        droppable = [column for column in shown if column.keep is not None]
        if not droppable:
            break
        shown.remove(min(droppable, key=lambda column: column.keep))
    if room < _wanted(shown, LEAST_NAME_WIDTH):
        return _stacked(columns, width, ascii_only=ascii_only)
    return _lines(shown, room, ascii_only=ascii_only, styles=styles or {}, breaks=set(breaks))


def _name_room(columns: Sequence[Column], width: int) -> int:
    fixed = sum(column.natural for column in columns if not column.flexible)
    return width - fixed - GAP * (len(columns) - 1)


def _wanted(columns: Sequence[Column], most: int) -> int:
    return sum(min(column.natural, most) for column in columns if column.flexible)


def _lines(
    columns: Sequence[Column],
    room: int,
    *,
    ascii_only: bool,
    styles: Mapping[tuple[int, str], str],
    breaks: set[int],
) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    widths = [min(column.natural, room) if column.flexible else column.natural for column in columns]
    text = Text(no_wrap=True, overflow="ignore")

    def line(cells: Sequence[str], row: int | None) -> None:
        for index, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
            cell = fmt.shorten(cell, width, ellipsis="~" if ascii_only else "…") if column.flexible else cell
            padding = " " * (width - cell_len(cell))
            style = "bold" if row is None else styles.get((row, column.header), "")
            last = index == len(columns) - 1
            text.append(padding if column.right else "").append(cell, style=style)
            text.append("" if column.right or last else padding).append("" if last else " " * GAP)
        text.append("\n")

    line([column.header for column in columns], None)
    for row in range(len(columns[0].cells)):
        if row in breaks:
            text.append("\n")
        line([column.cells[row] for column in columns], row)
    text.rstrip()
    return text


def _stacked(columns: Sequence[Column], width: int, *, ascii_only: bool) -> Text:
    from rich.text import Text

    ellipsis = "~" if ascii_only else "…"
    text = Text(no_wrap=True, overflow="ignore")
    label_width = max(len(column.header) for column in columns)
    for row in range(len(columns[0].cells)):
        text.append("\n" if row else "")
        for column in columns:
            cell = column.cells[row]
            if column.flexible:
                cell = fmt.shorten(cell, max(LEAST_NAME_WIDTH, width - label_width - 1), ellipsis=ellipsis)
            if cell not in ("", fmt.NONE):
                text.append(f"{column.header:<{label_width}} ", style="dim").append(f"{cell}\n")
    text.rstrip()
    return text


# -- tables of results ---------------------------------------------------------------------------------------------


def results_table(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """All rows by length, in the order of the results within a length: time, spread, throughput, memory, ratio to
    Dense as the median of same-round ratios, error against the reference, status."""
    rows = sorted(results, key=lambda result: result.sequence_length)
    columns = [
        Column(header="tokens", cells=[fmt.tokens(r.sequence_length) for r in rows]),
        *_setting_columns(rows),
        *_figure_columns(rows, versus=["Identity", BASE], everything=results),
    ]
    breaks = [i for i in range(1, len(rows)) if rows[i].sequence_length != rows[i - 1].sequence_length]
    return layout(columns, width, ascii_only=ascii_only, styles=_styles(rows, columns), breaks=breaks)


def ranked_table(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """The rows of one length, fastest first, those without a figure last, with ratios to Identity and Dense."""
    rows = sorted(results, key=lambda r: (not r.ok, _time(r) or 0.0))
    columns = _figure_columns(rows, versus=["Identity", BASE], everything=results)
    return layout(columns, width, ascii_only=ascii_only, styles=_styles(rows, columns))


def _setting_columns(rows: Sequence[BenchmarkResult]) -> list[Column]:
    """What is not the same in all rows, apart from block and length: rows of several runs in one table."""
    values: dict[str, Callable[[BenchmarkResult], object]] = {
        "batch": lambda r: r.batch_size,
        "dtype": lambda r: r.dtype or fmt.NONE,
        "mode": lambda r: r.mode,
        "step": lambda r: fmt.NONE if r.training_step is None else f"{r.training_step:,}",
        "width": lambda r: r.config.get("d_model", fmt.NONE) if isinstance(r.config, dict) else fmt.NONE,
    }
    columns = []
    for header, value in values.items():
        cells = [fmt.shorten(fmt.plain(value(row)), 12) for row in rows]
        if len(set(cells)) > 1:
            columns.append(Column(header=header, cells=cells, keep=9))
    return columns


def _figure_columns(
    rows: Sequence[BenchmarkResult], *, versus: Sequence[str], everything: Sequence[BenchmarkResult]
) -> list[Column]:
    unit = fmt.column_unit(map(_time, rows))
    size = fmt.column_unit(map(_peak, rows), (fmt.MEBIBYTES,))
    present = [name for name in versus if any(r.block_name == name and r.ok for r in everything)]
    columns = [
        Column(header="block", cells=[fmt.plain(r.block_name) for r in rows], right=False, flexible=True),
        Column(header=f"time {unit.name}", cells=[unit.text(_time(r)) if r.ok else status_word(r) for r in rows]),
        Column(header="+-", cells=[fmt.percent(_spread(r)) for r in rows], keep=2),
        Column(header="tokens/s", cells=[fmt.number(_rate(r)) for r in rows], keep=3),
        Column(header=f"peak {size.name}", cells=[size.text(_peak(r)) for r in rows], keep=5),
    ]
    for name in present:
        cells = [fmt.ratio(_ratio(r, everything, name)) for r in rows]
        columns.append(Column(header=f"vs {name}", cells=cells, keep=6 if name == BASE else 1))
    columns.append(Column(header="error", cells=[fmt.error(gate_error(r)) for r in rows], keep=4))
    columns.append(Column(header="status", cells=[_status(r) for r in rows], keep=0, right=False))
    return [column for column in columns if column.keep is None or set(column.cells) != {fmt.NONE}]


def _styles(rows: Sequence[BenchmarkResult], columns: Sequence[Column]) -> dict[tuple[int, str], str]:
    time = next(column.header for column in columns if column.header.startswith("time"))
    styles = {}
    for index, row in enumerate(rows):
        if not row.ok:
            styles[index, time] = styles[index, "status"] = STYLES.get(row.status, BAD)
        elif row.warnings:
            styles[index, "status"] = BAD
    return styles


def _time(result: BenchmarkResult) -> float | None:
    return positive(result.time_s) if result.ok else None


def _peak(result: BenchmarkResult) -> float | None:
    peak = positive(result.peak_memory_mb)
    return fmt.from_mib(peak) if result.ok else None


def _rate(result: BenchmarkResult) -> float | None:
    return positive(result.throughput_tokens_per_sec) if result.ok else None


def _spread(result: BenchmarkResult) -> float | None:
    """Half the 95% interval over the median."""
    interval, time = result.forward_time_ci95, _time(result)
    if not (isinstance(interval, list) and len(interval) == 2 and time and all(map(positive, interval))):
        return None
    return (interval[1] - interval[0]) / 2 / time


def _ratio(result: BenchmarkResult, results: Sequence[BenchmarkResult], name: str) -> float | None:
    base = base_of(result, results, name)
    return ratio(result, base) if base else None


def gate_error(result: BenchmarkResult) -> float | None:
    """The relative error against the reference, if it was checked."""
    gate = result.gate if isinstance(result.gate, dict) else {}
    value = gate.get("error")
    return float(value) if value == 0 or positive(value) else None


def status_word(result: BenchmarkResult) -> str:
    """The status as it stands in place of a number: short, and never a number itself."""
    return fmt.shorten(fmt.plain(result.status).upper() or "?", 11)


def _status(result: BenchmarkResult) -> str:
    names = result.warnings if isinstance(result.warnings, list) else []
    parts = [result.status, *names] if not (result.ok and names) else names
    return fmt.shorten(fmt.plain(", ".join(map(str, parts))), 32)


# -- what stands around a table ------------------------------------------------------------------------------------


def notes(results: Sequence[BenchmarkResult], *, ascii_only: bool = False) -> Text:
    """Rows that are not ok with their reasons, then warnings with advice; rows that say the same are one line."""
    from rich.text import Text

    faults: dict[tuple[str, str, str], list[int]] = {}
    warnings: dict[str, dict[str, list[int]]] = {}
    for result in sorted(results, key=lambda r: r.sequence_length):
        name = fmt.shorten(fmt.plain(result.block_name), 60)
        if not result.ok:
            said = fmt.shorten(fmt.plain(reason(result)), 300)
            faults.setdefault((fmt.plain(result.status), name, said), []).append(result.sequence_length)
        for warning in result.warnings if isinstance(result.warnings, list) else []:
            warnings.setdefault(fmt.plain(warning), {}).setdefault(name, []).append(result.sequence_length)
    text = Text()
    for (status, name, said), lengths in faults.items():
        text.append(f"{status}: ", style=STYLES.get(status, BAD))
        text.append(f"{name} at {_lengths(lengths)}" + (f": {said}" if said else "") + "\n")
    for warning, blocks in warnings.items():
        text.append(f"{warning}: ", style=BAD)
        places = "; ".join(f"{name} at {_lengths(lengths)}" for name, lengths in blocks.items())
        if sum(map(len, blocks.values())) == len(results) > 1:
            places = "all rows"
        advice = WARNING_ADVICE.get(warning)
        text.append(places + (f" ({advice})" if advice else "") + "\n")
    text.rstrip()
    return _ascii(text) if ascii_only else text


def _lengths(lengths: Iterable[int]) -> str:
    return ", ".join(fmt.tokens(length) for length in dict.fromkeys(lengths))


def ranking_lines(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """One entry a length: blocks fastest first, each with its time over Dense's (or its time where there is none)."""
    from rich.cells import cell_len
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    groups = rankings(results)
    label_width = max((len(fmt.tokens(group.length)) for group in groups), default=0)
    for group in groups:
        if group.setting:
            text.append(f"{fmt.shorten(fmt.plain(group.setting), width)}\n", style="dim")
        label = fmt.tokens(group.length)
        text.append(f"{label:>{label_width}}  ", style="bold")
        used = indent = label_width + 2
        for index, row in enumerate(group.rows):
            figure = fmt.ratio(row.ratio.value) if row.ratio else fmt.duration(row.result.time_s)
            room = max(LEAST_NAME_WIDTH, width - indent - len(figure) - 2)
            name = fmt.shorten(fmt.plain(row.result.block_name), room, ellipsis="~" if ascii_only else "…")
            entry = f"{name} {figure}"
            last = index == len(group.rows) - 1
            size = cell_len(entry) + (0 if last else 1)
            if used > indent and used + 1 + size > width:
                text.append("\n" + " " * indent)
                used = indent
            elif used > indent:
                text.append(" ")
                used += 1
            text.append(entry).append("" if last else ",")
            used += size
        text.append("\n")
    text.rstrip()
    return text


def environment_line(environment: Mapping[str, Any], dtype: str | None = None) -> Text:
    """Machine, number format, threads, torch: what the numbers below it depend on most."""
    from rich.text import Text

    flags = environment.get("flags") if isinstance(environment.get("flags"), Mapping) else {}
    gpu = environment.get("gpu")
    threads = environment.get("threads") or flags.get("threads")
    parts = [
        gpu or environment.get("cpu") or environment.get("device_name"),
        f"{threads} thread{'' if threads == 1 else 's'}" if threads and not gpu else None,
        dtype,
        f"torch {environment['torch']}" if environment.get("torch") else None,
        f"driver {environment['driver']}" if environment.get("driver") else None,
    ]
    return Text(", ".join(fmt.plain(part) for part in parts if part), style="dim")


def _ascii(text: Text) -> Text:
    text.plain = text.plain.encode("ascii", "replace").decode()
    return text


def facts(values: Mapping[str, Any], width: int, *, indent: int = 2) -> Text:
    """`name  value` lines, what is not known left out; long values go on below themselves."""
    import textwrap

    from rich.text import Text

    words = {name: _words(value) for name, value in values.items() if value is not None}
    label_width = max(map(len, words), default=0)
    room = max(12, width - indent - label_width - 2)
    text = Text(no_wrap=True, overflow="ignore")
    for name, value in words.items():
        for index, part in enumerate(textwrap.wrap(value, room) or [""]):
            text.append(" " * indent).append(f"{name if index == 0 else '':<{label_width}}  ", style="dim")
            text.append(f"{part}\n")
    text.rstrip()
    return text


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return fmt.plain(value)
