"""What a stream of BLADE carries on from one call to the next.

Letters: B batch, n tokens of a chunk, D d_model, G num_kv_heads, K head width, C chunk_size, N state_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from longctx.blocks._states import Tape
from longctx.ops.decode import Live, Stream

if TYPE_CHECKING:
    from longctx.blocks.blade import BLADEBlock


@dataclass(kw_only=True, eq=False)
class BLADEState:
    """What a stream carries on.

    s: the recurrent state `[B, N]` as if the current chunk ended here. start: the one that the current chunk began
    with. total: sum of y over the chunk's tokens so far, `[B, D]`. All three in fp32, or fp64 in an fp64 block.
    kv: keys and values of the chunk's tokens so far, without injection, `[B, n < C, 2GK]`. tape: what kv lies on.
    """

    s: Tensor
    start: Tensor
    total: Tensor
    kv: Tensor
    tape: Tape | None = None

    def detach(self) -> BLADEState:
        """The same state, cut off from the graph of what came before."""
        # A copy: in training the keys are rows of a larger tensor, which would be kept alive.
        return BLADEState(
            s=self.s.detach(),
            start=self.start.detach(),
            total=self.total.detach(),
            kv=self.kv.detach().clone(),
        )


@dataclass(kw_only=True, eq=False)
class BLADEStream(Stream):
    """What a stream carries on where steps are replays of a CUDA graph. start: as in `BLADEState`."""

    block: BLADEBlock
    live: Live
    start: Tensor

    @property
    def s(self) -> Tensor:
        """The recurrent state as if the current chunk ended here."""
        count = self.live.count
        return self.start.clone() if count == 0 else self.block.project_state(self.live.total() / count)

    def detach(self) -> BLADEState:
        # A copy: autograd refuses to save what inference mode made.
        start = self.start.clone()
        return BLADEState(s=self.s, start=start, total=self.live.total(), kv=self.live.recent())
