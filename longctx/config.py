"""What is to be measured: block requests, the benchmark's configuration, and one cell of the sweep.

Plain data, standard library only: read by the command line, the supervisor and the worker alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longctx.errors import UsageError, did_you_mean

DTYPES = ("fp32", "bf16", "fp16", "fp64")
MODES = ("forward", "train", "decode", "prefill")
LIGHTNING = "lightning"
"""The mode of cells and rows of --lightning-mode: a whole training step, as Lightning's Trainer runs it."""

PROTOCOL_VERSION = 5
"""Raised when the way a number is made changes, so that old and new figures are never mixed by --resume."""

MAX_LENGTH = 1 << 30
DEFAULT_RUNS = 10
AGAINST_ROUNDS = 5
"""Rounds of a sweep with --against: fewer cannot tell one side from the other."""


@dataclass(frozen=True, kw_only=True)
class BlockRequest:
    """A block and the options that its user asked for: one row of a sweep.

    `target` is a label (`BLADE`), `package.module:Name` or `path/to/file.py:Name`.
    """

    target: str
    options: tuple[tuple[str, Any], ...] = ()
    label: str | None = None
    """A name to show in the place of the short one, where two rows would else have the same."""

    @classmethod
    def parse(cls, text: str) -> BlockRequest:
        """Read `NAME`, `NAME:option=value,option=value` or `path.py:Name:option=value`. Raises UsageError."""
        found = cls.parse_all(text)
        if len(found) > 1:
            raise UsageError(
                f"cannot read {text!r} as one block: it has several values of an option",
                "options are written NAME:option=value,option=value",
            )
        return found[0]

    @classmethod
    def parse_all(cls, text: str) -> list[BlockRequest]:
        """The same, where an option may have several values: `NAME:a=1,2,b=3` is `NAME:a=1,b=3` and `NAME:a=2,b=3`."""
        head, _, tail = text.strip().rpartition(":")
        if "=" not in tail:
            head, tail = text.strip(), ""
        if not head.strip(":"):
            raise UsageError(f"no block is named in {text!r}", "write --blocks BLADE DPASSM")
        options: dict[str, list[Any]] = {}
        name = ""
        for part in filter(None, tail.split(",")):
            first, equals, value = part.partition("=")
            name = first.strip() if equals else name
            read = _parse_value((value if equals else part).strip())
            # A word among numbers is an option without its value, or a block after a comma.
            stray = not equals and isinstance(read, str) and not isinstance(options.get(name, [""])[0], str)
            if not name.isidentifier() or read == "" or stray or (equals and name in options):
                raise UsageError(
                    f"cannot read {part!r} in block {text!r}",
                    "options are written NAME:option=value,option=value, several values NAME:option=value,value; "
                    "blocks with options are words of their own",
                )
            options.setdefault(name, []).append(read)
        names = sorted(options)
        choices = itertools.product(*(dict.fromkeys(options[each]) for each in names))
        return [cls(target=head, options=tuple(zip(names, values, strict=True))) for values in choices]

    @property
    def is_user(self) -> bool:
        """Whether this names a module of the user's own rather than a block of ours."""
        return ":" in self.target

    @property
    def name(self) -> str:
        """Short display name: the label, or the user's class name, with the options as given."""
        if self.label:
            return self.label
        short = self.target.rpartition(":")[2] if self.is_user else self.target
        return f"{short}:{_format_options(self.options)}" if self.options else short

    def __str__(self) -> str:
        return f"{self.target}:{_format_options(self.options)}" if self.options else self.target


def names_file(place: str) -> bool:
    """Whether the place in `place:Name` is a file rather than a package."""
    return place.endswith(".py") or "/" in place or "\\" in place


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _format_options(options: Iterable[tuple[str, Any]]) -> str:
    return ",".join(f"{name}={value}" for name, value in options)


def parse_blocks(words: Iterable[str] | str) -> list[BlockRequest]:
    """Words of `--blocks` as requests, one for each value of an option that has several, in order, without duplicates.

    A comma separates blocks only in a word without a colon. Raises UsageError.
    """
    requests = []
    for word in [words] if isinstance(words, str | type) else words:
        if not isinstance(word, str):
            name = getattr(word, "__name__", type(word).__name__)
            raise UsageError(
                f"a block is named by a text, not given as {word!r}",
                f"workers import it by its name: 'path/to/file.py:{name}' or 'package.module:{name}'",
            )
        parts = [word] if ":" in word else [part for part in word.split(",") if part.strip()]
        requests += [request for part in parts for request in BlockRequest.parse_all(part)]
    return list(dict.fromkeys(requests))


