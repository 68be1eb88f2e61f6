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
    """Of float32."""
    return times_sigmoid(1.0, x)


@triton.jit
def times_sigmoid(y, x):
    """y * sigmoid(x), which is a single quotient: no instruction more than the sigmoid. The interpreter has no
    libdevice."""
    if INTERPRETED:
        return y * tl.sigmoid(x)
    else:
        # Unlike -x, which is 0 - x, the product by -1 goes with the exponential's own.
        return libdevice.fast_dividef(y, 1.0 + libdevice.fast_expf(x * -1.0))
