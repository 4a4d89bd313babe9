"""Two sides, cell by cell: faster, slower, the same, or not to be told, and which memory grew.

A side is one results file or several whose rounds are put together. A ratio is new time / base time: above 1 is
slower. Rounds of one run agree better than runs do, so a verdict asks for more than an interval that misses 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longctx.analysis.differences import Difference, differences
from longctx.analysis.matching import Pair, Pool, Runs, Traits, device_kind, pair, unlike
from longctx.analysis.shift import Shift, shift_between
from longctx.analysis.summary import reason as reason_of
from longctx.errors import LongctxError, UsageError

FEWEST_ROUNDS = 5
"""On either side; of fewer, too many orders come about by chance."""

GUARD = {"cuda": 0.02, "cpu": 0.05}
"""Shifts that are not worth a word, by kind of device."""

CLEAR_DEVIATIONS, CLEAR_SHIFT = 4.5, 0.2
"""Standard deviations between rounds that a shift must have beyond half the guard, and the shift that is enough.

A run lasts minutes and another is made on another day: what rounds differ by is the least that two runs of the same
code do. By simulation (5 rounds a side, 3% between rounds), runs that drifted 4% apart then get a false verdict in at
most 0.4% of cells; without these two figures, in 6 to 8%."""

MEMORY_GUARD_SHARE, MEMORY_GUARD_BYTES = 0.01, 2 << 20
"""On a CPU a reading counts pages of the whole process; on CUDA it counts what was asked for, to the byte."""

MORE, LESS, SAME, VARIES = "more", "less", "same", "varies"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of both sides in bytes (median over files), and `more`, `less`, `same`, or `varies`: the files of
    one side disagree by more than the sides do."""

    base_bytes: float
    new_bytes: float
    word: str


_BEYOND = "the interval reaches beyond the guard"


