"""A result and the file it lives in: schema, reading of older and foreign records, atomic saving.

Seconds, bytes and tokens, except the published `_mb` fields, which are MiB. Nothing here imports torch: results are
read on any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.errors import ResultsError

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "crashed", "timeout", "failed", "wrong", "impossible", "unsupported", "skipped")
WARNINGS = ("unstable", "suspect", "throttled", "launch_bound", "contended", "memory_grows", "mixes_batch")


@dataclass(kw_only=True)
class BenchmarkResult:
    """One row: a cell and what was measured of it. A number that does not exist is None, never 0 or NaN.

    The first group holds the published fields, in their published order. The `forward_time_*` fields are seconds a
    call, whatever the mode's call is.
    """

    block_name: str
    sequence_length: int
    batch_size: int = 1
    forward_time_mean: float | None = None
    """Mean over rounds of the mean of each round's samples."""
    forward_time_std: float | None = None
    forward_time_min: float | None = None
    forward_time_max: float | None = None
    peak_memory_mb: float | None = None
    """Highest level during the call above the level just before it, MiB."""
    allocated_memory_mb: float | None = None
    """Live after the call, weights, input and output included, MiB."""
    reserved_memory_mb: float | None = None
    """Held by the caching allocator, MiB; None on a CPU."""
    throughput_tokens_per_sec: float | None = None
    """Tokens of a call (B * T, in mode decode B) over forward_time_mean."""
    memory_efficiency_mb_per_token: float | None = None
    """allocated_memory_mb over B * T."""
    config: dict[str, Any] = field(default_factory=dict)

    schema_version: int = SCHEMA_VERSION
    key: str | None = None
    source_hash: str | None = None
    status: str = "ok"
    warnings: list[str] = field(default_factory=list)
    mode: str = "forward"
    dtype: str | None = None
    training_step: int | None = None
    """Optimizer steps that had been made, of a row that was measured while a model was trained."""
    block_target: str | None = None
    block_options: dict[str, Any] = field(default_factory=dict)
    forward_time_median: float | None = None
    """Median over rounds of the median of each round's samples: the value that tables show."""
    forward_time_ci95: list[float] | None = None
    """[low, high] around forward_time_median, seconds; None under six samples. Of one round 95% of its median, of six
    and more 95% of the rounds' medians, of fewer rounds from the lowest end of one's interval to the highest."""
    samples: list[list[float]] = field(default_factory=list)
    """Seconds, one list a round. Nothing is trimmed."""
    first_call_s: float | None = None
    """The first call at the cell's shape: it compiles, loads and allocates."""
    host_time_median: float | None = None
    """CUDA: median over rounds of the seconds that the host takes to enqueue a call."""
    host_times: list[float] = field(default_factory=list)
    """The same, one a round."""
    forward_part_s: float | None = None
    """Mode train: seconds of the forward pass and the loss, out of forward_time_median."""
    backward_part_s: float | None = None
    """Mode train: seconds of the backward pass, out of forward_time_median."""
    forward_shares: list[float] = field(default_factory=list)
    """Mode train: the first part's share of a step, 0 to 1, one a round."""
    gate_s: float | None = None
    """Seconds of the check, without that first call."""
    flops: float | None = None
    """What a call must compute, by the block's cost model."""
    bytes: float | None = None
    """What a call must move, by the block's cost model."""
    state_bytes: float | None = None
    """Of the state after T tokens: in modes decode and prefill counted from its tensors, else by the cost model."""
    tflops: float | None = None
    """flops over forward_time_median, 1e12 a second."""
    roofline_fraction: float | None = None
    """Least possible time at this machine's measured peaks over forward_time_median."""
    joules_per_token: float | None = None
    """Of the whole GPU, idle power included; None where its driver tells no energy."""
    peak_bytes_per_token: float | None = None
    """peak_memory_mb in bytes over the tokens of a call."""
    total_memory_mb: float | None = None
    """Highest level during the call, weights, gradients, input and output included: what a device must hold, MiB."""
    gate: dict[str, Any] | None = None
    """{error, tolerance, passed, reason}: the check against the reference."""
    lightning: dict[str, Any] | None = None
    """Mode lightning: {bare_samples, bare_step_s, overhead_share, data_share, first_loss, last_loss, parameters,
    precision, version}. bare: the same step in a plain loop; overhead_share: what Lightning adds, of its own step."""
    path: str | None = None
    """The implementation that ran, in words."""
    error: dict[str, Any] | None = None
    """{type, message, log_tail}"""
    environment: dict[str, Any] = field(default_factory=dict)
    command: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the status is `ok`; warnings do not count."""
        return self.status == "ok"

    @property
    def time_s(self) -> float | None:
        """The figure to show and rank by: the median, or the mean of a record that has no median. Seconds."""
        return self.forward_time_median if self.forward_time_median is not None else self.forward_time_mean

    def to_json(self) -> dict[str, Any]:
        """All fields as plain data, published ones first; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BenchmarkResult:
        """A result from a record of any origin: unknown fields dropped, text made plain, absurd numbers None."""
        values = {f.name: _CLEAN[f.type](record[f.name]) for f in dataclasses.fields(cls) if f.name in record}
        # What the record leaves out, or gets wrong where None is not allowed, takes the default.
        return cls(**{name: value for name, value in values.items() if value is not None or name in _NULLABLE})


