"""Kernels that start while the one before them is still running.

With programmatic dependent launch (Hopper and newer) a kernel is started as soon as every program of the one before it
has said `gdc_launch_dependents`. What it does before `gdc_wait` overlaps with that kernel; after it, everything that
the kernels before it wrote is visible. So a decoding kernel first loads what no kernel of the same step writes
(weights, its own state) and then waits. Every kernel waits, so that each one's end is the end of all before it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "launch_options"]


def launch_options(x: Tensor) -> dict[str, Any]:
    """`PDL` for the kernel, and the launch option that goes with it, on the device of `x`."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and _can_overlap(x.device) else {"PDL": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
