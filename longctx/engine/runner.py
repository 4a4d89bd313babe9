"""The supervisor: plans rounds, has workers measure, saves every row, survives what the blocks do. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx import blocks as own_blocks
from longctx.analysis.plausibility import mark_suspects
from longctx.config import LIGHTNING, BenchmarkConfig, BlockRequest, Cell, command_line, parse_blocks, variants
from longctx.engine.judge import Judge
from longctx.engine.locks import held
from longctx.engine.machine import available_memory_bytes, default_threads, describe_host, predict_memory_bytes
from longctx.engine.peaks import Peaks
from longctx.engine.process import InProcess, Refused, Worker, WorkerLost, WorkerProcess
from longctx.engine.rows import add_memory, add_round, fault, new_row
from longctx.errors import LongctxError
from longctx.events import (
    CellFinished,
    CellPhase,
    CellStarted,
    Event,
    Notice,
    RoundStarted,
    SampleTaken,
    SweepFinished,
    SweepStarted,
)
from longctx.results import BenchmarkResult, ResultsFile

HELLO = {"job": "hello"}
START_TIMEOUT_S = 180.0
"""For a worker to import torch and look at its device, on a slow file system."""

BUDGET_S, LEAST_BUDGET_S = 3.0, 0.5
"""Seconds of open-ended sampling of a cell in all rounds together, and in any one of them."""

RETRIED = ("crashed", "timeout")
SPARES_LONGER = ("oom", "timeout")
"""What a block that ends so at one length will do at every longer one."""


def run_sweep(
    blocks: Iterable[str] | None,
    config: BenchmarkConfig,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> list[BenchmarkResult]:
    """Measure `blocks` (None: all of ours) as `config` says. One result a cell, faults included, in cell order.

    vary: several values for some of `config.AXES`, in the place of the one in `config`; all combinations are measured,
    in the same rounds. on_event is told what happens, in the words of longctx/events.py. command: what reproduces this
    run, stored in every row. Raises LongctxError before anything is measured for what a user can mend, and ResultsError
    when saving fails. KeyboardInterrupt passes after the workers have ended; all rows finished by then are on disk.
    """
    requests = requested(blocks or config.blocks)
    command = command or command_line("sweep", config, map(str, requests), defaults=BenchmarkConfig(), vary=vary)
    return Sweep(requests, config, vary=vary, on_event=on_event, command=command).carry_out()


def requested(blocks: Iterable[str] | None) -> list[BlockRequest]:
    """The words of `--blocks` as requests, all of ours for none. Raises LongctxError."""
    requests = list(dict.fromkeys(own_spelling(request) for request in parse_blocks(blocks or own_blocks.names())))
    if len({request.name for request in requests}) < len(requests):
        raise LongctxError(
            "two of the blocks have the same name", "blocks of your own that are measured together need different names"
        )
    return requests


def results_path(config: BenchmarkConfig, *, kind: str = "sweep") -> Path:
    """Where results are saved: under results_dir, unless output_file is a path with a folder. kind: begins the name of
    a file that nobody has named."""
    if config.output_file is None:
        return Path(config.results_dir, time.strftime(f"{kind}-%Y%m%d-%H%M%S.json"))
    # The text, not the path: `./run.json` names a folder too.
    has_folder = any(mark in config.output_file for mark in filter(None, (os.sep, os.altsep)))
    return Path(config.output_file) if has_folder else Path(config.results_dir, config.output_file)


def own_spelling(request: BlockRequest) -> BlockRequest:
    """`blade` as `BLADE`. Raises UsageError for a block that is neither ours nor a path to the user's own."""
    return request if request.is_user else dataclasses.replace(request, target=own_blocks.resolve(request.target))


class _OutOfTime(Exception):
    """--max-time is over."""


