"""Blocks that crash, hang and cheat: what `longctx test` throws at the runner, each as a user's own block.

Shapes: x and y `[B, T, D]`.
"""

from __future__ import annotations

import os
import resource
import signal
import time

import torch
from torch import Tensor, nn


class Crash(nn.Module):
    """Ends its process by a segmentation fault."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
        return x


class Hang(nn.Module):
    """Never returns."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(3600)
        return x


class CachedByPointer(nn.Module):
    """Keeps its output for every address that an input was seen at, whatever lies there now."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.data_ptr() not in self.kept:
            self.kept[x.data_ptr()] = x.cumsum(1)
        return self.kept[x.data_ptr()]


class Stale(nn.Module):
    """Gives the output of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x.cumsum(1)
        last, self.last = self.last, y
        return y if last is None or last.shape != y.shape else last


class Dropping(nn.Module):
    """Drops out in eval mode too."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.1, training=True)


class NotANumber(nn.Module):
    """Divides by zero at one place."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, -1, 0] = float("nan")
        return y


class LooksAhead(nn.Module):
    """Claims to be causal, and averages over the whole sequence."""

    causal = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Flat(nn.Module):
    """Takes the same 20 ms however long its input is."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.cuda._sleep(40_000_000)
        else:
            time.sleep(0.02)
        return x + 1


class SlowStart(nn.Module):
    """Takes a second for its first call at a shape, and next to nothing afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape) not in self.seen:
            self.seen.add(tuple(x.shape))
            time.sleep(1.0)
        return x.cumsum(1)


class SideStream(nn.Module):
    """Has its work done on a stream that nobody waits for. CUDA only."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: torch.cuda.Stream | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.stream = self.stream or torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(20_000_000)
        return x + 1
