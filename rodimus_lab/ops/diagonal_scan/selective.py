"""The selective scan of state-space models (S4D, Mamba): one call, several backends.

Shapes: B batch, T time, M channels, N state expansion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.diagonal_scan.dispatch import starts_BT
from rodimus_lab.ops.diagonal_scan.naive import selective_naive
from rodimus_lab.ops.diagonal_scan.selective_chunked import selective_chunked
from rodimus_lab.ops.diagonal_scan.step import selective_step
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.mamba_ssm import has_cuda_build
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.triton_facts import why_no_triton


def selective_scan(
    u_BTM: Tensor,
    dt_BTM: Tensor,
    A_MN: Tensor,
    B: Tensor,
    C: Tensor,
    D_M: Tensor | None = None,
    *,
    state_BMN: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t * u_t)^T B_t, y_t = h_t C_t + D * u_t (Mamba's discretisation).

    A <= 0 and dt >= 0 in at least float32. B and C are (B, T, N), or (M, N) where they do not change in time. The state
    is float32 (float64 for float64 inputs), and only a few tokens' states are ever in memory. Padding tokens of
    `segments` leave the state alone and give 0; each document after the first starts from a zero state.

    Returns y_BTM in u's dtype and the state after the last token. Raises `UserError` for a backend that cannot run.
    """
    refuse_no_tokens("selective_scan", u_BTM.shape[1])
    wide = torch.promote_types(u_BTM.dtype, torch.float32)
    dt_BTM = dt_BTM.to(wide).expand(u_BTM.shape)
    facts = {
        "device": u_BTM.device.type,
        "length": u_BTM.shape[1],
        "dtype": u_BTM.dtype,
        "packed": segments is not None,
        "continued": state_BMN is not None,
        "expansion": A_MN.shape[1],
    }
    if state_BMN is None:
        state_BMN = u_BTM.new_zeros(u_BTM.shape[0], *A_MN.shape, dtype=wide)
    starts = padding_BT1 = None
    if segments is not None:
        starts, padding_BT1 = starts_BT(segments), ~segments.valid_BT.unsqueeze(-1)
        dt_BTM, u_BTM = dt_BTM.masked_fill(padding_BT1, 0.0), u_BTM.masked_fill(padding_BT1, 0.0)
    run = choose("selective_scan", backend, facts).run
    # Under autocast each state would be rounded before it is read.
    with torch.autocast(u_BTM.device.type, enabled=False):
        y_BTM, state_BMN = run(u_BTM, dt_BTM, A_MN.to(wide), B, C, state_BMN.to(wide), starts)
    if D_M is not None:
        y_BTM = y_BTM + D_M * u_BTM
    y_BTM = y_BTM.to(u_BTM.dtype)
    return (y_BTM if padding_BT1 is None else y_BTM.masked_fill(padding_BT1, 0.0)), state_BMN


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.diagonal_scan.selective_triton import selective_fused

    return selective_fused(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, expansion: int, **_: Any) -> str | None:
    if dtype == torch.float64:
        return "it has no float64"
    if expansion > 64:
        return f"the state expansion {expansion} is over 64"
    return why_no_triton(device)


def _mamba_ssm(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: None) -> Any:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # Its kernel wants all in one dtype, and steps are too fine for bfloat16; it has time last.
    u_BMT, dt_BMT, B, C = (x.float() if x.ndim == 2 else x.float().transpose(1, 2) for x in (u, dt, B, C))
    y_BMT, last_BMN = selective_scan_fn(u_BMT, dt_BMT, A.contiguous(), B, C, return_last_state=True)
    return y_BMT.transpose(1, 2), last_BMN.detach()


def _mamba_ssm_why_not(device: str, dtype: torch.dtype, packed: bool, continued: bool, **_: Any) -> str | None:
    if device != "cuda":
        return "mamba-ssm's kernel needs a CUDA device"
    if not installed("mamba_ssm") or not has_cuda_build():
        return "mamba-ssm with its CUDA build is not installed (pip install -e '.[gpu]' on a CUDA machine)"
    if packed or continued:
        return "it starts from nothing and knows neither padding nor packed documents"
    return "it has no float64" if dtype == torch.float64 else None


def _one_step_why_not(length: int, **_: Any) -> str | None:
    return None if length == 1 else "it is for one token at a time"


declare(
    "selective_scan",
    Backend("step", selective_step, _one_step_why_not),
    Backend("triton", _triton, _triton_why_not),
    Backend("chunked", selective_chunked),
    Backend("mamba_ssm", _mamba_ssm, _mamba_ssm_why_not),
    Backend("naive", selective_naive),
    example={"length": 512, "dtype": torch.bfloat16, "packed": False, "continued": False, "expansion": 16},
)