MIB = 1 << 20
MAX_FILE_BYTES = 1 << 30
MAX_TEXT = 4096

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def plain_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text` without terminal escapes, control or direction-changing characters, and no longer than `limit`."""
    text = _CONTROL.sub("?", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_results(path: str | os.PathLike[str]) -> list[BenchmarkResult]:
    """The results in a file, ours or any array of records with the published fields. Nothing read is executed.

    Text is made harmless for a terminal, and numbers that no measurement gives become None. Raises ResultsError, and
    leaves the file as it is, when it is not such an array.
    """
    return [BenchmarkResult.from_json(record) for record in read_records(path)]


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The raw records of a results file, checked for form. Raises ResultsError."""
    name = plain_text(os.fspath(path))
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ResultsError(f"{name} is larger than a results file can be", "name the file that a sweep wrote")
        with open(path, encoding="utf-8-sig") as file:
            records = json.load(file, parse_constant=lambda _: None, parse_float=_finite)
    except FileNotFoundError:
        raise ResultsError(f"there is no file {name}", "`longctx sweep` writes one; name its path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise ResultsError(
            f"{name} is not a results file: {plain_text(str(error), 200)}", "the file was left as it is"
        ) from None
    if not isinstance(records, list):
        raise ResultsError(f"{name} is not a results file: it holds no JSON array", "the file was left as it is")
    for index, record in enumerate(records):
        reason = _why_not_a_record(record)
        if reason:
            raise ResultsError(
                f"{name} is not a results file: record {index + 1} {reason}", "the file was left as it is"
            )
    return records


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _why_not_a_record(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "is no object"
    if not isinstance(record.get("block_name"), str):
        return "has no block_name"
    length = record.get("sequence_length")
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 1 << 50:
        return "has no sequence_length"
    return None


# -- reading values that a stranger wrote -------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number that is not negative, as all measured figures are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        if math.isfinite(value) and 0 <= value < 1e30:
            return value
    return None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) and number < 1 << 62 else None


def _text(value: Any) -> str | None:
    return plain_text(value) if isinstance(value, str) else None


def _texts(value: Any) -> list[str] | None:
    return [plain_text(v, 200) for v in value if isinstance(v, str)][:100] if isinstance(value, list) else None


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list):
        return None
    numbers = [_number(v) for v in value]
    return numbers if all(n is not None for n in numbers) else None


def _rounds(value: Any) -> list[list[float]] | None:
    if not isinstance(value, list):
        return None
    rounds = [_numbers(v) for v in value]
    return [[n for n in numbers if n > 0] for numbers in rounds if numbers]


def _plain_data(value: Any, depth: int = 0) -> Any:
    """Nested data with plain text, finite numbers and a bounded depth."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict) and depth < 8:
        return {plain_text(str(k), 200): _plain_data(v, depth + 1) for k, v in list(value.items())[:1000]}
    if isinstance(value, list) and depth < 8:
        return [_plain_data(v, depth + 1) for v in value[:1000]]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        with contextlib.suppress(OverflowError):
            return value if math.isfinite(value) and abs(value) < 1e30 else None
    return None


def _object(value: Any) -> dict[str, Any] | None:
    return _plain_data(value) if isinstance(value, dict) else None


_CLEAN = {
    "int": _count,
    "int | None": _count,
    "float | None": _number,
    "str": _text,
    "str | None": _text,
    "list[str]": _texts,
    "list[float]": lambda value: _numbers(value) or [],
    "list[float] | None": _numbers,
    "list[list[float]]": _rounds,
    "dict[str, Any]": _object,
    "dict[str, Any] | None": _object,
}
_NULLABLE = {f.name for f in dataclasses.fields(BenchmarkResult) if "None" in f.type}


# -- the file -----------------------------------------------------------------------------------------------------


class ResultsFile:
    """The file that a sweep saves to: a JSON array that is valid at every moment.

    kept: records that stand in the file already. Those of other cells stay as they are, in front.
    """

    def __init__(self, path: Path, kept: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self.kept = list(kept)

    @classmethod
    def open(cls, path: Path, *, resume: bool, force: bool) -> tuple[ResultsFile, list[BenchmarkResult]]:
        """The file at `path`, and the results in it that have a key, when `resume` asks for them.

        Proves that the folder can be written by writing there. Raises ResultsError: a folder that cannot be written, a
        file that exists without `resume` or `force`, one that is damaged.
        """
        prove_writable(path.parent)
        if path.is_dir():
            raise ResultsError(f"{path} is a folder", "name a file with --output-file")
        if not path.exists() or (force and not resume):
            return cls(path), []
        if not resume:
            raise ResultsError(
                f"{path} exists",
                "--resume measures what is missing in it, --force begins it anew, --output-file names another",
            )
        records = read_records(path)
        return cls(path, records), [BenchmarkResult.from_json(r) for r in records if isinstance(r.get("key"), str)]

    def save(self, results: Iterable[BenchmarkResult]) -> None:
        """Replace the file by what it held of others and `results`. Raises ResultsError; the old file then stays."""
        rows = [jsonable(result.to_json()) for result in results]
        mine = {(row["key"], row["block_name"]): row for row in rows}
        records = []
        for record in self.kept:
            # A stranger's key may be of any type, a list too.
            again = mine.get((record["key"], record["block_name"])) if isinstance(record.get("key"), str) else None
            if again is None:
                records.append(record)
            elif again["samples"] == record.get("samples") and again["status"] == record.get("status"):
                # Taken over, not measured anew: what a newer version has to say of it still holds.
                again |= {name: value for name, value in record.items() if name not in again}
        records += rows
        text = json.dumps(records, indent=1, allow_nan=False, default=str)
        try:
            write_atomically(self.path, text + "\n")
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else (error.strerror or str(error))
            raise ResultsError(
                f"cannot save to {self.path}: {why}",
                "what was saved before stands in that file; make room and go on with --resume",
            ) from error


def jsonable(value: Any) -> Any:
    """`value` with None in the place of numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, sync it and rename it into place: a reader sees the old file or the new one."""
    # A link stays a link: what it points to is replaced.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def prove_writable(folder: Path) -> None:
    """Raises ResultsError unless a file can be made in `folder`, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise ResultsError(
            f"cannot write results to {folder}: {error.strerror or error}", "choose another folder with --results-dir"
        ) from None


def last_results_path(results_dir: str | os.PathLike[str]) -> Path | None:
    """The results file of a sweep in `results_dir` that was written last, or None."""
    with contextlib.suppress(OSError):
        # What `longctx limits` finds is no sweep.
        found = [path for path in Path(results_dir).glob("*.json") if not path.name.startswith((".", "limits-"))]
        files = [path for path in found if path.is_file()]
        return max(files, key=lambda path: path.stat().st_mtime, default=None)
    return None
