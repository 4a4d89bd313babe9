"""Which rows of two sides are the same cell: exactly where both say so, and where a side is silent, if only one fits.

A side is one file or several. Of two rows for a cell in one file the later one counts; rows of several files are put
together.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from longctx.analysis.statistics import positive
from longctx.results import MIB, BenchmarkResult

Runs = Mapping[str, Sequence[BenchmarkResult]]
"""path of a file -> its rows."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What makes a cell. None: the record does not tell. `options` and `device` are text."""

    name: str
    length: int
    batch_size: int
    mode: str
    dtype: str | None
    training_step: int | None
    options: str
    d_model: Any
    n_heads: Any
    num_kv_heads: Any
    layers: Any
    scope: Any
    device: str | None

    @classmethod
    def of(cls, result: BenchmarkResult) -> Traits:
        config = result.config if isinstance(result.config, dict) else {}
        shape = {name: _plain(config.get(name)) for name in ("d_model", "n_heads", "num_kv_heads")}
        if shape["num_kv_heads"] is None:
            shape["num_kv_heads"] = shape["n_heads"]
        options = result.block_options if isinstance(result.block_options, dict) else {}
        return cls(
            name=result.block_name,
            length=result.sequence_length,
            batch_size=result.batch_size,
            mode=result.mode,
            dtype=result.dtype,
            training_step=result.training_step,
            options=json.dumps(options, sort_keys=True, default=str),
            layers=_plain(config.get("layers", 1)),
            scope=_plain(config.get("scope", "block")),
            device=device_name(result),
            **shape,
        )


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value, default=str)


def device_name(result: BenchmarkResult) -> str | None:
    """The GPU or CPU that a row was measured on, None if the row does not tell."""
    environment = result.environment if isinstance(result.environment, dict) else {}
    name = environment.get("gpu") or environment.get("cpu") or environment.get("device_name")
    return str(name) if name else None


def device_kind(result: BenchmarkResult) -> str | None:
    """`cuda`, `cpu`, or None for a row that does not tell."""
    environment = result.environment if isinstance(result.environment, dict) else {}
    config = result.config if isinstance(result.config, dict) else {}
    if environment.get("gpu"):
        return "cuda"
    for word in (environment.get("device"), config.get("device")):
        kind = str(word).partition(":")[0]
        if kind in ("cpu", "cuda"):
            return kind
    return "cpu" if environment.get("cpu") else None


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One cell on one side: a row a file, with the file's path."""

    traits: Traits
    rows: tuple[BenchmarkResult, ...]
    paths: tuple[str, ...]

    @property
    def fault(self) -> BenchmarkResult | None:
        """The last row that is not ok: one of several files is enough for a cell to be in doubt."""
        return next((row for row in reversed(self.rows) if not row.ok), None)

    @property
    def ok(self) -> bool:
        return self.fault is None

    @property
    def status(self) -> str:
        return self.fault.status if self.fault else "ok"

    @property
    def rounds(self) -> list[float]:
        """The median of each round of every row, seconds."""
        return [value for row in self.rows for value in rounds_of(row)]

    @property
    def time_s(self) -> float | None:
        """Median of the round medians; of the rows' own figures where no rounds are recorded. Seconds."""
        values = self.rounds or [value for row in self.rows if (value := positive(row.time_s))]
        return statistics.median(values) if values else None

    @property
    def peaks_bytes(self) -> list[int]:
        """Peak memory of every row that has it, to the byte. MiB in the file are exact: they were whole bytes."""
        peaks = [row.peak_memory_mb for row in self.rows]
        return [round(peak * MIB) for peak in peaks if peak == 0 or positive(peak)]

    @property
    def warnings(self) -> list[str]:
        """The warnings of all rows, sorted."""
        return sorted({str(word) for row in self.rows if isinstance(row.warnings, list) for word in row.warnings})


