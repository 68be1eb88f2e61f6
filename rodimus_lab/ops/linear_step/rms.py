"""An RMSNorm as a kernel sees it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RMS(NamedTuple):
    """x * weight / sqrt(mean(x^2) + eps)."""

    weight_D: Tensor
    eps: float
