"""Data-dependent tempered selection: what the recurrence forgets and how much of a key it takes in (Eq. 9 to 11).

    g = softplus(a + b_g),  tau = sigmoid(t + b_tau)           (a, t): the logits
    log alpha = -g tau,     k' = g^tau * k / |k|

Shapes: B batch, T time, n state expansion, r = 2n logits, or n where tau is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.triton_facts import why_no_triton

MAX_KEYS = 1024
EPS = 1e-12


def tempered_selection(
    k_BTn: Tensor,
    logits_BTr: Tensor,
    bias_r: Tensor,
    *,
    tau: float = 1.0,
    key_norm: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """log alpha_BTn in at least float32, and k'_BTn in k's dtype. `tau` counts where the logits are those of g alone; 1
    leaves the temperature out. Raises `UserError` for a backend that cannot run."""
    facts = {
        "device": k_BTn.device.type,
        "dtype": k_BTn.dtype,
        "whole": key_norm and logits_BTr.shape[-1] == 2 * k_BTn.shape[-1],
        "keys": k_BTn.shape[-1],
    }
    return choose("tempered_selection", backend, facts).run(k_BTn, logits_BTr, bias_r, tau, key_norm)


def composed(
    k_BTn: Tensor, logits_BTr: Tensor, bias_r: Tensor, tau: float | Tensor, key_norm: bool
) -> tuple[Tensor, Tensor]:
    """The definition, g^tau as exp(tau log g)."""
    n, dtype = k_BTn.shape[-1], k_BTn.dtype
    wide = torch.promote_types(dtype, torch.float32)
    k_BTn, logits_BTr = k_BTn.to(wide), logits_BTr.to(wide) + bias_r
    if key_norm:
        k_BTn = F.normalize(k_BTn, dim=-1, eps=EPS)
    a_BTn = logits_BTr[..., :n]
    if logits_BTr.shape[-1] > n:
        tau = logits_BTr[..., n:].sigmoid()
    return -F.softplus(a_BTn) * tau, ((tau * log_softplus(a_BTn)).exp() * k_BTn).to(dtype)


def log_softplus(x: Tensor) -> Tensor:
    """log(softplus(x)), which is x itself to rounding far below 0, where softplus underflows."""
    low = x < -30
    return torch.where(low, x, F.softplus(x.masked_fill(low, 0.0)).log())


def _triton(k_BTn: Tensor, logits_BTr: Tensor, bias_r: Tensor, tau: float, key_norm: bool) -> Any:
    from rodimus_lab.ops.tempered_selection.triton import fused

    return fused(k_BTn, logits_BTr, bias_r, EPS)


def _triton_why_not(device: str, dtype: torch.dtype, whole: bool, keys: int) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if dtype == torch.float64:
        return "it has no float64"
    if not whole:
        return "it takes logits of g and tau, and normalises keys"
    return None if keys <= MAX_KEYS else f"{keys} keys are over {MAX_KEYS}"


declare(
    "tempered_selection",
    Backend("triton", _triton, _triton_why_not),
    Backend("naive", composed),
    example={"dtype": torch.bfloat16, "whole": True, "keys": 64},
)
