"""The gates of one token, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + e^x), precise to rounding where it is small as well: log1p(e) = 2 artanh(e / (2 + e)), e <= 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    t = s * s
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def decay_and_key(g_logit, tau_logit, k):
    """exp(-g tau), and g^tau times k at unit length, of one row."""
    g, tau = _softplus(g_logit), tl.sigmoid(tau_logit)
    log_g = tl.where(g_logit < -30.0, g_logit, tl.log(tl.maximum(g, 1e-30)))
    return tl.exp(-g * tau), k * tl.exp(tau * log_g) / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), 1e-12)