@dataclass(frozen=True, kw_only=True)
class CellComparison:
    """One cell of both sides.

    verdict: faster, slower, same, inconclusive; only-in-base, only-in-new; `not ok` when either side has no figure.
    reason: why it is no other, in words; may be empty. guard: the share of the ratio that was taken for nothing.
    shift: None where a side has no time.
    """

    traits: Traits
    base: Pool | None
    new: Pool | None
    verdict: str
    reason: str
    guard: float | None = None
    shift: Shift | None = None
    memory: Memory | None = None
    unexplained: bool = False
    """Whether nothing that was recorded differs, and the code was: a shift is then more likely the machine's."""

    @property
    def no_longer_ok(self) -> bool:
        return bool(self.base and self.new and self.base.ok and not self.new.ok)

    @property
    def ok_again(self) -> bool:
        return bool(self.base and self.new and not self.base.ok and self.new.ok)

    @property
    def regression(self) -> bool:
        """Slower, no longer ok, or more memory."""
        return self.verdict == "slower" or self.no_longer_ok or bool(self.memory and self.memory.word == MORE)

    @property
    def more_rounds_help(self) -> bool:
        """Whether more rounds may settle it: they do not take away what two runs of one code differ by."""
        few = any(pool is None or len(pool.rounds) < FEWEST_ROUNDS for pool in (self.base, self.new))
        return few or self.reason.startswith(_BEYOND)

    @property
    def warnings(self) -> list[str]:
        """The warnings of either side, sorted."""
        return sorted({word for pool in (self.base, self.new) if pool for word in pool.warnings})


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that `compare` finds. base, new: the paths of the files."""

    base: tuple[str, ...]
    new: tuple[str, ...]
    cells: tuple[CellComparison, ...]
    differences: tuple[Difference, ...]

    def count(self, verdict: str) -> int:
        """How many cells have this verdict."""
        return sum(cell.verdict == verdict for cell in self.cells)

    @property
    def regressions(self) -> list[CellComparison]:
        return [cell for cell in self.cells if cell.regression]

    @property
    def undecided(self) -> list[CellComparison]:
        """The cells of which nothing can be said: inconclusive, or in the base alone."""
        return [cell for cell in self.cells if cell.verdict in ("inconclusive", "only-in-base")]

    @property
    def sentence(self) -> str:
        """`2 of 12 cells are slower, 1 faster, 8 the same, 1 inconclusive`; what grew and what is missing after it."""
        common = [cell for cell in self.cells if cell.base and cell.new]
        lost, back = sum(c.no_longer_ok for c in common), sum(c.ok_again for c in common)
        counts = {
            "slower": self.count("slower"),
            "faster": self.count("faster"),
            "the same": self.count("same"),
            "inconclusive": self.count("inconclusive"),
            "no longer ok": lost,
            "ok again": back,
            "ok on neither side": self.count("not ok") - lost - back,
        }
        said = [(number, word) for word, number in counts.items() if number]
        words = [f"{number} {word}" for number, word in said]
        if words:
            number, word = said[0]
            words[0] = f"{number} of {len(common)} cells {'is' if number == 1 else 'are'} {word}"
        else:
            words = ["no cell is in both"]
        memory = [cell.memory.word for cell in common if cell.memory]
        if grown := memory.count(MORE):
            words.append(f"{grown} {'takes' if grown == 1 else 'take'} more memory")
        if shrunk := memory.count(LESS):
            words.append(f"{shrunk} {'takes' if shrunk == 1 else 'take'} less memory")
        words += [f"{number} only in {side}" for side in ("base", "new") if (number := self.count(f"only-in-{side}"))]
        return ", ".join(words)


def compare(base: Runs, new: Runs, *, guard: float | None = None, allow_different: bool = False) -> Comparison:
    """Compare two sides: path of a file -> its rows.

    guard: the share below which a shift is none; None is 2% on a GPU and 5% on a CPU. Raises UsageError for a guard
    that is no share, and LongctxError when the sides have no cell in common or were measured in ways that leave
    nothing to compare (device, dtype, threads, TF32), unless `allow_different`.
    """
    if guard is not None and not 0 <= guard <= 1:
        raise UsageError(f"a guard of {guard * 100:g}% cannot be used", "it is a number of percent from 0 to 100")
    guards = GUARD if guard is None else dict.fromkeys(GUARD, guard)
    pairs = pair(base, new)
    found = differences(pairs)
    if not allow_different:
        _refuse(pairs, found)
    alone: dict[tuple, list[Pair]] = {}
    for each in pairs:
        if not (each.base and each.new):
            alone.setdefault((each.traits.name, each.traits.length), []).append(each)
    return Comparison(
        base=tuple(base),
        new=tuple(new),
        cells=tuple(_compare_cell(each, alone, guards) for each in pairs),
        differences=tuple(found),
    )


def _refuse(pairs: Sequence[Pair], found: Iterable[Difference]) -> None:
    fatal = [f"{each.name} {each.base} in base, {each.new} in new" for each in found if each.fatal]
    if fatal:
        raise LongctxError(
            "these runs were not measured in the same way: " + "; ".join(fatal),
            "--allow-different compares them all the same",
        )
    if any(each.base and each.new for each in pairs):
        return
    raise LongctxError(
        "the two sides have no cell in common" + "".join(f"; {line}" for line in _disjoint(pairs)),
        "a cell is block, options, length, batch, mode, dtype and model shape; --allow-different lists what there is",
    )


def _disjoint(pairs: Sequence[Pair]) -> list[str]:
    """The traits of which the sides share no value, with a few values of each."""
    lines = []
    for name in (field.name for field in dataclasses.fields(Traits)):
        sides = []
        for pools in ([each.base for each in pairs if each.base], [each.new for each in pairs if each.new]):
            values = (getattr(pool.traits, name) for pool in pools)
            sides.append(list(dict.fromkeys(str(value) for value in values if value is not None)))
        base, new = sides
        if base and new and not set(base) & set(new):
            shown = [", ".join(side[:4]) + (", ..." if len(side) > 4 else "") for side in sides]
            word = "block" if name == "name" else name.replace("_", " ")
            lines.append(f"{word} {shown[0]} in base, {shown[1]} in new")
            if name == "name":
                # Other blocks have other options.
                return lines
    return lines


def _compare_cell(each: Pair, alone: Mapping[tuple, Sequence[Pair]], guards: dict[str, float]) -> CellComparison:
    base, new = each.base, each.new
    made = functools.partial(CellComparison, traits=each.traits, base=base, new=new)
    if base is None or new is None:
        side = "new" if base is None else "base"
        return made(verdict=f"only-in-{side}", reason=_nearly(each, alone))
    on_gpu = {device_kind(row) for pool in (base, new) for row in pool.rows} - {None} == {"cuda"}
    if fault := new.fault or base.fault:
        return made(verdict="not ok", reason=reason_of(fault))
    guard = guards["cuda" if on_gpu else "cpu"]
    shift, verdict, reason = judge(base, new, guard)
    hashes = {row.source_hash for pool in (base, new) for row in pool.rows}
    return made(
        verdict=verdict,
        reason=reason,
        guard=guard,
        shift=shift,
        memory=compare_memory(base.peaks_bytes, new.peaks_bytes, exact=on_gpu),
        unexplained=len(hashes) == 1 and None not in hashes and not differences([each]),
    )


def _nearly(each: Pair, alone: Mapping[tuple, Sequence[Pair]]) -> str:
    """What keeps a cell of one side from being one of the other: its options changed, for example."""
    for other in alone[each.traits.name, each.traits.length]:
        names = unlike(each.traits, other.traits) if bool(other.base) != bool(each.base) else []
        if names:
            return f"the other side has it with other {' and '.join(name.replace('_', ' ') for name in names)}"
    return ""


# -- the verdict ---------------------------------------------------------------------------------------------------


def judge(base: Pool, new: Pool, guard: float) -> tuple[Shift | None, str, str]:
    """(shift, verdict, reason) of a cell that is ok on both sides. guard: the share below which a shift is none."""
    ours, theirs = base.rounds, new.rounds
    shift = shift_between(ours, theirs)
    if shift is None:
        times = base.time_s, new.time_s
        if all(times):
            shift = Shift(ratio=times[1] / times[0], low=None, high=None, confidence=None)
        return shift, "inconclusive", f"no rounds are recorded in {'base' if not ours else 'new'}"
    if min(len(ours), len(theirs)) < FEWEST_ROUNDS:
        counts = f"{len(ours)} {_rounds(len(ours))} in base, {len(theirs)} in new"
        return shift, "inconclusive", f"{counts}; at least {FEWEST_ROUNDS} are needed on each side"
    if 1 / (1 + guard) <= shift.low and shift.high <= 1 + guard:
        return shift, "same", ""
    why = _why_not_shifted(ours, theirs, shift.ratio, guard)
    if why:
        return shift, "inconclusive", why
    return shift, "slower" if shift.ratio > 1 else "faster", ""


def _why_not_shifted(base: Sequence[float], new: Sequence[float], ratio: float, guard: float) -> str:
    """Why `ratio` is no proof of a shift, or nothing if it is. Logarithms are weighed: twice is as far as half."""
    size = abs(math.log(ratio))
    if size <= math.log1p(guard):
        return f"{_BEYOND} of {guard * 100:g}%"
    if max(base) >= min(new) and max(new) >= min(base):
        return "rounds of one side lie among those of the other"
    spreads = [math.log(max(side) / min(side)) for side in (base, new)]
    logs = [[math.log(value) for value in side] for side in (base, new)]
    deviation = math.sqrt(statistics.fmean(statistics.variance(side) for side in logs))
    if size <= max(spreads):
        return f"rounds of one side lie {math.expm1(max(spreads)) * 100:.0f}% apart, more than the shift"
    if size <= min(math.log1p(guard) / 2 + CLEAR_DEVIATIONS * deviation, math.log1p(CLEAR_SHIFT)):
        return "the shift is not clear of what two runs of the same code may differ by"
    return ""


def _rounds(count: int) -> str:
    return "round" if count == 1 else "rounds"


def compare_memory(base: Sequence[int], new: Sequence[int], *, exact: bool) -> Memory | None:
    """Which side takes more, from the peaks (bytes) of its files; `exact` (CUDA) to the byte. None without a peak."""
    if not base or not new:
        return None
    middle = statistics.median(base), statistics.median(new)
    guard = 0 if exact else max(MEMORY_GUARD_BYTES, MEMORY_GUARD_SHARE * middle[0])
    word = VARIES
    if max(*base, *new) - min(*base, *new) <= guard or abs(middle[1] - middle[0]) <= guard:
        word = SAME
    elif min(new) - max(base) > guard:
        word = MORE
    elif min(base) - max(new) > guard:
        word = LESS
    return Memory(base_bytes=middle[0], new_bytes=middle[1], word=word)
