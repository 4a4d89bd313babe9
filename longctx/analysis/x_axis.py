"""What a picture is drawn over: length, or anything else that a sweep varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from longctx.analysis.settings import AXES, Axis, varying
from longctx.analysis.statistics import positive
from longctx.errors import UsageError, did_you_mean
from longctx.results import BenchmarkResult

FORMATS = ("fp16", "bf16", "fp32", "fp64")
"""Number formats in the order in which they stand on an axis."""


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """A positive number of every row that has it. title: what it is called below a picture."""

    name: str
    title: str
    value: Callable[[BenchmarkResult], float | None]
    categories: dict[float, str] | None = None
    """Position -> label, where the values are words."""

    def block_name(self, row: BenchmarkResult) -> str:
        """The block's name without the option that is this axis: rows that differ in it alone are one curve."""
        block, colon, options = str(row.block_name).partition(":")
        kept = [part for part in options.split(",") if part and part.partition("=")[0] != self.name]
        return block + (colon + ",".join(kept) if kept else "")


LENGTH = XAxis(name="length", title="tokens", value=lambda row: row.sequence_length)
_ALIASES = {"sequence_length": "length", "tokens": "length", "batch": "batch_size", "width": "d_model"}


def x_axis(word: str, rows: Iterable[BenchmarkResult]) -> XAxis:
    """The axis that is called `word`: length, a field of the configuration, or an option of a block in `rows`.

    Raises UsageError, with what these rows differ in.
    """
    rows = list(rows)
    name = word.strip().casefold().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name == LENGTH.name:
        return LENGTH
    axes = {axis.name: axis for axis in AXES if axis.name not in ("mode", "device")}
    if name in axes:
        return _of_axis(axes[name])
    options = {option for row in rows for option in _numbers(row)}
    known = sorted(options)
    if name in options:
        return _of_option(name)
    there = ["length", *(axis.name for axis in varying(rows) if axis.name in axes), *_varying_options(rows)]
    raise UsageError(
        f"--x cannot be {word!r}.{did_you_mean(name, ['length', *axes, *known])}",
        f"these rows differ in {', '.join(there)}",
    )


def natural_x(rows: Iterable[BenchmarkResult]) -> XAxis:
    """Length; in rows of one length the only other number in which they differ."""
    rows = list(rows)
    if len({row.sequence_length for row in rows}) > 1:
        return LENGTH
    found = [_of_axis(axis) for axis in varying(rows) if axis.name not in ("mode", "dtype", "device")]
    found += [_of_option(name) for name in _varying_options(rows)]
    return found[0] if len(found) == 1 else LENGTH


def _of_axis(axis: Axis) -> XAxis:
    if axis.name == "dtype":
        # Evenly spaced on the logarithmic axis that all pictures have.
        places = {name: 10.0**index for index, name in enumerate(FORMATS)}
        labels = {place: name for name, place in places.items()}
        return XAxis(name=axis.name, title=axis.header, value=lambda r: places.get(str(r.dtype)), categories=labels)
    return XAxis(name=axis.name, title=axis.header, value=lambda row: positive(axis.of(row)))


def _of_option(name: str) -> XAxis:
    return XAxis(name=name, title=name, value=lambda row: _numbers(row).get(name))


def _numbers(row: BenchmarkResult) -> dict[str, float]:
    options: dict[str, Any] = row.block_options if isinstance(row.block_options, dict) else {}
    return {str(name): found for name, value in options.items() if (found := positive(value)) is not None}


def _varying_options(rows: Iterable[BenchmarkResult]) -> list[str]:
    """Numeric options of which some block of `rows` has several values."""
    seen: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        for name, value in _numbers(row).items():
            seen.setdefault((str(row.block_name).partition(":")[0], name), set()).add(value)
    return list(dict.fromkeys(name for (_, name), values in seen.items() if len(values) > 1))
