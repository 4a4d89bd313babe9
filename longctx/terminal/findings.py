"""What a run says, for people: growth, crossovers, best blocks and the summary, as text that fits any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx.analysis.best import Best
from longctx.analysis.conclusions import Conclusions, about, about_range, conclude_modes
from longctx.analysis.crossover import Crossover
from longctx.analysis.curves import Growth
from longctx.analysis.laws import Law
from longctx.analysis.unfinished import Unfinished
from longctx.results import BenchmarkResult
from longctx.terminal import format as fmt
from longctx.terminal.layout import Column, layout
from longctx.terminal.prose import broken

if TYPE_CHECKING:
    from rich.text import Text

GROWTH_HEAD = "Growth with length, y = floor + factor T^k (95% interval of k)"
CROSSING_HEAD = "Crossovers"
BEST_HEAD = "Best at each length"


def growth_table(found: Sequence[Growth], width: int, *, ascii_only: bool = False) -> Text:
    """Exponents of time and memory with intervals, the word for them, floor, lengths, and what is missing for a law."""
    from rich.text import Text

    if not found:
        return Text()
    memory = memory_name(found)
    columns = [
        Column(header="block", cells=[fmt.plain(g.curve.name) for g in found], right=False, flexible=True),
        Column(header="time k", cells=[exponent(g.time) for g in found]),
        Column(header="95%", cells=[interval(g.time) for g in found], keep=7),
        Column(header="time is", cells=[time_word(g) for g in found], keep=8, right=False),
        Column(header="floor", cells=[floor(g.time) for g in found], keep=3),
        Column(header=f"{memory} k", cells=[exponent(g.memory) for g in found], keep=6),
        Column(
            header=f"{memory} is", cells=[g.memory.word if g.memory else fmt.NONE for g in found], keep=2, right=False
        ),
        Column(header="fit", cells=[kind(g.time or g.memory) for g in found], keep=4, right=False),
        Column(header="lengths", cells=[span(g.time or g.memory) for g in found], keep=1, right=False),
    ]
    columns = [c for c in columns if c.keep is None or set(c.cells) != {fmt.NONE}]
    return layout(columns, width, ascii_only=ascii_only)


def exponent(law: Law | None) -> str:
    """`1.02`"""
    return f"{law.exponent:.2f}" if law else fmt.NONE


def interval(law: Law | None) -> str:
    """`0.98 to 1.06`"""
    if law is None or law.low is None or law.high is None:
        return fmt.NONE
    return f"{law.low:.2f} to {law.high:.2f}"


def floor(law: Law | None) -> str:
    """The part of the time that does not grow, `none` where the points show no such part."""
    if law is None or not law.is_law:
        return fmt.NONE
    return fmt.duration(law.floor) if law.floor else "none"


def kind(law: Law | None) -> str:
    """`law` or `local slope`"""
    return fmt.NONE if law is None else "law" if law.is_law else "local slope"


def span(law: Law | None) -> str:
    """`1K to 64K`"""
    return fmt.NONE if law is None else f"{fmt.tokens(law.shortest)} to {fmt.tokens(law.longest)}"


def time_word(growth: Growth) -> str:
    """linear, quadratic and so on, or why there is no exponent."""
    return growth.time.word if growth.time else growth.said or fmt.NONE


def memory_name(found: Sequence[Growth]) -> str:
    """What the memory of these curves is: in mode decode that of the state."""
    decoding = any(row.mode == "decode" for growth in found for row in growth.curve.rows.values())
    return "state" if decoding else "memory"


def advice_lines(found: Sequence[Growth]) -> list[str]:
    """One line for each set of lengths that would make laws: `add 16K to make it a law: BLADE, Dense`."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for growth in found:
        if growth.missing:
            groups.setdefault(growth.missing, []).append(fmt.shorten(fmt.plain(growth.curve.name), 40))
    lines = []
    for missing, names in groups.items():
        it = "it a law" if len(names) == 1 else "them laws"
        # Where it holds of every row of the table above, names would say nothing.
        who = "" if len(names) == len(found) > 1 else f": {', '.join(names)}"
        lines.append(f"add {', '.join(map(fmt.tokens, missing))} to make {it}{who}")
    return lines


