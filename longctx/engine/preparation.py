"""What comes before a measurement: workers start and look at the blocks, cells get their names, rows are taken over.

No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from longctx import blocks as own_blocks
from longctx.config import BenchmarkConfig, BlockRequest, Cell, parse_blocks, variants
from longctx.engine.locks import held
from longctx.engine.machine import default_threads, describe_host
from longctx.engine.process import InProcess, Refused, Worker, WorkerLost, WorkerProcess
from longctx.engine.rows import new_row
from longctx.errors import LongctxError
from longctx.events import Event
from longctx.results import BenchmarkResult, ResultsFile

HELLO = {"job": "hello"}
START_TIMEOUT_S = 180.0
"""For a worker to import torch and look at its device, on a slow file system."""

RETRIED = ("crashed", "timeout")


def requested(blocks: Iterable[str] | str | None) -> list[BlockRequest]:
    """The words of `--blocks` as requests, all of ours for none. Raises LongctxError."""
    requests = list(dict.fromkeys(own_spelling(request) for request in parse_blocks(blocks or own_blocks.names())))
    by_name: dict[str, BlockRequest] = {}
    for request in requests:
        if (other := by_name.setdefault(request.name, request)) is not request:
            raise LongctxError(
                f"two of the blocks have the same name, {request.name}: {other} and {request}",
                "blocks of your own that are measured together need different names",
            )
    return requests


def own_spelling(request: BlockRequest) -> BlockRequest:
    """`blade` as `BLADE`. Raises UsageError for a block that is neither ours nor a path to the user's own."""
    return request if request.is_user else dataclasses.replace(request, target=own_blocks.resolve(request.target))


