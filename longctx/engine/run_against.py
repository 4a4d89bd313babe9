"""Every block against another, or against itself in another checkout: both sides alive at once, sampled in turns.

What slows a machine down, for a moment or for minutes, meets both sides alike: a sample of one stands next to a sample
of the other, and their ratio is what is judged (longctx/analysis/paired.py). No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx import blocks as own_blocks
from longctx.analysis.paired import judge
from longctx.analysis.plausibility import mark_suspects
from longctx.config import AGAINST_ROUNDS, BenchmarkConfig, BlockRequest, Cell, names_file
from longctx.engine.preparation import own_spelling, requested
from longctx.engine.process import Worker
from longctx.engine.rows import add_round
from longctx.engine.runner import Sweep, of_one_source
from longctx.engine.turns import Turns
from longctx.errors import LongctxError, UsageError
from longctx.events import CellFinished, CellPhase, Event, Notice, SampleTaken
from longctx.reproduce import command_line
from longctx.results import BenchmarkResult

MORE_ROUNDS = 4
"""For pairs that are inconclusive: of nine rounds the two on the outside no longer count."""

TELL_S = 0.1
"""Seconds between two words on how far a round is."""

Pair = tuple[BenchmarkResult, BenchmarkResult]


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """What `--against` names: a block, or the folder of a checkout of the user's code."""

    text: str
    block: BlockRequest | None = None
    folder: str | None = None


def opponent(text: str) -> Opponent:
    """Read the word after `--against`. Raises UsageError.

    The name of a block of ours is that block even where a folder is called so too; `./NAME` is the folder.
    """
    if text.casefold() in map(str.casefold, own_blocks.names()) or not os.path.isdir(text):
        if ":" not in text and names_file(text):
            raise UsageError(
                f"there is no folder {text!r}", "--against takes a block or the folder of a checkout of your code"
            )
        return Opponent(text=text, block=own_spelling(BlockRequest.parse(text)))
    return Opponent(text=text, folder=os.path.abspath(text))


def run_against(
    blocks: Iterable[str] | None,
    other: str,
    config: BenchmarkConfig,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
    guard: float | None = None,
    settle: bool = False,
) -> list[Pair]:
    """Measure every one of `blocks` in turns with `other`, as `config` says: (block's row, other's row) of each cell.

    other: a block, or a folder in which the same block is found. Both rows are saved, and hold as many samples in each
    round, of which those in the same place belong together. vary: as `run_sweep` takes it. settle: measure pairs that
    are inconclusive (with `guard`, as `paired.judge` takes it) in MORE_ROUNDS more rounds. Raises as `run_sweep` does.
    """
    if config.isolation == "none":
        raise UsageError(
            "--against needs a process for each side", "leave --isolation none out: both are alive at the same time"
        )
    if config.lightning_mode:
        raise UsageError("--against takes samples in turns, and Lightning takes its steps in a row", "leave one out")
    rival = opponent(other)
    pairs = _pairs(requested(blocks or config.blocks), rival, everything=not (blocks or config.blocks))
    if command is None:
        command = against_command(config, [str(ours) for ours, _ in pairs], other, vary=vary)
    more = MORE_ROUNDS if settle else 0
    how = {"vary": vary, "on_event": on_event, "command": command}
    sweep = _PairedSweep(pairs, rival, config, guard=guard, more=more, **how)
    sweep.carry_out()
    return sweep.pairs()


def against_command(
    config: BenchmarkConfig,
    blocks: Iterable[str],
    other: str,
    words: Iterable[str] = (),
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
) -> str:
    """`longctx sweep ... --against OTHER` that measures the same again."""
    defaults = BenchmarkConfig(fixed_runs=False, rounds=AGAINST_ROUNDS)
    return command_line("sweep", config, blocks, defaults=defaults, vary=vary, more=["--against", other, *words])


def _pairs(
    requests: list[BlockRequest], rival: Opponent, *, everything: bool
) -> list[tuple[BlockRequest, BlockRequest]]:
    """(block, what it is measured against), each under a name of its own. Raises UsageError."""
    if rival.block is not None:
        # Who names no block wants to know how all the others do.
        requests = [request for request in requests if not (everything and request == rival.block)]
        named = [(request, _named(rival.block, request, several=len(requests) > 1)) for request in requests]
    else:
        named = [(request, _elsewhere(request, rival)) for request in requests]
    names = [request.name for pair in named for request in pair]
    if len(set(names)) < len(names):
        raise UsageError("two of the sides have the same name", "give blocks of your own different names")
    return named


def _named(other: BlockRequest, request: BlockRequest, *, several: bool) -> BlockRequest:
    name = other.name if other.name != request.name else str(other)
    if name == request.name or str(other) == str(request):
        name = f"{request.name} (again)"
    return dataclasses.replace(other, label=f"{name} (beside {request.name})" if several else name)


