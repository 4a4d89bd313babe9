"""The gradient of a weight over many slabs of rows, summed in fp32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """Sum over slabs of grad^T @ rows, `[W, D]`, for grad `[t, W]` and rows `[t, D]`."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, grad: Tensor, rows: Tensor) -> None:
        half = grad.dtype in (torch.float16, torch.bfloat16)
        if half and grad.is_cuda:
            # Rounding each slab's product to half precision first would cost more than all slabs together may be off.
            if self.total is None:
                self.total = torch.mm(grad.t(), rows, out_dtype=torch.float32)
            else:
                torch.addmm(self.total, grad.t(), rows, out_dtype=torch.float32, out=self.total)
        elif half:
            product = torch.mm(grad.t(), rows).float()
            self.total = product if self.total is None else self.total.add_(product)
        elif self.total is None:
            self.total = torch.mm(grad.t(), rows)
        else:
            self.total.addmm_(grad.t(), rows)
