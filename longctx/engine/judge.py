"""Can a row be true? Holds it against this machine's peaks. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longctx.analysis.plausibility import PEAK_MARGIN, is_impossible
from longctx.config import Cell
from longctx.engine.peaks import Peaks, keep_peaks, load_peaks, peaks_key
from longctx.results import BenchmarkResult

TRIES = 3
"""How often the peaks are measured again before a row is called impossible."""


class Judge:
    """Gives rows their roofline fraction, and the status `impossible` where it is due."""

    def __init__(self, environment: Mapping[str, Any], measure: Callable[[str], Peaks | None]) -> None:
        """measure: dtype -> peaks as they are measured now, in the process that measures; None where that fails."""
        self.key = peaks_key(environment)
        self.kind = "cuda" if environment.get("gpu") else "cpu"
        self._measure = measure
        self._peaks: Peaks | None = None

    def peaks(self, dtype: str, *, anew: bool = False) -> Peaks | None:
        """The best that is known for `dtype`: kept ones, measured where there are none, or again if `anew`."""
        self._peaks = self._peaks or load_peaks(self.key)
        if anew or self._peaks is None or dtype not in self._peaks.flops:
            found = self._measure(dtype)
            if found is not None:
                self._peaks = keep_peaks(self.key, found)
        return self._peaks

    def judge(self, row: BenchmarkResult, cell: Cell) -> None:
        """Fill in roofline_fraction, and turn an ok row whose time no machine like this can reach into `impossible`."""
        if not row.ok or row.forward_time_median is None:
            return
        bound_s = self._bound_s(row, cell)
        for _ in range(TRIES):
            if not is_impossible(row.forward_time_median, bound_s, device=self.kind):
                break
            # A peak that was measured while others worked is too low; now is when it must be right.
            bound_s = self._bound_s(row, cell, anew=True)
        else:
            if is_impossible(row.forward_time_median, bound_s, device=self.kind) and not self._peaks.contended:
                row.status = "impossible"
                row.error = {"type": "Impossible", "message": self._why(row, bound_s), "log_tail": None}
        row.roofline_fraction = bound_s / row.forward_time_median if bound_s else None

    def _bound_s(self, row: BenchmarkResult, cell: Cell, *, anew: bool = False) -> float:
        if row.flops is None and row.bytes is None:
            return 0.0
        peaks = self.peaks(cell.dtype, anew=anew)
        return peaks.bound_s(flops=row.flops, bytes=row.bytes, dtype=cell.dtype) if peaks else 0.0

    def _why(self, row: BenchmarkResult, bound_s: float) -> str:
        margin = PEAK_MARGIN[self.kind]
        return (
            f"it took {row.forward_time_median * 1e3:.3g} ms; at {margin:.0%} of the best seen here its work "
            f"takes {bound_s / margin * 1e3:.3g} ms: work is missing, or its cost model counts too much"
        )