def _elsewhere(request: BlockRequest, rival: Opponent) -> BlockRequest:
    """The same block as its checkout has it: the process that loads it works in that folder."""
    if not request.is_user:
        raise UsageError(
            f"{request.name} is a block of longctx, and the same in every checkout",
            "with a folder after --against, name blocks of your own: --blocks path/to/file.py:Name",
        )
    place, _, name = request.target.rpartition(":")
    target = request.target
    if names_file(place) and os.path.isabs(place):
        if not Path(place).is_relative_to(os.getcwd()):
            raise UsageError(
                f"{place} does not lie in the working directory, so its place in {rival.text} is not known",
                "write its path relative to the working directory",
            )
        target = f"{os.path.relpath(place)}:{name}"
    return dataclasses.replace(request, target=target, label=f"{request.name}@{rival.text}")


@dataclass(kw_only=True)
class _Side:
    """What of a side outlives a cell. folder: where its processes work, None for here."""

    folder: str | None
    timing: Worker | None = None
    memory: Worker | None = None


class _PairedSweep(Sweep):
    """A sweep in which each cell of a block is measured together with that of its opponent."""

    def __init__(
        self,
        pairs: Sequence[tuple[BlockRequest, BlockRequest]],
        rival: Opponent,
        config: BenchmarkConfig,
        *,
        guard: float | None,
        more: int,
        **kwargs: Any,
    ) -> None:
        super().__init__([request for pair in pairs for request in pair], config, **kwargs)
        self.guard, self.most_rounds = guard, config.rounds + more
        self.opponents = dict(pairs)
        self.sides = (_Side(folder=None), _Side(folder=rival.folder))
        self.folder: str | None = None

    def pairs(self) -> list[Pair]:
        """The rows of each pair that has both, in cell order."""
        both = ((cell, self._partner(cell)) for cell in self.cells if cell.block in self.opponents)
        return [(self.rows[cell], self.rows[other]) for cell, other in both if {cell, other} <= self.rows.keys()]

    def _partner(self, cell: Cell) -> Cell:
        return dataclasses.replace(cell, block=self.opponents[cell.block])

    # -- workers ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for side in self.sides:
            for worker in (side.timing, side.memory):
                if worker is not None:
                    worker.close()
            side.timing = side.memory = None
        super().close()

    def _end_round(self) -> None:
        for side in self.sides:
            if side.timing is not None:
                side.timing.close()
                side.timing = None
        super()._end_round()

    def _forget(self, worker: Worker) -> None:
        for side in self.sides:
            side.timing = None if side.timing is worker else side.timing
            side.memory = None if side.memory is worker else side.memory
        super()._forget(worker)

    def _start(self, **how: Any) -> Worker:
        return super()._start(in_turns=True, **{"folder": self.folder, **how})

    def _run_rounds(self) -> None:
        # The process that knows nothing yet but blocks of ours.
        self.sides[0].timing, self.timing = self.timing, None
        super()._run_rounds()

    def _wake(self, sides: Sequence[_Side]) -> None:
        """See that these sides have a worker each. They load torch at the same time."""
        fresh = [side for side in sides if side.timing is None]
        for side in fresh:
            side.timing = self._start(folder=side.folder)
        for side in fresh:
            self._hello(side.timing)

    def _describe(self, request: BlockRequest, worker: Worker) -> Worker:
        folder = self.sides[1].folder
        if folder is None or request in self.opponents:
            return super()._describe(request, worker)
        scout = self._ready(folder=folder)
        try:
            scout = super()._describe(request, scout)
        except LongctxError as error:
            raise LongctxError(f"in {folder}: {error.message}", error.hint, error.exit_code) from None
        finally:
            scout.close()
        return worker

    # -- what is measured ---------------------------------------------------------------------------------------

    def _asked_for(self, cell: Cell) -> tuple[dict[str, Any], str]:
        config, command = super()._asked_for(cell)
        opponent = self.opponents.get(cell.block)
        return config | {"against": {"opponent": opponent and opponent.name, "guard": self.guard}}, command

    def _circumstances(self, cell: Cell) -> dict[str, Any]:
        """Samples taken in turns are told from others, and go with those of one opponent only."""
        ours = next(ours for ours, other in self.opponents.items() if cell.block in (ours, other))
        both = (ours, self.opponents[ours])
        return {
            "side": both.index(cell.block),
            "sides": [[request.target, self.identities[request]["source_hash"]] for request in both],
            "options": [self.identities[request]["options"] for request in both],
            "folder": self.sides[1].folder,
        }

    def _take_over(self) -> None:
        super()._take_over()
        for cell in [cell for cell in self.cells if cell.block in self.opponents]:
            rows = [self.rows.get(cell), self.rows.get(self._partner(cell))]
            # What one side has alone belongs to nothing.
            odd = None in rows or (all(row.ok for row in rows) and len(rows[0].samples) != len(rows[1].samples))
            if odd:
                self.rows.pop(cell, None)
                self.rows.pop(self._partner(cell), None)

    def _lacks(self, cell: Cell, index: int) -> bool:
        if cell.block not in self.opponents:
            return False
        both = (cell, self._partner(cell))
        rows = [self.rows.get(each) for each in both]
        if not all(row is None or row.ok for row in rows):
            return False
        usual = self.config.rounds
        if index >= usual:
            # By the rounds that all had: looking again and again would find something in the end.
            first = [dataclasses.replace(row, samples=row.samples[:usual]) for row in rows if row]
            if len(first) < 2 or judge(*first, guard=self.guard).outcome.verdict != "inconclusive":
                return False
        return any(super(_PairedSweep, self)._lacks(each, index) for each in both)

    def _order(self, index: int) -> list[Cell]:
        cells = super()._order(index)
        if cells and index == self.config.rounds:
            said = "1 pair is" if len(cells) == 1 else f"{len(cells)} pairs are"
            self.emit(Notice(text=f"{said} inconclusive: {self.most_rounds - index} more rounds"))
        return cells

    def _run_cell(self, cell: Cell, index: int) -> None:
        both = (cell, self._partner(cell))
        rows = [self.rows.get(each) or self._new_row(each) for each in both]
        if len(rows[0].samples) <= index:
            for each, row, found in zip(both, rows, self._time_both(both, rows, index), strict=True):
                add_round(row, each, of_one_source(row, found))
                row.config, row.command = self._asked_for(each)
                self.rows[each] = row
        for side, each, row in zip(self.sides, both, rows, strict=True):
            with self._lent(side):
                self.judge.judge(row, each)
                if row.ok and self._lacks_memory(row):
                    self._measure_memory(each, row)
        mark_suspects(self.rows.values())
        self._save()
        self.emit(CellFinished(cell=both[1], round=index, result=rows[1]))

    @contextlib.contextmanager
    def _lent(self, side: _Side) -> Iterator[None]:
        """What a sweep does with its workers is done with those of a side."""
        self.timing, self.memory, self.folder = side.timing, side.memory, side.folder
        try:
            yield
        finally:
            side.timing, side.memory = self.timing, self.memory
            self.timing = self.memory = self.folder = None

    def _measure_energy(self) -> None:
        """Not here: it is no matter of turns."""

    # -- in turns -----------------------------------------------------------------------------------------------

    def _time_both(self, both: Sequence[Cell], rows: Sequence[BenchmarkResult], index: int) -> list[dict[str, Any]]:
        """One round of a pair: what was found of each side. A side that fails ends nothing for the other."""
        found = {
            which: None if row.samples else self._why_not(cell)
            for which, (cell, row) in enumerate(zip(both, rows, strict=True))
        }
        found = {which: fault for which, fault in found.items() if fault is not None}
        self._wake([side for which, side in enumerate(self.sides) if which not in found])
        ready: dict[int, Mapping[str, Any]] = {}
        for which, (cell, row) in enumerate(zip(both, rows, strict=True)):
            if which in found:
                continue
            gate, memory = self.config.gate and row.gate is None, index == 0 and not self.separate_memory
            job = self._job(cell, gate=gate, timing=True, memory=memory)
            answer = self._tell(which, cell, job | {"in_turns": True}, until="ready")
            (found if "status" in answer else ready)[which] = answer
        if ready:
            seed = f"{self.config.seed}:{index}:{both[0].label}"
            call_s = {which: answer["call_s"] for which, answer in ready.items()}
            kind = "cpu" if self.device == "cpu" else "cuda"
            most = min(filter(None, (answer.get("most_calls") for answer in ready.values())), default=None)
            turns = Turns(call_s, self.config, kind=kind, seed=seed, most_calls=most)
            self._alternate(both, turns, found)
        for which in ready:
            if which not in found:
                found[which] = self._tell(which, both[which], {"job": "end"})
        return [found[which] for which in range(len(both))]

    def _tell(self, which: int, cell: Cell, job: Mapping[str, Any], *, until: str = "done") -> dict[str, Any]:
        side = self.sides[which]
        answer, side.timing = self._ask(side.timing, cell, job, until=until)
        return answer

    def _alternate(self, both: Sequence[Cell], turns: Turns, found: dict[int, dict[str, Any]]) -> None:
        """Have the sides take their turns. What a side answers instead of samples goes to `found`."""
        told = 0.0
        while not turns.over:
            for which in turns.order():
                self._check_time()
                answer = self._tell(which, both[which], turns.job(which), until="taken")
                if "status" in answer:
                    found[which] = answer
                    turns.lose(which)
                else:
                    turns.add(which, answer["samples"])
            samples = next(iter(turns.samples.values()), [])
            if samples and time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                self.emit(SampleTaken(cell=both[0], seconds=samples[-1], count=len(samples)))

    def _pass_on(self, cell: Cell, event: Mapping[str, Any]) -> None:
        # Both sides are shown as one cell at work.
        if event["event"] == "phase" and cell.block not in self.opponents:
            ours = next(ours for ours, other in self.opponents.items() if other == cell.block)
            phase = f"{event['phase']} of {cell.block.name}"
            self.emit(CellPhase(cell=dataclasses.replace(cell, block=ours), phase=phase))
        else:
            super()._pass_on(cell, event)
