"""The longest context that fits, on the screen: the search as it runs, and what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longctx.analysis.conclusions import MOST_SETTINGS, about
from longctx.analysis.frontier import CARD_GIB, Frontier, frontiers, is_limits_row
from longctx.analysis.settings import AXES, Axis, by_mode, in_words, setting, varying
from longctx.analysis.statistics import positive
from longctx.analysis.summary import FRAME
from longctx.config import Cell
from longctx.events import CellFinished, Event
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt
from longctx.terminal.findings import exponent, kind, law_document, lined, summary_text
from longctx.terminal.layout import Column, layout
from longctx.terminal.live import LiveView, PlainView, SweepView
from longctx.terminal.prose import broken
from longctx.terminal.tables import notes, status_word

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

CARDS_HEAD = "What other devices would hold: extrapolated by the memory law, weights, input and output counted"
DOCUMENTED = ("batch_size", "dtype", "d_model", "n_heads", "num_kv_heads", "layers")
"""What a document says of each frontier besides its mode."""
_REASONS = {"length": "--max-length", "unfinished": "not finished"}


# -- while it runs -------------------------------------------------------------------------------------------------


def limits_view(console: Console, *, quiet: bool = False, animate: bool = True) -> SweepView:
    """The view that suits `console`."""
    if quiet:
        return SweepView(console)
    return LiveLimits(console, animate=animate) if console.is_interactive else PlainLimits(console)


def tried_line(cell: Cell, result: BenchmarkResult, axes: Sequence[Axis] = (), *, ascii_only: bool = False) -> str:
    """`BLADE 64K fits: 1.20 GiB, 0.31 s`: one length that was tried in one line. axes: those to name besides."""
    head = f"{fmt.plain(cell.block.name)} {fmt.tokens(cell.length)}" + (f" ({in_words(cell, axes)})" if axes else "")
    if result.ok:
        size = fmt.memory(fmt.from_mib(result.total_memory_mb))
        return f"{head} fits: {size}, first call {fmt.duration(result.first_call_s)}"
    error = result.error if isinstance(result.error, dict) else {}
    said = fmt.shorten(fmt.plain(error.get("message") or ""), 120, ellipsis="~" if ascii_only else "…")
    return f"{head} {'not tried' if result.status == 'skipped' else result.status}: {said}"


class PlainLimits(PlainView):
    """One line for each length that was tried."""

    def _said(self, event: CellFinished) -> str:
        return f"[{self.step}] {tried_line(event.cell, event.result, self.axes, ascii_only=self.ascii)}"


class LiveLimits(LiveView):
    """The running length, and how far every block has come."""

    def update(self, event: Event) -> None:
        with self._lock:
            super().update(event)
            if isinstance(event, CellFinished):
                self.message = tried_line(event.cell, event.result, self.axes, ascii_only=self.ascii)

    def _progress(self, width: int) -> Text:
        from rich.text import Text

        tried = f"{self.step} length{'' if self.step == 1 else 's'} tried"
        text = Text(no_wrap=True, overflow="ellipsis").append(tried, style="bold")
        return text.append(f"  {fmt.clock(self.estimate.elapsed_s())}", style="dim")

    def _tables(self, width: int, room: int) -> list[Text]:
        found: dict[tuple, tuple[Cell, dict[int, BenchmarkResult]]] = {}
        for cell in [*self.cells, *self.results]:
            found.setdefault(self._line(cell), (cell, {}))
        for cell, row in self.results.items():
            found[self._line(cell)][1][cell.length] = row
        # The running one stays among those that the screen has room for.
        keys = list(found)
        most = max(1, room - 1 if len(keys) < room else room - 2)
        now = keys.index(self._line(self.running)) if self.running and self._line(self.running) in found else 0
        first = max(0, min(now - most // 2, len(keys) - most))
        shown = keys[first : first + most]
        fits, ends, sizes, styles = [], [], [], {}
        for index, key in enumerate(shown):
            rows = found[key][1]
            ok = max((t for t, row in rows.items() if row.ok), default=0)
            fails = min((t for t, row in rows.items() if t > ok and not row.ok), default=None)
            fits.append(f"{ok:,}" if ok else fmt.NONE)
            ends.append(f"{fails:,} {status_word(rows[fails])}" if fails else "?")
            sizes.append(fmt.memory(fmt.from_mib(rows[ok].total_memory_mb)) if ok else fmt.NONE)
            if self.running and self._line(self.running) == key:
                styles[index, "fits"] = "bold cyan"
        columns = [
            *_axis_columns([found[key][0] for key in shown], self.axes),
            Column(header="block", cells=[fmt.plain(key[0].name) for key in shown], right=False, flexible=True),
            Column(header="fits", cells=fits),
            Column(header="too long", cells=ends, keep=2),
            Column(header="memory", cells=sizes, keep=1),
        ]
        text = layout(columns, width, ascii_only=self.ascii, styles=styles)
        if len(keys) > len(shown):
            text.append(f"\n{len(keys) - len(shown)} more rows", style="dim")
        return [text]


# -- what was found ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """What was found in one mode: heading, table of frontiers, table of what other cards would hold, lines on why each
    search ended, sentences, and the rows that it was read from."""

    head: str
    table: list[Column]
    cards: list[Column]
    ends: list[str]
    sentences: list[str]
    rows: Sequence[BenchmarkResult]


def limits_parts(results: Sequence[BenchmarkResult]) -> list[Part]:
    """The answer of a search, a part for each mode."""
    return [_part(rows) for rows in by_mode(row for row in results if is_limits_row(row)).values()]


def _part(results: Sequence[BenchmarkResult]) -> Part:
    found = frontiers(results)
    axes = varying(f.row for f in found)
    held = any(f.would_hold(gib * fmt.GIB) for f in found for gib in CARD_GIB)
    return Part(
        head=_head(results, axes),
        table=_columns(found, axes),
        cards=_card_columns(found, axes) if held else [],
        ends=[line for f in found for line in _ends(f, results)],
        sentences=sentences(found),
        rows=results,
    )


def limits_text(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """For each mode: table of frontiers, what other cards would hold, why each search ended, and who goes furthest."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    for index, part in enumerate(limits_parts(results)):
        text.append("\n\n" if index else "")
        text.append(lined([part.head], width, ascii_only=True).plain, "bold" if index else "").append("\n\n")
        text.append_text(layout(part.table, width, ascii_only=ascii_only))
        if part.cards:
            text.append("\n\n").append(lined([CARDS_HEAD], width, ascii_only=ascii_only).plain, "bold")
            text.append("\n").append_text(layout(part.cards, width, ascii_only=ascii_only))
        if part.ends:
            text.append("\n\n").append_text(lined(part.ends, width, ascii_only=ascii_only))
        if len(said := notes([row for row in part.rows if row.ok], ascii_only=ascii_only)):
            text.append("\n\n").append_text(broken(said, width, indent=2))
        if part.sentences:
            said = summary_text(part.sentences, width, ascii_only=ascii_only)
            said.stylize("bold")
            text.append("\n\n").append_text(said)
    return text


