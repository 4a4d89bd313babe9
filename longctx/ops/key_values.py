"""Keys and values that a stream carries on, in one buffer that grows and moves seldom.

Letters: B batch, G key-value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ENDLESS = 1 << 62
"""Reach of a cache that forgets nothing."""


@dataclass(kw_only=True)
class KeyValues:
    """The last `reach` keys and values, or all of them.

    buffer: `[B, rows, 2, G, K]`; the rows from end - alive to end are in use. lead: rows kept free in front of them.
    shared: whether something else may hold the buffer (autograd, an earlier state), so that it must not be written.
    """

    buffer: Tensor
    reach: int = ENDLESS
    lead: int = 0
    end: int = 0
    alive: int = 0
    shared: bool = True

    def append(self, new: Tensor) -> Tensor:
        """Add `[B, t, 2, G, K]`; returns it with what is kept before it, `[B, min(alive, reach) + t, 2, G, K]`."""
        kept = min(self.alive, self.reach)
        old = self.buffer[:, self.end - kept : self.end]
        if torch.is_grad_enabled():
            # Autograd may hold what is there: join into new memory.
            self.buffer = torch.cat([old.to(new.dtype), new], dim=1) if kept else new
            self.end, self.shared = kept + new.shape[1], True
        else:
            self._make_room(old, new)
            self.buffer[:, self.end : self.end + new.shape[1]] = new
            self.end += new.shape[1]
        self.alive = kept + new.shape[1]
        return self.buffer[:, self.end - self.alive : self.end]

    def _make_room(self, old: Tensor, new: Tensor) -> None:
        """Room for `new` behind `old`. Twice what is needed, so that single tokens seldom move the rest."""
        kept, count = old.shape[1], new.shape[1]
        # Autocast may have begun or ended since: a buffer has one format, and queries must find it to be theirs.
        fixed = self.shared or self.buffer.dtype != new.dtype
        if not fixed and self.end + count <= self.buffer.shape[1]:
            return
        needed = self.lead + kept + count
        apart = self.end - kept >= self.lead + kept
        if fixed or not apart or needed > self.buffer.shape[1]:
            rows = max(needed, min(2 * needed, self.lead + self.reach + max(count, self.reach)))
            self.buffer = new.new_empty(new.shape[0], rows, *new.shape[2:])
        self.buffer[:, self.lead : self.lead + kept] = old
        self.end, self.shared = self.lead + kept, False

    def with_lead(self, lead: Tensor) -> Tensor:
        """What `append` returned, `lead` `[B, lead, 2, G, K]` in front of it. Writes: only after an owned append."""
        start = self.end - self.alive
        self.buffer[:, start - self.lead : start] = lead
        return self.buffer[:, start - self.lead : self.end]

    def fork(self) -> KeyValues:
        """The same, to be continued without touching this one."""
        return replace(self, shared=True)

    def detach(self) -> KeyValues:
        """The same without its graph, in memory of its own that holds no more than it must."""
        kept = min(self.alive, self.reach)
        rows = self.buffer[:, self.end - kept : self.end].detach().clone()
        return replace(self, buffer=rows, end=kept, alive=kept, shared=True)

    def trim(self) -> KeyValues:
        """The same, in less memory if more than half of its buffer is unused."""
        small = self.lead + min(self.alive, self.reach)
        return self.detach() if self.buffer.shape[1] > 2 * small else self
