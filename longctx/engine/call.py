"""The call that a cell is about, in each mode, and how a training step's time falls into its two parts.

Letters: B batch, T sequence length, D d_model.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.config import Cell
from longctx.engine.device import DTYPES
from longctx.engine.loading import LoadedBlock
from longctx.engine.memory import tensor_bytes
from longctx.ops.precision import wide_dtype

PART_CALLS, SLOW_S = 10, 1.0
"""Calls by which the parts of a training step are told; fewer where a step takes longer than the second."""


def make_input(cell: Cell, device: torch.device, *, seed: int) -> Tensor:
    """x `[B, T, D]`, standard normal from `seed`. The same on every run; touched, so no page is missing later."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (cell.batch_size, cell.length, cell.d_model)
    return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[cell.dtype])


class Run:
    """The call that a cell's mode is about.

    forward: y of x. prefill: (y, state) of x. decode: one step after x; a stream goes on from step to step and is
    begun anew before it has grown by an eighth. train: the loss, of forward in training mode, loss and backward, with
    gradients set to None first. The loss is the sum of y * target: its gradient is of size 1 in every number format.
    """

    def __init__(self, cell: Cell, loaded: LoadedBlock, x: Tensor) -> None:
        """x `[B, T, D]`. In mode decode it is not kept: a stream has no need of what it has read."""
        self.cell, self.loaded = cell, loaded
        self.x: Tensor | None = x
        self.state: Any = None
        self.state_bytes: int | None = None
        """Of the state after T tokens, counted from its tensors: in modes decode and prefill, after the first call."""
        self.steps = 0
        self.output: Any = None
        self.call: Callable[[Tensor], Any] = getattr(self, f"_{cell.mode}")
        self.split: Callable[[], None] = lambda: None
        """Called between the forward part of a training step and its backward part."""
        if cell.mode == "train":
            loaded.module.train()
            self.x = x.requires_grad_()
            self.target = torch.randn_like(x)
        elif cell.mode == "decode":
            self.token, self.x = x[:, -1:].clone(), None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """In which calls are made: without gradients, but for training."""
        return contextlib.nullcontext() if self.cell.mode == "train" else self.loaded.no_gradients()

    @property
    def most_calls(self) -> int | None:
        """How many calls may follow each other without `prepare`; None for any number."""
        return max(8, self.cell.length // 16) if self.cell.mode == "decode" else None

    @property
    def inputs(self) -> list[Any]:
        """The tensors that live through a call, but for the block's own."""
        return [self.token, self.state] if self.cell.mode == "decode" else [self.x]

    def prepare(self) -> None:
        """What comes before up to `most_calls` calls and is no part of them."""
        if self.cell.mode == "train":
            self._forget_gradients()
        elif self.cell.mode == "decode" and (self.state is None or self.steps > self.most_calls):
            self.state, self.steps = None, 0
            with self.loaded.no_gradients():
                x = make_input(self.cell, self.token.device, seed=self.loaded.seed)
                _, self.state = self.loaded.prefill(x)
            self._count(self.state)

    def call_prepared(self) -> Any:
        """One call, after `prepare`, on the run's own input: what it returned."""
        return self.call(self.x)

    def _count(self, state: Any) -> None:
        if self.state_bytes is None:
            self.state_bytes = tensor_bytes([state])

    def _forward(self, x: Tensor) -> Tensor:
        return self.loaded.call(x)

    def _prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.loaded.prefill(x)
        self._count(state)
        return y, state

    def _decode(self, x: Tensor) -> Tensor:
        y, self.state = self.loaded.step(self.token, self.state)
        self.steps += 1
        return y

    def _forget_gradients(self) -> None:
        self.x.grad = None
        for parameter in self.loaded.module.parameters():
            parameter.grad = None

    def _train(self, x: Tensor) -> Tensor:
        self._forget_gradients()
        y = self.loaded.call(x)
        loss = torch.sum(y * self.target, dtype=wide_dtype(y.dtype))
        # A training loop has no more use for it, and the peak is what the block holds.
        del y
        self.split()
        loss.backward()
        return loss.detach()


def forward_share(run: Run, *, device: torch.device, call_s: float) -> float:
    """The part of a training step that is forward and loss, 0 to 1: the median of some steps. call_s: of one step."""
    clock = _cuda_shares if device.type == "cuda" else _cpu_shares
    try:
        return statistics.median(clock(run, 3 if call_s > SLOW_S else PART_CALLS))
    finally:
        run.split = lambda: None


def _cpu_shares(run: Run, count: int) -> list[float]:
    marks: list[int] = []
    run.split = lambda: marks.append(time.perf_counter_ns())
    shares = []
    for _ in range(count):
        start = time.perf_counter_ns()
        run.call_prepared()
        shares.append((marks[-1] - start) / max(1, time.perf_counter_ns() - start))
    return shares


def _cuda_shares(run: Run, count: int) -> list[float]:
    """By events on the stream: backward runs on the stream of its forward."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(count)]
    for start, middle, end in events:
        run.split = middle.record
        start.record()
        run.call_prepared()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(middle) / max(start.elapsed_time(end), 1e-6) for start, middle, end in events]
