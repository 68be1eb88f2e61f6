"""Rotary position embedding over the whole head, halves rotated together (not interleaved).

Shapes: B batch, T time, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rodimus_lab.nn.norm import at_least_fp32


def rotate(x_BTHK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Turn the pair (x_i, x_{i+K/2}) by positions * base^(-2i/K)."""
    half = x_BTHK.shape[-1] // 2
    wide = at_least_fp32(x_BTHK)
    exponent = torch.arange(half, device=x_BTHK.device, dtype=wide.dtype) / half
    angle_BT1K = (positions_BT.to(wide.dtype).unsqueeze(-1) * base**-exponent).unsqueeze(-2)
    cos, sin = angle_BT1K.cos(), angle_BT1K.sin()
    first, second = wide.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHK.dtype)
