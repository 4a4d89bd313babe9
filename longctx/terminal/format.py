"""Figures and names as text: the one place where seconds, bytes and tokens get their units.

Everything takes SI units (seconds, bytes, tokens per second) and answers with a string, `-` for a number that does
not exist. Names may come from files of strangers: `plain` takes away whatever a terminal could obey.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NONE = "-"
KIB, MIB, GIB = 1024.0, 1024.0**2, 1024.0**3


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit for a whole column: `size` of it in SI units."""

    name: str
    size: float

    def text(self, value: float | None) -> str:
        """`value` (SI) in this unit, without the unit's name."""
        return NONE if not _is_number(value) else number(value / self.size)


SECONDS = (Unit(name="s", size=1.0), Unit(name="ms", size=1e-3), Unit(name="us", size=1e-6))
BYTES = (Unit(name="GiB", size=GIB), Unit(name="MiB", size=MIB), Unit(name="KiB", size=KIB), Unit(name="B", size=1.0))
MEBIBYTES = BYTES[1]
RATES = (
    Unit(name="Gtok/s", size=1e9),
    Unit(name="Mtok/s", size=1e6),
    Unit(name="ktok/s", size=1e3),
    Unit(name="tok/s", size=1.0),
)

FLOP_RATES = (
    Unit(name="TFLOP/s", size=1e12),
    Unit(name="GFLOP/s", size=1e9),
    Unit(name="MFLOP/s", size=1e6),
    Unit(name="FLOP/s", size=1.0),
)
ENERGIES = (
    Unit(name="J/token", size=1.0),
    Unit(name="mJ/token", size=1e-3),
    Unit(name="uJ/token", size=1e-6),
    Unit(name="nJ/token", size=1e-9),
)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def column_unit(values: Iterable[float | None], units: Sequence[Unit] = SECONDS) -> Unit:
    """One unit for a column: the largest in which the smallest of `values` is at least a tenth."""
    smallest = min((v for v in values if _is_number(v) and v > 0), default=units[0].size)
    return next((unit for unit in units if smallest >= unit.size / 10), units[-1])


def number(value: float | None) -> str:
    """Three significant digits, all digits and grouped from 1000 on: `12,345`, `123`, `12.3`, `0.0123`."""
    if not _is_number(value):
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _with_unit(value: float | None, units: Sequence[Unit]) -> str:
    if not _is_number(value):
        return NONE
    unit = next((unit for unit in units if abs(value) >= unit.size), units[-1])
    return f"{number(value / unit.size)} {unit.name}"


def duration(seconds: float | None) -> str:
    """A measured time: `1.82 ms`, `950 us`, `2.10 s`."""
    return _with_unit(seconds, SECONDS)


def memory(size: float | None) -> str:
    """A number of bytes: `1.20 GiB`, `64.0 MiB`."""
    return _with_unit(size, BYTES)


def rate(tokens_per_s: float | None) -> str:
    """A throughput: `1.05 Mtok/s`."""
    return _with_unit(tokens_per_s, RATES)


def from_mib(mebibytes: float | None) -> float | None:
    """Bytes of a published `_mb` field."""
    return mebibytes * MIB if _is_number(mebibytes) else None


def clock(seconds: float | None) -> str:
    """A time that a person waits: `8 s`, `2 min 05 s`, `1 h 10 min`."""
    if not _is_number(seconds):
        return NONE
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def ratio(value: float | None) -> str:
    """A quotient of times: `0.62x`, and of what is small two digits, `0.013x`."""
    if not _is_number(value):
        return NONE
    if 0 < value < 0.095:
        return f"{value:#.2g}x"
    return f"{value:.2f}x" if value < 100 else f"{number(value)}x"


def ratio_range(low: float, high: float) -> str:
    """The ends between which a ratio lay: `0.61-0.64`."""
    return f"{ratio(low)[:-1]}-{ratio(high)[:-1]}"


def error(value: float | None) -> str:
    """A relative error: `1.2e-07`, `0` when it is none."""
    if not _is_number(value):
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def percent(share: float | None) -> str:
    """A share: `2.1%`; below a tenth of a percent, `0.1%`."""
    return NONE if not _is_number(share) else f"{max(0.1, share * 100):.1f}%"


def tokens(length: int) -> str:
    """A sequence length as people write it: `1K`, `64K`, `1M` (1024-based), or its digits if it is not whole."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size and length % size == 0:
            return f"{length // size}{letter}"
    return str(length)


def plain(text: object) -> str:
    """`text` as one line that no terminal can obey: no escapes, control, direction or surrogate characters."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(text))
    return " ".join(kept.split())


def shorten(text: str, width: int, *, ellipsis: str = "…") -> str:
    """`text` in at most `width` columns, cut in its middle so that both ends stay readable."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    room = width - cell_len(ellipsis)
    if room < 2:
        return set_cell_size(text, max(0, width)).rstrip()
    left = set_cell_size(text, room - room // 2).rstrip()
    right = text
    while cell_len(right) > room - cell_len(left):
        right = right[1:]
    return left + ellipsis + right


def listed(words: Iterable[object], width: int) -> str:
    """Words with commas, each whole; those for which `width` has no room are counted: `unstable, suspect +1`."""
    from rich.cells import cell_len

    words = [plain(word) for word in words]
    for count in range(len(words), 0, -1):
        text = ", ".join(words[:count]) + (f" +{len(words) - count}" if count < len(words) else "")
        if cell_len(text) <= width:
            return text
    return shorten(", ".join(words), width)


_OPTION = re.compile(r"(?<=[:,\s])\w+=(?=[^\s,])")


def short_names(names: Iterable[str], width: int, *, ellipsis: str = "…") -> dict[str, str]:
    """Each of `names` in at most `width` columns, no two of them alike.

    Where some would be alike, long ones lose what their options are called and keep the values: `DPASSM:128,64`. What
    that does not tell apart either is numbered.
    """
    from rich.cells import cell_len

    names = list(dict.fromkeys(names))
    short = {name: shorten(name, width, ellipsis=ellipsis) for name in names}
    # What fits whole may look as another one does when it is shortened, and stays as it is.
    long = [name for name in names if cell_len(name) > width]
    if _alike(short):
        short |= {name: shorten(_OPTION.sub("", name), width, ellipsis=ellipsis) for name in long}
    taken = set(short.values())
    for name in (name for name in _alike(short) if name in long):
        marks = (f"#{number}" for number in range(1, len(names) + 2))
        said = (shorten(name, max(1, width - len(mark)), ellipsis=ellipsis) + mark for mark in marks)
        short[name] = next((each for each in said if each not in taken), short[name])
        taken.add(short[name])
    return short


def _alike(short: dict[str, str]) -> list[str]:
    """The names whose short form is that of another one too."""
    counts = Counter(short.values())
    return [name for name, said in short.items() if counts[said] > 1]