class Sweep:
    """One run of `run_sweep`: its workers, its rows, its clock."""

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

    def carry_out(self) -> list[BenchmarkResult]:
        """Measure, with the file and the device to ourselves, and leave no worker."""
        with contextlib.ExitStack() as stack:
            if self.config.save_results:
                path = results_path(self.config)
                stack.enter_context(held(f"file {path.resolve()}", str(path)))
                self.file, earlier = ResultsFile.open(path, resume=self.config.resume, force=self.config.force)
                self.earlier = {(result.key, result.block_name): result for result in earlier}
            stack.callback(self.close)
            return self._run(stack)

    # -- before anything is measured ----------------------------------------------------------------------------

    def _run(self, stack: contextlib.ExitStack) -> list[BenchmarkResult]:
        self._look(stack)
        self.judge = Judge(self.environment, self._measure_peaks)
        self._say_started()
        try:
            self._run_rounds()
            self._measure_energy()
        except _OutOfTime:
            return self._finish(f"--max-time of {self.config.max_time:g} s is over")
        except KeyboardInterrupt:
            self._finish("interrupted")
            raise
        return self._finish(None)

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

    def close(self) -> None:
        for worker in (self.timing, self.memory):
            if worker is not None:
                worker.close()
        self.timing = self.memory = None

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
        return new_row(
            cell,
            key=self.keys[cell],
            source_hash=identity["source_hash"],
            block_options=dict(identity["options"]),
            config=self.config.to_json() | {name: getattr(cell, name) for name in self.varied},
            environment=self.environment,
            command=self.command,
        )

    def _say_started(self) -> None:
        self.emit(
            SweepStarted(
                cells=tuple(self.cells),
                rounds=self.config.rounds,
                environment=self.environment,
                path=str(self.file.path) if self.file else None,
                reused=dict(self.rows),
                weights={cell: _weight(cell) for cell in self.cells},
            )
        )

    # -- rounds -------------------------------------------------------------------------------------------------

    def _run_rounds(self) -> None:
        for index in range(self.most_rounds):
            cells = self._order(index)
            if not cells:
                continue
            if index and self.config.isolation != "none":
                # What differs from process to process is then sampled, not hidden.
                self._end_round()
            self.emit(RoundStarted(index=index, cells=tuple(cells)))
            for cell in cells:
                self._check_time()
                self.emit(CellStarted(cell=cell, round=index))
                self._run_cell(cell, index)
                self._save()
                self.emit(CellFinished(cell=cell, round=index, result=self.rows[cell]))

    def _end_round(self) -> None:
        if self.timing is not None:
            self.timing.close()
            self.timing = None

    def _order(self, index: int) -> list[Cell]:
        """The cells that still lack round `index`: the first goes up in length and batch, later ones are shuffled
        whole."""
        cells = [cell for cell in self.cells if self._lacks(cell, index)]
        random.Random(f"{self.config.seed}:{index}").shuffle(cells)
        return cells if index else sorted(cells, key=lambda cell: (cell.length, cell.batch_size))

    def _lacks(self, cell: Cell, index: int) -> bool:
        row = self.rows.get(cell)
        if row is None:
            return index == 0
        return row.status == "ok" and (len(row.samples) <= index or (index == 0 and self._lacks_memory(row)))

    def _lacks_memory(self, row: BenchmarkResult) -> bool:
        return self.config.profile_memory and row.allocated_memory_mb is None

    def _run_cell(self, cell: Cell, index: int) -> None:
        row = self.rows.get(cell) or self._new_row(cell)
        if len(row.samples) <= index:
            # What was measured once is not skipped because something else has failed since.
            refused = None if row.samples else self._why_not(cell)
            add_round(row, cell, refused or self._time(cell, row, index))
        self.rows[cell] = row
        self.judge.judge(row, cell)
        mark_suspects(self.rows.values())
        if row.ok and self._lacks_memory(row):
            self._measure_memory(cell, row)

    def _why_not(self, cell: Cell) -> dict[str, Any] | None:
        """What becomes of a cell that is not tried, or None if it can be."""
        if reason := self._why_skip(cell):
            return fault("skipped", "Skipped", reason)
        if lost := self.lost.get(cell.block):
            return fault(lost.status, lost.kind, f"while it was loaded: {lost.message}", lost.log_tail)
        return None

    def _time(self, cell: Cell, row: BenchmarkResult, index: int) -> dict[str, Any]:
        gate, memory = self.config.gate and not row.samples, index == 0 and not self.separate_memory
        if index == 0 and self.separate_memory:
            # It loads torch while nothing is timed, and sleeps while the other works.
            self.memory = self.memory or self._ready(memory=True)
        self.timing = self.timing or self._ready()
        found, self.timing = self._ask(self.timing, cell, self._job(cell, gate=gate, timing=True, memory=memory))
        return found

    def _measure_peaks(self, dtype: str) -> Peaks | None:
        """What this machine reaches now, in the process that measures; None if that fails."""
        self.timing = self.timing or self._ready()
        try:
            found = self.timing.ask({"job": "peaks", "dtype": dtype}, timeout=START_TIMEOUT_S)["peaks"]
        except (Refused, WorkerLost):
            self._forget(self.timing)
            return None
        return Peaks(**found)

    def _measure_energy(self) -> None:
        """Joules of every row that has none, once its time is known: on GPUs whose driver counts them."""
        counted = (self.environment.get("nvml") or {}).get("energy_mj") is not None
        if not counted or not self.config.energy:
            return
        for cell, row in self.rows.items():
            measurable = cell.mode not in ("decode", LIGHTNING) and not self.config.cuda_graph
            if row.ok and row.joules_per_token is None and measurable:
                self._check_time()
                self.emit(Notice(text=f"energy of {cell.label}"))
                self.timing = self.timing or self._ready()
                job = self._job(cell, gate=False, timing=False, memory=False, energy=True)
                found, self.timing = self._ask(self.timing, cell, job)
                row.joules_per_token = found.get("joules_per_token")
                self._save()

    def _measure_memory(self, cell: Cell, row: BenchmarkResult) -> None:
        self.emit(CellPhase(cell=cell, phase="memory"))
        job = self._job(cell, gate=False, timing=False, memory=True)
        if self.separate_memory:
            self.memory = self.memory or self._ready(memory=True)
            found, self.memory = self._ask(self.memory, cell, job)
        else:
            self.timing = self.timing or self._ready()
            found, self.timing = self._ask(self.timing, cell, job)
        if found["status"] == "ok":
            add_memory(row, found)
        else:
            self.emit(Notice(text=f"{cell.label}: no memory reading, {found['error']['message']}", level="warning"))

    def _job(self, cell: Cell, *, gate: bool, timing: bool, memory: bool, energy: bool = False) -> dict[str, Any]:
        config = self.config
        plan = {
            "warmup_runs": config.warmup_runs,
            "runs": config.benchmark_runs,
            "exact": config.exact_runs,
            # Rounds see what samples of one process cannot: a cell's time is shared out among them.
            "budget_s": max(LEAST_BUDGET_S, BUDGET_S / config.rounds),
            "gate": gate,
            "timing": timing,
            "memory": memory and config.profile_memory,
            "energy": energy,
            "seed": config.seed,
            "cuda_graph": config.cuda_graph,
            "timeout": config.timeout,
        }
        return {"job": "measure", "cell": cell.to_json(), "plan": plan}

    def _ask(
        self, worker: Worker, cell: Cell, job: Mapping[str, Any], *, until: str = "done"
    ) -> tuple[dict[str, Any], Worker | None]:
        """Have `worker` do a job on `cell`. Returns what was found, and the worker to go on with: None when it is used
        up. until: an event that is an answer too, and is then returned as it is.
        """
        timeout = self.config.timeout
        if self.deadline is not None:
            timeout = min(timeout, max(1.0, self.deadline - time.monotonic()))
        try:
            event = worker.ask(job, timeout=timeout, on_event=lambda event: self._pass_on(cell, event), until=until)
        except Refused as refused:
            return fault("failed", "Refused", refused.message), worker
        except WorkerLost as lost:
            self._forget(worker)
            if lost.status == "timeout" and timeout < self.config.timeout:
                raise _OutOfTime from None
            return fault(lost.status, lost.kind, lost.message, lost.log_tail), None
        if event["event"] != "done":
            return event, worker
        found = event["found"]
        if found["status"] not in ("ok", "unsupported", "wrong"):
            # A process in which something went wrong measures nothing more: it may be left in any state.
            if found["error"] and not found["error"].get("log_tail"):
                found["error"]["log_tail"] = worker.log_tail() or None
            worker.close()
            return found, None
        return found, worker

    def _forget(self, worker: Worker) -> None:
        """Do not go on with a worker that has ended."""
        if worker is self.memory:
            self.memory = None
        else:
            self.timing = None

    def _pass_on(self, cell: Cell, event: Mapping[str, Any]) -> None:
        if event["event"] == "phase":
            self.emit(CellPhase(cell=cell, phase=event["phase"]))
        elif event["event"] == "sample":
            self.emit(SampleTaken(cell=cell, seconds=event["seconds"], count=event["count"]))

    def _why_skip(self, cell: Cell) -> str | None:
        """Why a cell is not tried: a shorter one of the block did not fit, or this one cannot."""
        for other, row in self.rows.items():
            if row.status in SPARES_LONGER and _is_part(other, cell):
                ended = {"oom": "ran out of memory", "timeout": "ran out of time"}[row.status]
                batch = f" and batch {other.batch_size}" if other.batch_size < cell.batch_size else ""
                return f"it {ended} at {other.length:,} tokens{batch} already"
        needed = predict_memory_bytes(cell, self.identities[cell.block]["options"])
        free = self._free_bytes()
        if needed > free:
            return f"it needs at least {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are there"
        return None

    def _free_bytes(self) -> int:
        return self.environment.get("gpu_memory_total_bytes") or available_memory_bytes()

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise _OutOfTime

    # -- keeping ------------------------------------------------------------------------------------------------

    def _finished_rows(self) -> list[BenchmarkResult]:
        return [self.rows[cell] for cell in self.cells if cell in self.rows]

    def _save(self) -> None:
        if self.file is not None and self.rows:
            self.file.save(self._finished_rows())

    def _finish(self, reason: str | None) -> list[BenchmarkResult]:
        # The cell that was running when the end came may have gained a timing, and no memory reading yet.
        self._save()
        results = self._finished_rows()
        self.emit(SweepFinished(results=tuple(results), complete=reason is None, reason=reason))
        return results


def _is_part(small: Cell, cell: Cell) -> bool:
    """Whether `small` is the same cell but for being shorter, or of fewer sequences."""
    same = dataclasses.replace(cell, length=small.length, batch_size=small.batch_size) == small
    return same and small != cell and small.length <= cell.length and small.batch_size <= cell.batch_size


def _weight(cell: Cell) -> float:
    """Cost of one measurement against another's, for time estimates: a fixed part, and what grows with the work."""
    pairs = cell.length**2 / 2 if cell.block.target == "Dense" else cell.length * 512
    flops = cell.batch_size * (24 * cell.d_model**2 * cell.length + 4 * cell.d_model * pairs)
    # A few steps of decoding take no time beside the reading of their context.
    return 2e11 + {"train": 15, "decode": 2, LIGHTNING: 30}.get(cell.mode, 5) * flops * cell.layers
