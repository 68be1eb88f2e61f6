"""Rotary position embedding over the whole head, halves rotated together (not interleaved).

Shapes: B batch (or 1), T time, H heads, K head width.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rodimus_lab.nn.norm import at_least_fp32
from rodimus_lab.ops.tracing import opaque_operator


def rotary_table(positions_BT: Tensor, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """table_2BTK, K = width / 2: cosine and sine of positions * base^(-2i/width), in float32 (float64 for float64)."""
    return _table(positions_BT, width, base, dtype == torch.float64)


@cache
def rotary_frequency(width: int, base: float, device: torch.device) -> Tensor:
    """frequency_K, K = width / 2, in float64: the angle that each pair is turned by from one position to the next."""
    with torch.inference_mode(False):
        return base ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)


# Opaque to the compiler, which would otherwise compute a cosine and a power for every element of q and k.
@opaque_operator("rotary_table")
def _table(positions_BT: Tensor, width: int, base: float, double: bool) -> Tensor:
    exponent = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float64) / width
    angle_BTK = positions_BT.unsqueeze(-1) * base**-exponent
    table_2BTK = torch.stack([angle_BTK.cos(), angle_BTK.sin()])
    return table_2BTK if double else table_2BTK.float()


@_table.register_fake
def _(positions_BT: Tensor, width: int, base: float, double: bool) -> Tensor:
    dtype = torch.float64 if double else torch.float32
    return positions_BT.new_empty(2, *positions_BT.shape, width // 2, dtype=dtype)


def rotate(x_BTHK: Tensor, table_2BTK: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its angle."""
    cos, sin = table_2BTK.unsqueeze(-2)
    first, second = at_least_fp32(x_BTHK).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHK.dtype)
