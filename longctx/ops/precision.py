"""The number format of what is summed, carried on or scored."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where it comes of fp64: sums over tokens, states and scores of half precision are kept in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(device_type: str) -> bool:
    """Whether autocast chooses formats on devices of this type, of which torch asks some only by an error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
