"""What a Rodimus block makes of the recurrence's output: the feedthrough, the output gate and the norm.

    y = RMSNorm((o + feedthrough * x') * SiLU(z)) * weight

Shapes: B batch, T time, M width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.triton_facts import why_no_triton

MAX_WIDTH = 16384


def gated_norm(
    o_BTM: Tensor,
    x_BTM: Tensor,
    z_BTM: Tensor,
    feedthrough_M: Tensor | None,
    weight_M: Tensor,
    *,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """y_BTM in o's dtype, worked out in at least float32; `eps` is added to the mean square. Without a feedthrough x is
    not read. Raises `UserError` for a backend that cannot run."""
    facts = {
        "device": o_BTM.device.type,
        "dtype": o_BTM.dtype,
        "feedthrough": feedthrough_M is not None,
        "width": o_BTM.shape[-1],
    }
    return choose("gated_norm", backend, facts).run(o_BTM, x_BTM, z_BTM, feedthrough_M, weight_M, eps)


def composed(
    o_BTM: Tensor, x_BTM: Tensor, z_BTM: Tensor, feedthrough_M: Tensor | None, weight_M: Tensor, eps: float
) -> Tensor:
    """The definition."""
    wide = torch.promote_types(o_BTM.dtype, torch.float32)
    y_BTM = o_BTM.to(wide)
    if feedthrough_M is not None:
        y_BTM = y_BTM + feedthrough_M.to(wide) * x_BTM
    y_BTM = y_BTM * F.silu(z_BTM.to(wide))
    return F.rms_norm(y_BTM, y_BTM.shape[-1:], weight_M.to(wide), eps).to(o_BTM.dtype)


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.gated_norm.triton import fused

    return fused(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, feedthrough: bool, width: int) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if dtype == torch.float64:
        return "it has no float64"
    if not feedthrough:
        return "it takes a feedthrough"
    return None if width <= MAX_WIDTH else f"the width {width} is over {MAX_WIDTH}"


declare(
    "gated_norm",
    Backend("triton", _triton, _triton_why_not),
    Backend("naive", composed),
    example={"dtype": torch.bfloat16, "feedthrough": True, "width": 4096},
)