def _head(results: Sequence[BenchmarkResult], axes: Sequence[Axis]) -> str:
    row = results[0]
    config = row.config if isinstance(row.config, Mapping) else {}
    words = [f"Longest context, mode {fmt.plain(row.mode)}"]
    known = {"batch_size": "batch", "d_model": "D", "n_heads": "H"}
    varied = {axis.name for axis in axes}
    words += [f"{name} {config[key]}" for key, name in known.items() if key not in varied and key in config]
    layers = config.get("layers", 1)
    return ", ".join([*words, *([f"{layers} layers"] if layers != 1 and "layers" not in varied else [])])


def _axis_columns(things: Sequence[BenchmarkResult | Cell], axes: Sequence[Axis]) -> list[Column]:
    """What the searches differ in besides their block."""
    return [
        Column(
            header=axis.header,
            cells=[fmt.shorten(fmt.plain(axis.figure.format(axis.of(thing))), 12) for thing in things],
            right=False,
        )
        for axis in axes
    ]


def _names(found: Sequence[Frontier], axes: Sequence[Axis]) -> list[Column]:
    names = [fmt.plain(f.block if axes else f.name) for f in found]
    first = Column(header="block", cells=names, right=False, flexible=True)
    return [*_axis_columns([f.row for f in found], axes), first]


def _columns(found: Sequence[Frontier], axes: Sequence[Axis]) -> list[Column]:
    per_token = [positive(f.peak and f.fits and f.peak.at(f.fits) / f.fits) for f in found]
    # The peak of a step is noise; what a context costs there is the state.
    grows = "state" if found[0].mode == "decode" else "peak"
    return [
        *_names(found, axes),
        Column(header="fits", cells=[f"{f.fits:,}" if f.fits else fmt.NONE for f in found]),
        Column(header="too long", cells=[f"{f.fails:,}" if f.fails else fmt.NONE for f in found], keep=6),
        Column(header="ended by", cells=[reason(f) for f in found], keep=8, right=False),
        Column(header="memory", cells=[fmt.memory(f.needed_bytes) for f in found], keep=7),
        Column(header="call", cells=[fmt.duration(f.call_s) for f in found], keep=4),
        Column(header=f"{grows}/token", cells=[fmt.memory(value) for value in per_token], keep=3),
        Column(header=f"{grows} k", cells=[exponent(f.peak) for f in found], keep=5),
        Column(header="fit", cells=[kind(f.peak) for f in found], keep=1, right=False),
    ]


def _card_columns(found: Sequence[Frontier], axes: Sequence[Axis]) -> list[Column]:
    columns = _names(found, axes)
    for gib in CARD_GIB:
        held = [f.would_hold(gib * fmt.GIB) for f in found]
        cells = [f"~{about(tokens)}" if tokens else fmt.NONE if tokens is None else "none" for tokens in held]
        columns.append(Column(header=f"{gib} GiB", cells=cells))
    return columns


