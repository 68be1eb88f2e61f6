"""RWKV-4's weighted means: one call, several backends.

Shapes: B batch, T time, D channels; 2: numerator, denominator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.triton_facts import why_no_triton
from rodimus_lab.ops.wkv.naive import naive
from rodimus_lab.ops.wkv.scan import scan


def wkv(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_w_D: Tensor,
    bonus_D: Tensor,
    sums_BD2: Tensor | None = None,
    top_BD: Tensor | None = None,
    segments: Segments | None = None,
    *,
    last_state: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """wkv_t = (sum_{i<t} exp(k_i + (t-1-i) log_w) v_i + exp(k_t + bonus) v_t) / (the same without v).

    `log_w_D` is <= 0. A state is the two sums over exp(top), in at least float32. Padding tokens of `segments` leave it
    alone, and what they give is arbitrary; each document after the first starts without any.

    Returns wkv_BTD in v's dtype and the state after the last token, without `last_state` two empty tensors. Raises
    `UserError` for a backend that cannot run.
    """
    refuse_no_tokens("wkv", v_BTD.shape[1])
    facts = {
        "device": v_BTD.device.type,
        "dtype": v_BTD.dtype,
        "state": sums_BD2 is not None or last_state,
        "packed": segments is not None,
    }
    run = choose("wkv", backend, facts).run
    o_BTD, sums_BD2, top_BD = run(k_BTD, v_BTD, log_w_D, bonus_D, sums_BD2, top_BD, segments)
    if not last_state:
        sums_BD2 = top_BD = o_BTD.new_empty(0)
    return o_BTD.to(v_BTD.dtype), sums_BD2, top_BD


def _triton(
    k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor, sums: None, top: None, segments: None
) -> tuple[Tensor, Tensor, Tensor]:
    from rodimus_lab.ops.wkv.triton import fused

    return fused(k, v, log_w, bonus), v.new_empty(0), v.new_empty(0)


def _triton_why_not(device: str, dtype: torch.dtype, state: bool, packed: bool, **_: Any) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if state:
        return "it takes no state and gives none"
    if packed:
        return "padding and packed documents go through another path"
    return "it has no float64" if dtype == torch.float64 else None


declare(
    "wkv",
    Backend("triton", _triton, _triton_why_not),
    Backend("scan", scan),
    Backend("naive", naive),
    example={"dtype": torch.bfloat16, "state": False, "packed": False},
)
