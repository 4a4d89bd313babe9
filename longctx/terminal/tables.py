"""Results as tables, and what stands around a table: faults and warnings in words, rankings, the machine."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx.analysis.ranking import BASE, Ranked, ratio_to
from longctx.analysis.settings import AXES, Axis, by_mode, class_of, in_words, varying
from longctx.analysis.statistics import positive, spread_between, spread_within
from longctx.analysis.summary import rankings, reason
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt
from longctx.terminal.layout import LEAST_NAME_WIDTH, Column, layout
from longctx.terminal.prose import broken

if TYPE_CHECKING:
    from rich.text import Text

WARNING_ADVICE = {
    "unstable": "samples disagree; close other programs, or raise --rounds",
    "suspect": "time grows too slowly with length to be believed",
    "throttled": "the chip was slowed down while measuring; let it cool, or lower its clocks",
    "launch_bound": "the time is that of launching kernels, not of their work; use longer lengths",
    "contended": "other programs used this machine while measuring",
    "memory_grows": "every call leaves memory behind; a long run will end for want of it",
    "mixes_batch": "sequences of a batch change each other; is a layer without batch_first=True in it?",
}
STYLES = {"ok": "green", "wrong": "bold red", "impossible": "bold red", "skipped": "dim", "unsupported": "dim"}
BAD = "yellow"

_LAYERS = next(axis for axis in AXES if axis.name == "layers")
MODE_HEADS = {
    "forward": "forward: no state kept, no gradients",
    "train": "train: forward, loss and backward",
    "decode": "decode: one token after so many",
    "prefill": "prefill: forward with the state kept",
    "lightning": "lightning: a training step in Lightning's Trainer; bare: the same step in a plain loop",
}


def mode_tables(
    results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False, ranked: bool = False
) -> Text:
    """A table for each mode, under its name if it is not forward alone. ranked: fastest first."""
    from rich.text import Text

    text, modes = Text(no_wrap=True, overflow="ignore"), by_mode(results)
    for index, (mode, rows) in enumerate(modes.items()):
        text.append("\n\n" if index else "")
        head = MODE_HEADS.get(mode, fmt.plain(mode)) if len(modes) > 1 or mode != "forward" else ""
        if not ranked and not _shows_tokens(rows):
            head = ", ".join(filter(None, [head, f"{rows[0].sequence_length:,} tokens"]))
        if (layers := {_LAYERS.of(row) for row in rows}) != {1} and len(layers) == 1:
            head = ", ".join(filter(None, [head, _LAYERS.text(rows[0])]))
        if head:
            text.append(broken(fmt.plain(head), width, indent=2).plain + "\n", style="bold")
        text.append_text(results_table(rows, width, ascii_only=ascii_only, ranked=ranked))
    return text


def results_table(
    results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False, ranked: bool = False
) -> Text:
    """Rows of one mode by length and setting, in their own order within those or, `ranked`, the fastest first.

    Time, spread, throughput, memory, ratio to Dense as the median of same-round ratios, error against the reference,
    status. What is the same in all rows, a single length too, has no column.
    """
    axes = varying(results)

    def place(row: BenchmarkResult) -> tuple:
        return (row.sequence_length, *(axis.of(row) for axis in axes))

    order = {place: index for index, place in enumerate(dict.fromkeys(map(place, results)))}
    speed = (lambda r: (not r.ok, _time(r) or 0.0)) if ranked else (lambda r: ())
    rows = sorted(results, key=lambda r: (r.sequence_length, order[place(r)], speed(r)))
    columns = [
        *_setting_columns(rows, axes),
        *_figure_columns(rows, versus=["Identity", BASE], everything=results),
    ]
    if _shows_tokens(rows) and not (ranked and len({row.sequence_length for row in rows}) == 1):
        columns.insert(0, Column(header="tokens", cells=[fmt.tokens(r.sequence_length) for r in rows]))
    breaks = [i for i in range(1, len(rows)) if place(rows[i]) != place(rows[i - 1])]
    return layout(columns, width, ascii_only=ascii_only, styles=_styles(rows, columns), breaks=breaks)


def _shows_tokens(rows: Sequence[BenchmarkResult]) -> bool:
    """Whether the length has a column: not where something else is what varies."""
    return len({row.sequence_length for row in rows}) > 1 or not varying(rows)


def _setting_columns(rows: Sequence[BenchmarkResult], axes: Sequence[Axis]) -> list[Column]:
    """What is not the same in all rows, apart from block and length; the device is the first that a screen spares."""

    def cells(axis: Axis) -> list[str]:
        values = (axis.of(row) for row in rows)
        return [
            fmt.NONE if value is None else fmt.shorten(fmt.plain(axis.figure.format(value)), 12) for value in values
        ]

    return [
        Column(header=axis.header, cells=cells(axis), keep=1 if axis.name == "device" else None, right=False)
        for axis in axes
    ]


def _class(row: BenchmarkResult) -> str:
    return fmt.shorten(fmt.plain(class_of(row) or fmt.NONE), 24)


def _figure_columns(
    rows: Sequence[BenchmarkResult], *, versus: Sequence[str], everything: Sequence[BenchmarkResult]
) -> list[Column]:
    unit = fmt.column_unit(map(_time, rows))
    size = fmt.column_unit(map(_peak, rows), (fmt.MEBIBYTES,))
    # The peak of a step tells little; what a context costs there is the state.
    decoding = all(row.mode == "decode" for row in rows)
    present = [name for name in versus if any(r.block_name == name and r.ok for r in everything)]
    columns = [
        Column(header="block", cells=[fmt.plain(r.block_name) for r in rows], right=False, flexible=True),
        Column(header="class", cells=[_class(r) for r in rows], keep=6, right=False),
        Column(header=f"time {unit.name}", cells=[unit.text(_time(r)) if r.ok else status_word(r) for r in rows]),
        Column(header="within", cells=[fmt.percent(_spread(r, spread_within)) for r in rows], keep=0),
        Column(header="between", cells=[fmt.percent(_spread(r, spread_between)) for r in rows], keep=2),
        Column(header="tokens/s", cells=[fmt.number(_rate(r)) for r in rows], keep=6 if decoding else 3),
        *_part_columns(rows, unit),
        Column(header=f"peak {size.name}", cells=[size.text(_peak(r)) for r in rows], keep=1 if decoding else 5),
    ]
    columns += _lightning_columns(rows, unit)
    for name in present:
        found = [ratio_to(r, everything, name) for r in rows]
        cells = [fmt.ratio(ratio.value if ratio else None) for ratio in found]
        columns.append(Column(header=f"vs {name}", cells=cells, keep=6 if name == BASE else 1))
    if present:
        # Of the last one, Dense where it is there: what rounds made of it.
        cells = [fmt.ratio_range(ratio.low, ratio.high) if ratio and ratio.rounds > 1 else fmt.NONE for ratio in found]
        columns.append(Column(header="range", cells=cells, keep=1))
    columns.append(Column(header="error", cells=[fmt.error(gate_error(r)) for r in rows], keep=4))
    columns.append(Column(header="status", cells=[_status(r) for r in rows], keep=2, right=False))
    return [column for column in columns if column.keep is None or set(column.cells) != {fmt.NONE}]


def _part_columns(rows: Sequence[BenchmarkResult], unit: fmt.Unit) -> list[Column]:
    """The parts of a training step, and the size of a state: there in the modes that have them."""
    parts = [
        Column(header=header, cells=[unit.text(getattr(r, name)) if r.ok else fmt.NONE for r in rows], keep=4)
        for header, name in (("forward", "forward_part_s"), ("backward", "backward_part_s"))
    ]
    states = [r.state_bytes if r.ok and r.mode in ("decode", "prefill") else None for r in rows]
    size = fmt.column_unit(states, fmt.BYTES)
    return [*parts, Column(header=f"state {size.name}", cells=[size.text(value) for value in states], keep=6)]


def _lightning_columns(rows: Sequence[BenchmarkResult], unit: fmt.Unit) -> list[Column]:
    """Mode lightning: the same training step in a plain loop, and what share of its own Lightning adds to it."""
    bare = [positive(lightning_of(row, "bare_step_s")) if row.ok else None for row in rows]
    added = [lightning_of(row, "overhead_share") if row.ok else None for row in rows]
    return [
        Column(header=f"bare {unit.name}", cells=[unit.text(time) for time in bare], keep=8),
        Column(header="overhead", cells=[fmt.NONE if share is None else f"{share:.1%}" for share in added], keep=8),
    ]


def lightning_of(row: BenchmarkResult, name: str) -> float | None:
    """A figure of mode lightning; an overhead may be negative, where noise is larger."""
    value = row.lightning.get(name) if isinstance(row.lightning, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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


def _spread(result: BenchmarkResult, of: Callable[[list[list[float]]], float | None]) -> float | None:
    """The spread of the samples within rounds or between them."""
    samples = [
        [value for value in values if positive(value)] for values in result.samples or [] if isinstance(values, list)
    ]
    return of(samples) if result.ok else None


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
    return fmt.listed(parts, 32)


# -- what stands around a table ------------------------------------------------------------------------------------


def notes(results: Sequence[BenchmarkResult], *, ascii_only: bool = False) -> Text:
    """Rows that are not ok with their reasons, then warnings with advice; rows that say the same are one line."""
    from rich.text import Text

    faults: dict[tuple[str, str, str], list[int]] = {}
    warnings: dict[str, dict[str, list[int]]] = {}
    axes = varying(results)
    for result in sorted(results, key=lambda r: r.sequence_length):
        name = fmt.shorten(fmt.plain(result.block_name), 60)
        name += f" ({fmt.plain(in_words(result, axes))})" if axes else ""
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


def ranked_by_ratio(results: Sequence[BenchmarkResult]) -> bool:
    """Whether `ranking_lines` has Dense to give times over."""
    return any(row.ratio for group in rankings(results) for row in group.rows)


def ranking_lines(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """One entry a length, under each setting: blocks fastest first, each with its time over Dense's (or its time where
    there is none)."""
    from rich.cells import cell_len
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    groups = rankings(results)
    label_width = max((len(fmt.tokens(group.length)) for group in groups), default=0)
    settings = list(dict.fromkeys(group.setting for group in groups))
    said = ""
    figures = [_ranked_figure(row) for group in groups for row in group.rows]
    room = max(LEAST_NAME_WIDTH, width - label_width - 2 - max(map(len, figures), default=0) - 2)
    names = [fmt.plain(row.result.block_name) for group in groups for row in group.rows]
    short = fmt.short_names(names, room, ellipsis="~" if ascii_only else "…")
    for group in sorted(groups, key=lambda group: settings.index(group.setting)):
        if group.setting != said:
            said = group.setting
            text.append(f"{fmt.shorten(fmt.plain(group.setting), width)}\n", style="dim")
        label = fmt.tokens(group.length)
        text.append(f"{label:>{label_width}}  ", style="bold")
        used = indent = label_width + 2
        for index, row in enumerate(group.rows):
            entry = f"{short[fmt.plain(row.result.block_name)]} {_ranked_figure(row)}"
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


def _ranked_figure(row: Ranked) -> str:
    return fmt.ratio(row.ratio.value) if row.ratio else fmt.duration(row.result.time_s)


def one_dtype(results: Sequence[BenchmarkResult]) -> str | None:
    """The number format of all rows, None where they have several."""
    found = {row.dtype for row in results}
    return found.pop() if len(found) == 1 else None


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
    from rich.text import Text

    words = {name: _words(value) for name, value in values.items() if value is not None}
    label_width = max(map(len, words), default=0)
    room = max(12, width - indent - label_width - 2)
    text = Text(no_wrap=True, overflow="ignore")
    for name, value in words.items():
        for index, part in enumerate(textwrap.wrap(value, room, break_on_hyphens=False) or [""]):
            text.append(" " * indent).append(f"{name if index == 0 else '':<{label_width}}  ", style="dim")
            text.append(f"{part}\n")
    text.rstrip()
    return text


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return fmt.plain(value)