def reason(frontier: Frontier) -> str:
    """Why the search ended where it did: `memory`, `time, predicted`, `--max-length`."""
    words = _REASONS.get(frontier.limit, fmt.plain(frontier.limit))
    words += "" if frontier.tried else ", predicted"
    return words if frontier.finished or frontier.limit == "unfinished" else f"{words}, not finished"


def _ends(frontier: Frontier, results: Sequence[BenchmarkResult]) -> list[str]:
    """What became of the first length that was too long, what the block does not take before it, and of time, how far
    memory would have gone."""
    name = fmt.shorten(fmt.plain(frontier.name), 40)
    said = [f"{name} at {frontier.fails:,}: {fmt.shorten(fmt.plain(frontier.said), 160)}"] if frontier.said else []
    device = device_bytes(results) if frontier.limit in ("time", "length", "unfinished") else None
    held = frontier.would_hold(device) if device else None
    if held and held > frontier.fits:
        word = {"time": "time ended it, not memory", "length": "--max-length ended it, not memory"}
        by = f"by its memory law the {fmt.memory(device)} here would hold about {about(held)}"
        said = [f"{(said or [name])[0]}: {word.get(frontier.limit, 'not finished')}; {by}"]
    if frontier.refused:
        lengths = ", ".join(f"{length:,}" for length in frontier.refused)
        said.append(f"{name} does not take {lengths}: {fmt.shorten(fmt.plain(frontier.refusal), 160)}")
    return said


def device_bytes(results: Sequence[BenchmarkResult]) -> float | None:
    """Memory of the GPU that the rows are from, or what was free of a machine's."""
    environment = results[0].environment if results else {}
    name = "gpu_memory_total_bytes" if environment.get("gpu") else "memory_available_bytes"
    return positive(environment.get(name))


def sentences(found: Sequence[Frontier]) -> list[str]:
    """A sentence on each setting in which a block that mixes fits, under its name where there are several."""
    settings: dict[tuple, list[Frontier]] = {}
    for each in found:
        settings.setdefault(setting(each.row), []).append(each)
    axes = varying(each.row for each in found)
    said = {key: _sentence(group) for key, group in settings.items()}
    lines = [
        f"{fmt.plain(in_words(settings[key][0].row, axes)).capitalize()}: {line}" if axes else line
        for key, line in said.items()
        if line
    ]
    return lines[:MOST_SETTINGS]


def _sentence(found: Sequence[Frontier]) -> str:
    """Who goes furthest of the blocks that mix, and how much further than Dense; empty where nothing can be said."""
    mixing = sorted((f for f in found if f.fits and f.block not in FRAME), key=lambda f: -f.fits)
    dense = next((f for f in found if f.block == "Dense" and f.fits), None)
    if not mixing:
        return ""
    best = mixing[0]
    level = [f.block for f in mixing[1:] if f.fits >= 0.95 * best.fits]
    open_ended = best.limit in ("time", "length", "unfinished") or not best.finished
    if dense and open_ended and dense.fits >= best.fits:
        # Nothing was told apart.
        names = [fmt.plain(each) for each in dict.fromkeys([best.block, *level, dense.block])]
        return f"{', '.join(names[:-1])} and {names[-1]} go to at least {best.fits:,} tokens each."
    text = f"{fmt.plain(best.block)} goes {'furthest, ' if len(mixing) > 1 else ''}to "
    text += f"{'at least ' if open_ended else ''}{best.fits:,} tokens"
    if level:
        text += f", level with {', '.join(map(fmt.plain, level))}"
    if dense and not open_ended and dense.limit == "memory":
        text += f"; Dense to {dense.fits:,}"
    return text + "."


def limits_document(results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """Frontiers and rows as plain data. Lengths in tokens, memory in bytes, seconds."""
    return {
        "limits": [
            {
                "name": f.name,
                "block_name": f.block,
                "mode": f.mode,
                **{axis.name: axis.of(f.row) for axis in AXES if axis.name in DOCUMENTED},
                "longest": f.fits or None,
                "too_long": f.fails,
                "limit": f.limit,
                "too_long_was_tried": f.tried if f.fails else None,
                "finished": f.finished,
                "reason": f.said or None,
                "refused": list(f.refused),
                "memory_bytes": f.needed_bytes,
                "first_call_s": f.call_s,
                "peak_law": law_document(f.peak),
                "memory_law": law_document(f.total),
                "would_hold": [
                    {"memory_bytes": gib * fmt.GIB, "tokens": f.would_hold(gib * fmt.GIB), "extrapolated": True}
                    for gib in CARD_GIB
                ],
            }
            for f in frontiers(results)
        ],
        "results": [row.to_json() for row in results],
    }
