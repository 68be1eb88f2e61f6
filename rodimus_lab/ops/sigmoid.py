"""The sigmoid of the Triton kernels. With the exact exponential and division it takes eleven instructions an element,
which shows where a kernel should only wait for memory; with the fast ones, good to a few units in float32's last place,
four."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def sigmoid(x):
    """Of float32. The interpreter has no libdevice."""
    if INTERPRETED:
        return tl.sigmoid(x)
    else:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