def crossing_line(crossing: Crossover) -> str:
    """One crossover in words: `BLADE: faster than Dense from 13K on (95% 12K to 14K)`."""
    a, b = (fmt.shorten(fmt.plain(name), 40) for name in (crossing.a, crossing.b))
    if crossing.verdict == "none":
        return f"{a}: {crossing.reason} with {b}"
    span_ = _measured(crossing)
    if crossing.verdict == "level":
        return f"{a}: level with {b} at every length, {span_}"
    if crossing.verdict == "noisy":
        return f"{a}: too noisy to tell from {b} at any length, {span_}"
    if crossing.verdict == "below":
        text = f"{a}: always below {b}, {span_}"
        if crossing.untold:
            text = f"{a}: below {b} at {_places(crossing.told)}, too noisy to tell at {_places(crossing.untold)}"
    elif crossing.verdict == "above":
        text = f"{a}: never below {b} within {span_}"
        if crossing.untold:
            text = f"{a}: above {b} at {_places(crossing.told)}, too noisy to tell at {_places(crossing.untold)}"
        return text + (f"; beyond: {crossing.reason}" if crossing.reason else "")
    else:
        word = "faster" if crossing.faster_after else "slower"
        text = f"{a}: {word} than {b} from {about(crossing.at)} on"
        rounds = ", of one round" if crossing.one_round else ""
        text += rounds if crossing.low is None else f" (95% {about_range(crossing.low, crossing.high)}{rounds})"
        if crossing.extrapolated:
            text += f", extrapolated beyond {span_}"
        elif crossing.crossings > 1:
            text += f", the last of {crossing.crossings} crossings"
        if crossing.launch_bound:
            text += ", launch-bound up to there"
    return text


def _places(lengths: Sequence[int]) -> str:
    return ", ".join(map(fmt.tokens, lengths))


def _measured(crossing: Crossover) -> str:
    if crossing.shortest == crossing.longest:
        return f"at {fmt.tokens(crossing.shortest)}"
    return f"{fmt.tokens(crossing.shortest)} to {fmt.tokens(crossing.longest)}"


def best_heads(growths: Sequence[Growth]) -> dict[str, str]:
    """The attributes of `Best` under the words for what they are least in."""
    least = "smallest state" if memory_name(growths) == "state" else "least memory"
    return {"least time": "time", least: "memory", "least energy": "energy"}


def best_table(found: Sequence[Best], heads: Mapping[str, str], width: int, *, ascii_only: bool = False) -> Text:
    """Best block of each length by time, memory and energy, and the Pareto set of time and memory."""
    from rich.text import Text

    if not found:
        return Text()
    every = [name for b in found for name in (*b.time, *b.memory, *b.energy, *b.pareto)]
    short = fmt.short_names(map(fmt.plain, every), 24)
    columns = [
        Column(header="tokens", cells=[fmt.tokens(b.length) for b in found]),
        Column(header="setting", cells=[fmt.plain(b.setting) or fmt.NONE for b in found], right=False, flexible=True),
        *(
            Column(header=head, cells=[names(getattr(b, field), short) for b in found], right=False, flexible=True)
            for head, field in heads.items()
        ),
        Column(header="Pareto set", cells=[names(b.pareto, short, 6) for b in found], right=False, flexible=True),
    ]
    columns = [c for c in columns if set(c.cells) != {fmt.NONE}]
    flexible = [c for c in columns if c.flexible]
    fixed = sum(c.natural for c in columns if not c.flexible)
    if fixed + sum(c.natural for c in flexible) + 2 * (len(columns) - 1) > width:
        return lined((_best_line(b, short) for b in found), width, ascii_only=ascii_only)
    return layout(columns, width, ascii_only=ascii_only)


def _best_line(best: Best, short: Mapping[str, str]) -> str:
    """The same as one line, for screens that the table does not fit."""
    fields = {"time": best.time, "memory": best.memory, "energy": best.energy, "Pareto": best.pareto}
    head = fmt.tokens(best.length) + (f" ({fmt.plain(best.setting)})" if best.setting else "")
    return f"{head}: " + "; ".join(f"{name} {names(who, short, 6)}" for name, who in fields.items() if who)


def names(found: Sequence[str], short: Mapping[str, str], most: int = 3) -> str:
    """Up to `most` names as they are in `short`, the first the best: `Dense, BLADE +2`; `-` of none."""
    if not found:
        return fmt.NONE
    shown = ", ".join(short[fmt.plain(name)] for name in found[:most])
    return shown + (f" +{len(found) - most}" if len(found) > most else "")


def lined(lines: Iterable[str], width: int, *, ascii_only: bool) -> Text:
    """Lines broken at words into `width`, what goes on indented."""
    text = "\n".join(" ".join(line.split()) for line in lines if line.strip())
    return broken(text.encode("ascii", "replace").decode() if ascii_only else text, width, indent=2)


def summary_text(sentences: Sequence[str], width: int, *, ascii_only: bool = False) -> Text:
    """The sentences as one paragraph."""
    text = fmt.plain(" ".join(sentences))
    return broken(text.encode("ascii", "replace").decode() if ascii_only else text, width)


def sections(
    found: Conclusions,
    width: int,
    *,
    ascii_only: bool = False,
    mode: str = "",
    extra: Sequence[Crossover] | None = None,
) -> list[tuple[str, Text]]:
    """(title, body) of growth, crossovers and best blocks, those without content left out.

    mode: named in the titles. extra: crossovers asked for, in place of those against Dense.
    """
    crossings = found.crossovers if extra is None else extra
    growth = growth_table(found.growths, width, ascii_only=ascii_only)
    if advice := advice_lines(found.growths):
        growth.append("\n").append_text(lined(advice, width, ascii_only=ascii_only))
    parts = [
        (GROWTH_HEAD if width >= 70 else "Growth with length, T^k", growth),
        (CROSSING_HEAD, lined(map(crossing_line, crossings), width, ascii_only=ascii_only)),
        (BEST_HEAD, best_table(found.best, best_heads(found.growths), width, ascii_only=ascii_only)),
    ]
    tail = f", {fmt.plain(mode)}" if mode else ""
    return [(title + tail, body) for title, body in parts if body.plain.strip()]