_LENGTH = re.compile(r"(\d+)\s*([kKmM]?)")


def parse_length(text: str | int) -> int:
    """`4096`, `64K` or `1M` (K and M count 1024) as a number of tokens. Raises UsageError."""
    match = _LENGTH.fullmatch(str(text).strip())
    if not match:
        raise UsageError(f"cannot read the length {str(text)!r}", "write it as 4096, 64K or 1M")
    return check_length(int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()])


def check_length(length: int) -> int:
    """`length` itself if a sequence can have it. Raises UsageError."""
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MAX_LENGTH:
        raise UsageError(f"a sequence cannot have {length!r} tokens", f"lengths go from 1 to {MAX_LENGTH:,}")
    return length


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to measure: block x length x batch x dtype x mode x model shape."""

    block: BlockRequest
    length: int
    batch_size: int = 1
    dtype: str = "fp32"
    mode: str = "forward"
    d_model: int = 512
    n_heads: int = 8
    num_kv_heads: int | None = None
    layers: int = 1
    scope: str = "block"

    @property
    def tokens(self) -> int:
        """Tokens that one call processes: B * T, or B in mode decode."""
        return self.batch_size * (1 if self.mode == "decode" else self.length)

    @property
    def label(self) -> str:
        """How messages name this cell."""
        mode = "" if self.mode == "forward" else f"{self.mode} of "
        return f"{mode}{self.block.name} at {self.length:,} tokens"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the worker's pipe; `from_json` reads it back."""
        data = dataclasses.asdict(self)
        data["block"] = {"target": self.block.target, "options": dict(self.block.options)}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` wrote."""
        block = data["block"]
        request = BlockRequest(target=block["target"], options=tuple(sorted(block["options"].items())))
        return cls(**{**data, "block": request})

    def key(self, *, identity: Mapping[str, Any], **context: Any) -> str:
        """The name under which a result is found again by --resume.

        identity: what the worker says of the block: resolved `options` and `source_hash`.
        context: whatever else a number depends on: device name, threads, numeric flags, seed, torch version.
        """
        data = self.to_json()
        data["block"] = {"target": self.block.target, "options": identity["options"]}
        data["source_hash"] = identity["source_hash"]
        data["context"] = context
        data["protocol"] = PROTOCOL_VERSION
        text = json.dumps(data, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """What to measure and how. The first group holds the published fields with their published defaults.

    Times are in seconds, lengths in tokens. `benchmark_runs` counts samples a round; see `fixed_runs`.
    Raises UsageError for a value that cannot be.
    """

    d_model: int = 512
    n_heads: int = 8
    batch_size: int = 1
    sequence_lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    warmup_runs: int = 3
    benchmark_runs: int = DEFAULT_RUNS
    device: str = "auto"
    torch_benchmark: bool = True
    cudnn_benchmark: bool = True
    cudnn_deterministic: bool = False
    profile_memory: bool = True
    verbose: bool = True
    save_results: bool = True
    results_dir: str = "./reports/benchmark"

    fixed_runs: bool | None = None
    """True: exactly `benchmark_runs` samples a round. False: at least that many, then on to a tight interval.
    None: exact when `benchmark_runs` was changed from its default."""
    blocks: list[str] = field(default_factory=list)
    output_file: str | None = None
    dtype: str = "auto"
    num_kv_heads: int | None = None
    mode: str = "forward"
    rounds: int = 3
    seed: int = 0
    threads: int | None = None
    """For work on a CPU; None: one for each physical core that this process may use."""
    timeout: float = 600.0
    """Seconds that a cell may take in a round, gate included."""
    max_time: float | None = None
    """Seconds for the whole; what is measured by then is kept."""
    isolation: str = "worker"
    """worker: each round in a process of its own. none: all in this one, without a timeout."""
    resume: bool = False
    """Measure only what the results file lacks."""
    retry: bool = False
    """With `resume`: rows that crashed or timed out count as lacking."""
    force: bool = False
    """Begin a results file that is there anew."""
    gate: bool = True
    energy: bool = True
    cuda_graph: bool = False
    """Time the replay of a captured call."""
    lightning_mode: bool = False
    """Measure the training step of a language model of `layers` blocks, in Lightning's Trainer and in a bare loop."""
    layers: int = 1
    """Blocks in a row: each has weights of its own."""

    def __post_init__(self) -> None:
        self.results_dir = os.fspath(self.results_dir)
        self.output_file = None if self.output_file is None else os.fspath(self.output_file)
        if self.output_file == "":
            raise UsageError("the output file has no name", "leave --output-file out for a new file")
        if isinstance(self.sequence_lengths, int | str):
            self.sequence_lengths = [self.sequence_lengths]
        self.sequence_lengths = list(dict.fromkeys(parse_length(length) for length in self.sequence_lengths))
        if not self.sequence_lengths:
            raise UsageError("no sequence length is given", "write --sequence-lengths 1K 4K 16K")
        minima = {
            "d_model": 1,
            "n_heads": 1,
            "batch_size": 1,
            "warmup_runs": 0,
            "benchmark_runs": 1,
            "rounds": 1,
            "layers": 1,
        }
        optional = {"num_kv_heads": 1, "threads": 1}
        for name, least in {**minima, **optional}.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not abs(self.seed) < 1 << 62:
            raise UsageError(f"seed must be a whole number of up to 62 bits, not {self.seed!r}")
        for name in ("timeout", "max_time"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"{name} must be a positive number of seconds, not {value!r}")
        choices = {"dtype": ("auto", *DTYPES), "mode": MODES, "isolation": ("worker", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        if self.lightning_mode and self.mode not in ("forward", "train"):
            raise UsageError(f"--lightning-mode measures a training step, not mode {self.mode}", "leave --mode out")
        if self.lightning_mode and self.cuda_graph:
            raise UsageError("a training step of Lightning is no CUDA graph", "leave --cuda-graph out")
        if self.d_model % self.n_heads:
            raise UsageError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}",
                "every head needs the same width: d_model = n_heads * head width",
            )
        if self.num_kv_heads is not None and self.n_heads % self.num_kv_heads:
            raise UsageError(
                f"n_heads {self.n_heads} is not divisible by num_kv_heads {self.num_kv_heads}",
                "every key-value head serves the same number of query heads",
            )

    @property
    def exact_runs(self) -> bool:
        """Whether each round takes exactly `benchmark_runs` samples."""
        return self.benchmark_runs != DEFAULT_RUNS if self.fixed_runs is None else self.fixed_runs

    def cells(self, blocks: Iterable[BlockRequest], *, dtype: str) -> Iterator[Cell]:
        """The cells of this configuration: every length, shortest first, and within a length every block."""
        blocks = list(blocks)
        for length in sorted(self.sequence_lengths):
            for block in blocks:
                yield Cell(
                    block=block,
                    length=length,
                    batch_size=self.batch_size,
                    dtype=dtype,
                    mode=LIGHTNING if self.lightning_mode else self.mode,
                    d_model=self.d_model,
                    n_heads=self.n_heads,
                    num_kv_heads=self.num_kv_heads,
                    layers=self.layers,
                )

    def to_json(self) -> dict[str, Any]:
        """The configuration as stored in every result, published keys first."""
        data = dataclasses.asdict(self)
        published = ("d_model", "n_heads", "device", "torch_benchmark", "cudnn_benchmark")
        return {name: data.pop(name) for name in published} | data


AXES = ("mode", "dtype", "d_model", "n_heads", "num_kv_heads", "layers", "batch_size")
"""The fields of a configuration and of a cell of which one sweep may hold several values, outermost first."""


def variants(config: BenchmarkConfig, vary: Mapping[str, Sequence[Any]] | None) -> list[BenchmarkConfig]:
    """`config` once for every combination of the values in `vary` (field -> values). Raises UsageError."""
    vary = vary or {}
    for name, values in vary.items():
        if name not in AXES:
            raise UsageError(f"a sweep cannot vary {name!r}.{did_you_mean(name, AXES)}", f"it can {', '.join(AXES)}")
        if not values:
            raise UsageError(f"{name} has no value to measure")
    names = [name for name in AXES if name in vary]
    choices = itertools.product(*(dict.fromkeys(vary[name]) for name in names))
    return [dataclasses.replace(config, **dict(zip(names, values, strict=True))) for values in choices]


def going_on(path: str) -> list[str]:
    """The words that go on with the results file at `path`, a path from here."""
    # A bare name would be looked for under the results folder.
    return ["--output-file", path if os.path.dirname(path) else os.path.join(os.curdir, path), "--resume"]
