"""Gradients of weights over many slabs of rows, summed in fp32 at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.ops.precision import wide_dtype


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


class GradientSums:
    """Gradients of named parameters, each summed over slabs in fp32 or better."""

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Parameters beyond the names, or names beyond the parameters, are left out."""
        self.parameters = dict(zip(names, parameters, strict=False))
        self.sums = {name: WeightGradient() for name in self.parameters}

    def add(self, name: str, value: Tensor) -> None:
        """value: of the shape of the parameter, and not written to by the caller afterwards."""
        mine = self.sums[name]
        value = value.to(wide_dtype(value.dtype))
        mine.total = value if mine.total is None else mine.total + value

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right, both with their rows flattened."""
        # A view is a microsecond or two of the host's time, and a backward pass has hundreds.
        left, right = (rows if rows.dim() == 2 else rows.flatten(0, -2) for rows in (left, right))
        self.sums[name].add(left, right)

    def total(self, name: str) -> Tensor:
        """The sum so far, zeros if nothing was added."""
        found, like = self.sums[name].total, self.parameters[name]
        # Of a bias it may have been a matrix of one row.
        return like.new_zeros(like.shape, dtype=wide_dtype(like.dtype)) if found is None else found.view(like.shape)

    def used_here(self) -> None:
        """Say that sums which were made on another CUDA stream are used on this one, until they are let go."""
        for mine in self.sums.values():
            if mine.total is not None:
                mine.total.record_stream(torch.cuda.current_stream(mine.total.device))

    def finished(self) -> list[Tensor]:
        """In the order and the dtypes of the parameters, in memory of their own."""
        return in_formats_of(list(self.parameters.values()), [self.total(name) for name in self.parameters])


def in_formats_of(parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
    """sums, each in the dtype of its parameter and in memory of its own: one launch for them all."""
    found = [torch.empty_like(like, memory_format=torch.contiguous_format) for like in parameters]
    torch._foreach_copy_(found, sums)
    return found