def short_form(results: Sequence[BenchmarkResult], width: int, *, ascii_only: bool = False) -> Text:
    """What ends a sweep: exponents and crossovers where there are several lengths, and the summary in bold, for each
    mode by itself."""
    from rich.text import Text

    modes = conclude_modes(results)
    text = Text(no_wrap=True, overflow="ignore")
    for mode, found in modes.items():
        for title, body in sections(found, width, ascii_only=ascii_only, mode=mode if len(modes) > 1 else "")[:2]:
            if not title.startswith(BEST_HEAD):
                text.append(f"{title}\n", style="bold").append_text(body).append("\n\n")
    text.append_text(summary(modes, width, ascii_only=ascii_only))
    text.rstrip()
    return text


def summary(modes: Mapping[str, Conclusions], width: int, *, ascii_only: bool = False) -> Text:
    """The sentences on each mode in bold, a paragraph each, under its name where there are several."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    for mode, found in modes.items():
        if found.sentences:
            said = [f"{fmt.plain(mode).capitalize()}:"] if len(modes) > 1 else []
            text.append("\n" if text.plain else "")
            text.append_text(summary_text([*said, *found.sentences], width, ascii_only=ascii_only))
    text.stylize("bold")
    return text


def unfinished_lines(left: Iterable[Unfinished]) -> list[tuple[str, str]]:
    """(what is missing, the command that measures it) of each: `not complete: 6 of 9 cells not measured, at 4K, 8K`."""
    lines = []
    for each in left:
        if each.searches:
            words = f"not complete: {each.missing} of {each.cells} searches not finished"
            lines.append((words, fmt.plain(each.command or "")))
            continue
        rounds = f"{each.rounds} round{'' if each.rounds == 1 else 's'}"
        where = f", at {_places(each.lengths)}"
        said = [f"{each.missing} of {each.cells} cells not measured{where}"] if each.missing else []
        if each.short:
            count = f"{each.short} more" if said else f"{each.short} of {each.cells} cells"
            said.append(f"{count} in fewer than {rounds}{'' if said else where}")
        lines.append((f"not complete: {'; '.join(said)}", fmt.plain(each.command or "")))
    return lines


# -- documents -----------------------------------------------------------------------------------------------------


def law_document(law: Law | None) -> dict[str, Any] | None:
    """A law as plain data. Times in seconds, memory in bytes, lengths in tokens."""
    if law is None:
        return None
    return {
        "kind": "law" if law.is_law else "local slope",
        "exponent": law.exponent,
        "exponent_ci95": None if law.low is None else [law.low, law.high],
        "word": law.word,
        "floor": law.floor if law.is_law else None,
        "factor": law.factor,
        "lengths": [t for t, _ in law.points],
        "missing_lengths": list(law.missing),
    }


def findings_document(
    modes: Mapping[str, Conclusions], extra: Mapping[str, Sequence[Crossover]] | None = None
) -> dict[str, Any]:
    """Laws, crossovers, best blocks and summary of every mode as plain data. extra: as `sections`, by mode."""
    document: dict[str, Any] = {}
    for mode, found in modes.items():
        for name, entries in _mode_document(found, (extra or {}).get(mode)).items():
            marked = entries if name == "summary" else [{"mode": mode, **entry} for entry in entries]
            document.setdefault(name, []).extend(marked)
    return document


def _mode_document(found: Conclusions, extra: Sequence[Crossover] | None) -> dict[str, Any]:
    return {
        "laws": [
            {
                "name": g.curve.name,
                "block_name": g.curve.block,
                "time": law_document(g.time),
                "time_has_none_because": g.said or None,
                "missing_lengths": list(g.missing),
                "memory": law_document(g.memory),
            }
            for g in found.growths
        ],
        "crossovers": [
            {
                "a": c.a,
                "b": c.b,
                "verdict": c.verdict,
                "tokens": c.at,
                "tokens_ci95": None if c.low is None else [c.low, c.high],
                "a_is_faster_after": c.faster_after,
                "extrapolated": c.extrapolated,
                "range": [c.shortest, c.longest] if c.shortest else None,
                "crossings": c.crossings,
                "launch_bound": c.launch_bound,
                "one_round": c.one_round,
                "told_at": list(c.told),
                "not_told_at": list(c.untold),
                "reason": c.reason or None,
                "words": crossing_line(c),
            }
            for c in (found.crossovers if extra is None else extra)
        ],
        "best": [
            {
                "sequence_length": b.length,
                "setting": b.setting or None,
                "time": b.time,
                "memory": b.memory,
                "energy": b.energy,
                "pareto": b.pareto,
            }
            for b in found.best
        ],
        "summary": found.sentences,
    }
