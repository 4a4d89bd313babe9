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

from longctx.analysis.plausibility import mark_suspects
from longctx.config import LIGHTNING, BenchmarkConfig, Cell
from longctx.engine.judge import Judge
from longctx.engine.locks import held
from longctx.engine.machine import available_memory_bytes, predict_memory_bytes
from longctx.engine.peaks import Peaks
from longctx.engine.preparation import START_TIMEOUT_S, Preparation, requested
from longctx.engine.process import Refused, Worker, WorkerLost
from longctx.engine.rows import add_memory, add_round, fault
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
from longctx.reproduce import command_line
from longctx.results import BenchmarkResult, ResultsFile

BUDGET_S, LEAST_BUDGET_S = 3.0, 0.5
"""Seconds of open-ended sampling of a cell in all rounds together, and in any one of them."""

SPARES_LONGER = ("oom", "timeout")
"""What a block that ends so at one length will do at every longer one."""


def run_sweep(
    blocks: Iterable[str] | str | None,
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


def results_path(config: BenchmarkConfig, *, kind: str = "sweep") -> Path:
    """Where results are saved: under results_dir, unless output_file is a path with a folder. kind: begins the name of
    a file that nobody has named."""
    if config.output_file is None:
        return Path(config.results_dir, time.strftime(f"{kind}-%Y%m%d-%H%M%S.json"))
    # The text, not the path: `./run.json` names a folder too.
    has_folder = any(mark in config.output_file for mark in filter(None, (os.sep, os.altsep)))
    return Path(config.output_file) if has_folder else Path(config.results_dir, config.output_file)


class _OutOfTime(Exception):
    """--max-time is over."""


class Sweep(Preparation):
    """One run of `run_sweep`: its workers, its rows, its clock."""

    def carry_out(self) -> list[BenchmarkResult]:
        """Measure, with the file and the device to ourselves, and leave no worker."""
        with contextlib.ExitStack() as stack:
            if self.config.save_results:
                path = results_path(self.config)
                stack.enter_context(held(f"file {path.resolve()}", str(path)))
                self.file, earlier = ResultsFile.open(path, resume=self.config.resume, force=self.config.force)
                self.earlier = {(result.key, result.block_name): result for result in earlier}
            stack.callback(self.close)
            if self.config.resume and self.config.output_file is None:
                self.emit(Notice(text="nothing to resume: without --output-file a new file is begun", level="warning"))
            if self.config.resume and self.config.force:
                self.emit(Notice(text="--force counts for nothing beside --resume", level="warning"))
            if self.config.retry and not self.config.resume:
                self.emit(Notice(text="--retry counts for nothing without --resume", level="warning"))
            return self._run(stack)

    def _run(self, stack: contextlib.ExitStack) -> list[BenchmarkResult]:
        self._look(stack)
        if self.config.cuda_graph and not self.environment.get("gpu"):
            self.emit(Notice(text="--cuda-graph is for GPUs: calls are timed as they are", level="warning"))
        cores = len(self.environment.get("affinity") or [])
        if cores and self.threads > cores:
            self.emit(
                Notice(
                    text=f"{self.threads} threads share {cores} logical cores and wait for each other", level="warning"
                )
            )
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
            add_round(row, cell, refused or of_one_source(row, self._time(cell, row, index)))
            # Rounds that were taken over may be of a command that asked for fewer.
            row.config, row.command = self._asked_for(cell)
        # Before it can be saved: an end that comes here must leave no row that nobody has judged.
        self.judge.judge(row, cell)
        self.rows[cell] = row
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
        gate, memory = self.config.gate and row.gate is None, index == 0 and not self.separate_memory
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
        if found["status"] not in ("ok", "unsupported", "wrong") or found.get("spent"):
            # A process in which something went wrong, or was left behind, measures nothing more.
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


def of_one_source(row: BenchmarkResult, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, or that it is of another source than the rest of the row."""
    if row.source_hash is None or found.get("source_hash") in (None, row.source_hash):
        return found
    return fault("failed", "SourceChanged", "its source was changed while the sweep ran: measure it anew")


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
