"""What rows share apart from block and length, and the words for it: mode, format, shape, batch, device.

Rows that differ in any of it are never compared, ranked or fitted together.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.config import MODES, Cell
from longctx.results import BenchmarkResult


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One trait. name: as in the configuration. header: of a table's column. figure: its value there. mark: before its
    value in the name of a curve. words: the same in a sentence."""

    name: str
    header: str
    mark: str = ""
    words: str = "{}"
    figure: str = "{}"

    def of(self, thing: BenchmarkResult | Cell) -> Any:
        """The value of a row or a cell: a number or text, None where it is not known."""
        if isinstance(thing, Cell):
            value = getattr(thing, self.name, None)
            heads = thing.n_heads
        else:
            config = thing.config if isinstance(thing.config, dict) else {}
            value, heads = _of_row(thing, config, self.name), config.get("n_heads")
        if self.name == "num_kv_heads" and value is None:
            value = heads
        return value if value is None or isinstance(value, int | float | str) else json.dumps(value, default=str)

    def text(self, thing: BenchmarkResult | Cell) -> str:
        """Its value in a sentence: `batch 4`."""
        value = self.of(thing)
        if value is None:
            return f"{self.header} not recorded"
        said = self.words.format(value)
        return said.removesuffix("s") if value == 1 else said


def _of_row(row: BenchmarkResult, config: dict[str, Any], name: str) -> Any:
    if name == "device":
        environment = row.environment if isinstance(row.environment, dict) else {}
        return environment.get("gpu") or environment.get("cpu") or config.get("device")
    if name == "layers":
        return config.get("layers", 1)
    return getattr(row, name) if name in ("mode", "dtype", "batch_size", "training_step") else config.get(name)


AXES = (
    Axis(name="mode", header="mode"),
    Axis(name="dtype", header="dtype"),
    Axis(name="d_model", header="width", mark="D=", words="width {}"),
    Axis(name="n_heads", header="heads", mark="H=", words="{} heads"),
    Axis(name="num_kv_heads", header="kv heads", mark="G=", words="{} key-value heads"),
    Axis(name="layers", header="layers", mark="L=", words="{} layers"),
    Axis(name="batch_size", header="batch", mark="B=", words="batch {}"),
    Axis(name="training_step", header="step", mark="step=", words="step {:,}", figure="{:,}"),
    Axis(name="device", header="device"),
)


def setting(row: BenchmarkResult) -> tuple:
    """What two rows of one length must share to be compared."""
    return tuple(axis.of(row) for axis in AXES)


def varying(things: Iterable[BenchmarkResult | Cell], *, unknown: bool = True) -> list[Axis]:
    """The axes along which `things` differ. unknown: a value that is not known differs from one that is, but for rows
    that failed before it was."""
    things = list(things)

    def values(axis: Axis) -> set[Any]:
        return {value for thing in things if (value := axis.of(thing)) is not None or (unknown and _is_whole(thing))}

    found = [axis for axis in AXES if len(values(axis)) > 1]
    # As many key-value heads as heads is no trait of its own.
    grouped = any(_KV.of(thing) != _HEADS.of(thing) for thing in things)
    return [axis for axis in found if axis is not _KV or grouped]


def _is_whole(thing: BenchmarkResult | Cell) -> bool:
    return isinstance(thing, Cell) or thing.ok


_HEADS, _KV = (next(axis for axis in AXES if axis.name == name) for name in ("n_heads", "num_kv_heads"))


def in_words(thing: BenchmarkResult | Cell, axes: Iterable[Axis]) -> str:
    """`train, bf16, batch 4`"""
    return ", ".join(axis.text(thing) for axis in axes)


def by_mode(rows: Iterable[BenchmarkResult]) -> dict[str, list[BenchmarkResult]]:
    """The rows of each mode, forward first: times of two modes have nothing to say to each other."""
    found: dict[str, list[BenchmarkResult]] = {}
    for row in rows:
        found.setdefault(str(row.mode), []).append(row)
    return {mode: found[mode] for mode in sorted(found, key=lambda m: MODES.index(m) if m in MODES else len(MODES))}


def differing_options(rows: Sequence[BenchmarkResult]) -> dict[str, list[str]]:
    """block_name -> options in which its rows differ, though their name does not tell: rows of several runs."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for name, value in options_of(row).items():
            seen.setdefault(str(row.block_name), {}).setdefault(name, set()).add(value)
    found = {block: [name for name, values in names.items() if len(values) > 1] for block, names in seen.items()}
    return {block: names for block, names in found.items() if names}


def options_of(row: BenchmarkResult) -> dict[str, str]:
    """The options of a row's block as text, by name."""
    options = row.block_options if isinstance(row.block_options, dict) else {}
    return {str(name): json.dumps(options[name], default=str) for name in sorted(options, key=str)}


def class_of(row: BenchmarkResult) -> str | None:
    """The class of a module that was measured in a model, where its name is the place there; else None."""
    config = row.config if isinstance(row.config, dict) else {}
    found = config.get("module_class")
    return found if isinstance(found, str) else None


def without(axes: Iterable[Axis], names: Collection[str]) -> list[Axis]:
    """`axes` but for those called so."""
    return [axis for axis in axes if axis.name not in names]
