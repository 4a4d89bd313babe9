"""The jobs of a worker, in this process: who I am, what is this block, measure this cell. Plain data in, events out.

The same session serves the worker process and `--isolation none`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longctx.config import LIGHTNING, BlockRequest, Cell
from longctx.errors import LongctxError

Emit = Callable[[dict[str, Any]], None]


class Session:
    """One device, one configuration, any number of jobs. Imports torch."""

    def __init__(
        self,
        config: Mapping[str, Any],
        emit: Emit,
        *,
        orders: Iterator[Mapping[str, Any]] | None = None,
        beside: str | None = None,
    ) -> None:
        """config: `BenchmarkConfig.to_json()`. emit gets one event at a time, each a dictionary with "event".

        orders: where a cell that is measured in turns finds what to do next. beside: the folder that the supervisor
        works in, when the working directory of this process is another checkout of the user's code.
        """
        self.config = config
        self.emit = emit
        self.orders = orders
        self.beside = beside
        self.gate_cache: dict[Any, dict[str, Any]] = {}
        self._device: Any = None

    def run(self, job: Mapping[str, Any]) -> None:
        """Do one job. The last event it emits is "done" or "refused"."""
        try:
            answer = getattr(self, f"_{job['job']}")(job)
        except LongctxError as error:
            self.emit({"event": "refused", "message": error.message, "hint": error.hint, "exit_code": error.exit_code})
            return
        self.emit({"event": "done", **answer})

    @property
    def device(self) -> Any:
        """The torch.device of the configuration. Raises MissingError for one that is not there."""
        if self._device is None:
            from longctx.engine.device import resolve_device

            self._device = resolve_device(self.config["device"])
        return self._device

    def _hello(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The device, the number format, and the flags that will be pinned."""
        import torch  # noqa: F401

        from longctx.engine.checkout import search_here_first
        from longctx.engine.device import describe_device, resolve_dtype
        from longctx.engine.flags import global_state, pinned_flags

        if self.beside:
            search_here_first()
        with global_state():
            pinned_flags(self.config)
            environment = describe_device(self.device)
        dtype, _ = resolve_dtype(self.config["dtype"], self.device)
        return {"device": str(self.device), "dtype": dtype, "environment": environment}

    def _describe(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """What the block is: options with every default, source hash, modes. Refused when it cannot be built in the
        shape of the job, or of the configuration."""
        from longctx.engine.checkout import check_origin
        from longctx.engine.flags import global_state
        from longctx.engine.loading import describe_block

        request = BlockRequest(target=job["target"], options=tuple(sorted(job["options"].items())))
        shape = {name: job.get(name, self.config[name]) for name in ("d_model", "n_heads", "num_kv_heads")}
        try:
            with global_state():
                identity = describe_block(request, **shape)
        except MemoryError as error:
            return {"identity": None, "kind": type(error).__name__, "message": str(error) or "out of memory"}
        if self.beside:
            check_origin(request.target, self.beside)
        return {"identity": identity}

    def _cost(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """FLOPs, bytes and state of a cell by its block's cost model, None without one. Nothing is run."""
        from longctx.engine.flags import global_state
        from longctx.engine.loading import cost_of

        with global_state():
            cost = cost_of(Cell.from_json(job["cell"]))
        return {"cost": cost and dataclasses.asdict(cost)}

    def _peaks(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The rates that this device reaches now, for the number format of the job."""
        from longctx.engine.flags import global_state, pinned_flags
        from longctx.engine.peaks import measure_peaks

        with global_state():
            pinned_flags(self.config)
            return {"peaks": dataclasses.asdict(measure_peaks(self.device, (job["dtype"],)))}

    def _measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One cell, as `measure.measure_cell` does it, or `training.cell.run_lightning_cell` in mode lightning."""
        from longctx.engine.measure import Plan, measure_cell

        cell = Cell.from_json(job["cell"])
        if cell.mode == LIGHTNING:
            # The one look upwards: training is built on the engine, and is loaded where it is asked for.
            from longctx.training.cell import run_lightning_cell as measure_cell
        found = measure_cell(
            cell,
            Plan(**job["plan"], orders=self.orders if job.get("in_turns") else None),
            device=self.device,
            config=self.config,
            gate_cache=self.gate_cache,
            emit=self.emit,
        )
        return {"found": found}
