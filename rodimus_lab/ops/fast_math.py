"""Fast functions of float32 for Triton kernels that should only wait for memory, good to a few units in the last place.
The interpreter, which has no libdevice, takes the exact ones."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def fast_exp(x):
    """Relative error about (2 + |x|) 2^-23, in two instructions; the exact one takes care of denormals as well."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def fast_log(x):
    """Of normal numbers, in two instructions: within 2^-22 near 1, elsewhere relatively."""
    if INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.fast_logf(x)


@triton.jit
def divide(y, x):
    """y / x in two instructions, of x up to 2^126."""
    if INTERPRETED:
        return y / x
    else:
        return libdevice.fast_dividef(y, x)


@triton.jit
def sigmoid(x):
    """In four instructions; with the exact exponential and division it takes eleven."""
    return times_sigmoid(1.0, x)


@triton.jit
def times_sigmoid(y, x):
    """y * sigmoid(x), which is a single quotient: no instruction more than the sigmoid."""
    if INTERPRETED:
        return y * tl.sigmoid(x)
    else:
        # Unlike -x, which is 0 - x, the product by -1 goes with the exponential's own.
        return libdevice.fast_dividef(y, 1.0 + libdevice.fast_expf(x * -1.0))