class Preparation:
    """A run before its first cell: its workers, what it knows of machine and blocks, its cells, the rows they have."""

    def __init__(
        self,
        requests: list[BlockRequest],
        config: BenchmarkConfig,
        *,
        vary: Mapping[str, Sequence[Any]] | None = None,
        on_event: Callable[[Event], None] | None,
        command: str,
    ) -> None:
        self.requests, self.config, self.command = requests, config, command
        self.varied, self.variants = tuple(vary or ()), variants(config, vary)
        self.emit = on_event or (lambda event: None)
        self.file: ResultsFile | None = None
        self.earlier: dict[tuple[str | None, str], BenchmarkResult] = {}
        self.most_rounds = config.rounds
        self.threads = config.threads or default_threads()
        self.deadline = time.monotonic() + config.max_time if config.max_time else None
        self.shown = config.to_json() | {"threads": self.threads}
        if "dtype" in self.varied:
            # What `auto` is, should it be among them.
            self.shown["dtype"] = "auto"
        self.rows: dict[Cell, BenchmarkResult] = {}
        self.keys: dict[Cell, str] = {}
        self.lost: dict[BlockRequest, WorkerLost] = {}
        self.identities: dict[BlockRequest, Mapping[str, Any]] = {}
        self.timing: Worker | None = None
        self.memory: Worker | None = None

    def _look(self, stack: contextlib.ExitStack | None = None) -> None:
        """Learn what the machine and the blocks are, and name the cells. stack: holds the device, if given."""
        in_process = self.config.isolation == "none"
        users = [request for request in self.requests if request.is_user]
        self.timing = self._start()
        # Users' code is looked at in a process of its own: what its import does must not reach the first round.
        scout = self._start() if users and not in_process else self.timing
        try:
            hello = self._hello(self.timing)
            if scout is not self.timing:
                self._hello(scout)
            self.device, self.dtype = hello["device"], hello["dtype"]
            self.separate_memory = self.config.profile_memory and self.device == "cpu" and not in_process
            self.environment = describe_host() | hello["environment"] | {"threads": self.threads}
            if stack is not None:
                # Two processes may know one GPU by different numbers.
                name = self.environment["uuid"] or self.device
                stack.enter_context(held(f"device {name}", f"the device {self.device}"))
            for request in self.requests:
                if request.is_user and not in_process:
                    scout = self._describe(request, scout)
                else:
                    self.timing = self._describe(request, self.timing)
        finally:
            if scout is not self.timing:
                scout.close()
        cells = (
            cell
            for each in self.variants
            for cell in each.cells(self.requests, dtype=self.dtype if each.dtype == "auto" else each.dtype)
        )
        self.cells = list(dict.fromkeys(cells))
        self._take_over()

    def _take_over(self) -> None:
        """Name every cell, and take over the rows of the file that this run would only measure again."""
        again = {"skipped", *(RETRIED if self.config.retry else ())}
        for cell in self.cells:
            row = self.earlier.get((self._name(cell), cell.block.name))
            if row is not None and row.status not in again:
                self.rows[cell] = row

    def _name(self, cell: Cell) -> str:
        """Give `cell` its key."""
        flags = self.environment["flags"]
        context = {
            "device": self.environment["gpu"] or self.environment["cpu"],
            "threads": self.threads,
            "flags": {name: value for name, value in flags.items() if name != "threads"},
            "cuda_graph": self.config.cuda_graph,
            "seed": self.config.seed,
            "torch": self.environment["torch"],
        }
        identity = self.identities[cell.block]
        key = self.keys[cell] = cell.key(identity=identity, **context, **self._circumstances(cell))
        return key

    def _circumstances(self, cell: Cell) -> dict[str, Any]:
        """What else the number of `cell` depends on in this kind of sweep."""
        return {}

    def _new_row(self, cell: Cell) -> BenchmarkResult:
        identity = self.identities[cell.block]
        config, command = self._asked_for(cell)
        return new_row(
            cell,
            key=self.keys[cell],
            source_hash=identity["source_hash"],
            block_options=dict(identity["options"]),
            config=config,
            environment=self.environment,
            command=command,
        )

    def _asked_for(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """(config, command) that the row of a cell keeps: of the run that measured it last."""
        return self.config.to_json() | {name: getattr(cell, name) for name in self.varied}, self.command

    # -- workers ---------------------------------------------------------------------------------------------------

    def _start(self, *, memory: bool = False, **how: Any) -> Worker:
        """A worker. how: as `WorkerProcess` takes it."""
        if self.config.isolation == "none":
            return InProcess(self.shown)
        worker = WorkerProcess(self.shown, threads=self.threads, memory=memory, **how)
        # Loading torch takes seconds; those that are started together do it together.
        worker.begin(HELLO)
        return worker

    def _ready(self, **how: Any) -> Worker:
        """A worker that has loaded torch and looked at its device: what comes next is the cell's own time."""
        worker = self._start(**how)
        try:
            self._hello(worker)
        except BaseException:
            worker.close()
            raise
        return worker

    def _hello(self, worker: Worker) -> dict[str, Any]:
        try:
            return worker.ask(HELLO, timeout=START_TIMEOUT_S)
        except Refused as refused:
            raise refused.as_error() from None
        except WorkerLost as lost:
            raise LongctxError(
                f"the measuring process could not start: {lost.message}",
                lost.log_tail.strip() or "`longctx sysinfo` shows what torch sees",
                exit_code=1,
            ) from None

    def _describe(self, request: BlockRequest, worker: Worker) -> Worker:
        """Learn what a block is. One that takes its process down keeps its rows, and loses nobody else's."""
        job = {"job": "describe", "target": request.target, "options": dict(request.options)}
        names = ("d_model", "n_heads", "num_kv_heads")
        shapes = dict.fromkeys(tuple(getattr(each, name) for name in names) for each in self.variants)
        try:
            for shape in shapes:
                answer = worker.ask(
                    job | dict(zip(names, shape, strict=True)), timeout=min(START_TIMEOUT_S, self.config.timeout)
                )
                if answer["identity"] is None:
                    worker.close()
                    raise WorkerLost("oom", answer["kind"], answer["message"], worker.log_tail())
                self.identities.setdefault(request, answer["identity"])
        except Refused as refused:
            raise refused.as_error() from None
        except WorkerLost as lost:
            self.lost[request] = lost
            self.identities[request] = {"options": dict(request.options), "source_hash": None}
            worker = self._ready()
        return worker

    def close(self) -> None:
        """End the workers."""
        for worker in (self.timing, self.memory):
            if worker is not None:
                worker.close()
        self.timing = self.memory = None