def rounds_of(result: BenchmarkResult) -> list[float]:
    """The median of each round of a row that has one, seconds."""
    rounds = result.samples if isinstance(result.samples, list) else []
    usable = [[float(v) for v in values if positive(v)] for values in rounds if isinstance(values, list)]
    return [statistics.median(values) for values in usable if values]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One cell: what each side has of it. None: that side does not have it."""

    base: Pool | None
    new: Pool | None

    @property
    def traits(self) -> Traits:
        """The cell, as the new side names it, or else the base."""
        return (self.new or self.base).traits


def pair(base: Runs, new: Runs) -> list[Pair]:
    """Every cell of either side once, by length, in the order in which they were met.

    A cell is matched on the same device if it can be, else on any (the caller refuses that), and across number
    formats only when nothing else matches at all.
    """
    first, second = pools(base), pools(new)
    place = {id(pool): index for index, pool in enumerate([*first, *second])}
    found: list[Pair] = []
    _take_equal(found, first, second, lambda traits: traits)
    _take_equal(found, first, second, lambda traits: replace(traits, device=None))
    _take_compatible(found, first, second)
    if not found:
        _take_equal(found, first, second, lambda traits: replace(traits, device=None, dtype=None))
    found += [Pair(base=pool, new=None) for pool in first] + [Pair(base=None, new=pool) for pool in second]
    return sorted(found, key=lambda each: (each.traits.length, place[id(each.base or each.new)]))


def pools(runs: Runs) -> list[Pool]:
    """The cells of one side, in the order in which they were met."""
    cells: dict[Traits, dict[str, BenchmarkResult]] = {}
    for path, results in runs.items():
        for result in results:
            cells.setdefault(Traits.of(result), {})[path] = result
    found = []
    for traits, rows in cells.items():
        kept = _without_copies(rows)
        found.append(Pool(traits=traits, rows=tuple(kept.values()), paths=tuple(kept)))
    return found


def _without_copies(rows: Mapping[str, BenchmarkResult]) -> dict[str, BenchmarkResult]:
    """A row that was copied from one file to another is one measurement, not two."""
    kept: dict[str, BenchmarkResult] = {}
    for path, row in rows.items():
        # Rounds that are all alike (or none at all) say nothing of where they came from.
        telling = len(set(rounds_of(row))) > 1
        if not (telling and any(row.samples == other.samples for other in kept.values())):
            kept[path] = row
    return kept


def _take_equal(found: list[Pair], first: list[Pool], second: list[Pool], key: Callable[[Traits], Traits]) -> None:
    waiting: dict[Traits, list[Pool]] = {}
    for pool in second:
        waiting.setdefault(key(pool.traits), []).append(pool)
    taken: set[int] = set()
    for pool in first:
        partners = waiting.get(key(pool.traits))
        if partners:
            partner = partners.pop(0)
            found.append(Pair(base=pool, new=partner))
            taken |= {id(pool), id(partner)}
    _drop(first, taken)
    _drop(second, taken)


def _take_compatible(found: list[Pair], first: list[Pool], second: list[Pool]) -> None:
    """Match what is silent on a trait with the only one left that it could be."""
    groups: dict[tuple, tuple[list[Pool], list[Pool]]] = {}
    for index, side in enumerate((first, second)):
        for pool in side:
            traits = pool.traits
            group = groups.setdefault((traits.name, traits.length, traits.batch_size, traits.mode), ([], []))
            group[index].append(pool)
    taken: set[int] = set()
    for ours, theirs in groups.values():
        # One alone on each side leaves no doubt; among several nobody could say which was meant.
        if len(ours) == len(theirs) == 1 and _compatible(ours[0], theirs[0]):
            found.append(Pair(base=ours[0], new=theirs[0]))
            taken |= {id(ours[0]), id(theirs[0])}
    _drop(first, taken)
    _drop(second, taken)


def _drop(side: list[Pool], taken: set[int]) -> None:
    side[:] = [pool for pool in side if id(pool) not in taken]


def _compatible(ours: Pool, theirs: Pool) -> bool:
    return not [name for name in unlike(ours.traits, theirs.traits) if name not in ("device", "options")] and (
        ours.traits.options == theirs.traits.options or _silent(ours, theirs) or _silent(theirs, ours)
    )


def _silent(pool: Pool, other: Pool) -> bool:
    """Whether `pool` names only some of the options of `other`: an older record, or a block that never loaded."""
    some, all_ = json.loads(pool.traits.options), json.loads(other.traits.options)
    return (not some or not pool.ok) and all(name in all_ and all_[name] == some[name] for name in some)


def unlike(ours: Traits, theirs: Traits) -> list[str]:
    """The traits that both tell and in which they differ."""
    values = [(field.name, getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(Traits)]
    return [name for name, one, other in values if one is not None and other is not None and one != other]
