"""Fast functions of float32 for Triton kernels that should only wait for memory. The interpreter, which has no
libdevice, takes the exact ones."""

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
