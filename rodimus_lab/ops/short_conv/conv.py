"""Causal depthwise convolution over time, with its last inputs as state, and SiLU after it where it is asked for.

    y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}, j = 0 .. W-1

Shapes: B batch, T time, D channels, W kernel width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import halo
from rodimus_lab.ops.short_conv.state import history_of, last_inputs
from rodimus_lab.ops.triton_facts import why_no_triton

MAX_WIDTH = 8


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = False,
    state_BWD: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve within each document, in x's dtype whatever the parameters'; with `silu`, SiLU(y) for y. `state_BWD`
    holds the last W-1 inputs, oldest first (zeros at the start).

    Returns y_BTD and the state after the last token. Padding reads as nothing, wherever it stands; its own outputs are
    arbitrary. Raises `UserError` for a backend that cannot run.
    """
    width = weight_DW.shape[1]
    state_BWD = halo("the short convolution", x_BTD, width - 1, state_BWD, segments)
    facts = {
        "device": x_BTD.device.type,
        "dtype": x_BTD.dtype,
        "length": x_BTD.shape[1],
        "width": width,
        "channels": weight_DW.shape[0],
        "packed": segments is not None,
        "state": state_BWD is not None,
    }
    run = choose("short_conv", backend, facts).run
    return run(x_BTD, weight_DW, bias_D, state_BWD, segments, silu)


def taps(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments: Segments | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: one shifted product a tap; a compiler fuses them into one pass."""
    width, length = weight_DW.shape[1], x_BTD.shape[1]
    history, documents, new_state = history_of(x_BTD, width - 1, state_BWD, segments)
    weight_DW = weight_DW.to(x_BTD.dtype)
    y_BTD = x_BTD.new_zeros(()) if bias_D is None else bias_D.to(x_BTD.dtype)
    for tap in range(width):
        term = history[:, tap : tap + length] * weight_DW[:, tap]
        if documents is not None and tap < width - 1:
            term = term * (documents[:, tap : tap + length] == documents[:, -length:]).unsqueeze(-1)
        y_BTD = y_BTD + term
    return F.silu(y_BTD) if silu else y_BTD, new_state


def _conv1d(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_BWD: Tensor | None, segments: None, silu: bool
) -> tuple[Tensor, Tensor]:
    history, _, new_state = history_of(x_BTD, weight_DW.shape[1] - 1, state_BWD, segments)
    weight_DW = weight_DW.to(x_BTD.dtype)
    bias_D = None if bias_D is None else bias_D.to(x_BTD.dtype)
    y_BTD = F.conv1d(history.mT, weight_DW.unsqueeze(1), bias_D, groups=weight_DW.shape[0]).mT
    return F.silu(y_BTD) if silu else y_BTD, new_state


def _conv1d_why_not(packed: bool, **_: Any) -> str | None:
    return "it would mix packed documents" if packed else None


def _causal_conv1d(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_BWD: None, segments: None, silu: bool
) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn

    y_BDT = causal_conv1d_fn(x_BTD.mT, weight_DW, bias_D, activation="silu" if silu else None)
    return y_BDT.mT, last_inputs(x_BTD, weight_DW.shape[1] - 1, None, None)


def _causal_conv1d_why_not(width: int, channels: int, **facts: Any) -> str | None:
    if reason := _peer_why_not("causal_conv1d", "causal-conv1d", **facts):
        return reason
    if channels % 8:
        return f"the {channels} channels are no multiple of 8"
    return None if width in (2, 3, 4) else f"its widths are 2 to 4, not {width}"


def _fla(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_BWD: None, segments: None, silu: bool
) -> tuple[Tensor, Tensor]:
    from fla.modules.convolution import causal_conv1d

    y_BTD, _ = causal_conv1d(x_BTD, weight_DW, bias_D, activation="silu" if silu else None)
    return y_BTD, last_inputs(x_BTD, weight_DW.shape[1] - 1, None, None)


def _fla_why_not(width: int, channels: int, **facts: Any) -> str | None:
    return _peer_why_not("fla", "flash-linear-attention", **facts)


def _peer_why_not(
    package: str, name: str, *, device: str, dtype: torch.dtype, packed: bool, state: bool, **_: Any
) -> str | None:
    if device != "cuda":
        return f"{name}'s kernels need a CUDA device"
    if not installed(package):
        return f"{name} is not installed (pip install -e '.[gpu]' on a CUDA machine)"
    if packed or state:
        return "it is for whole sequences without a state"
    return "it has no float64" if dtype == torch.float64 else None


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.short_conv.triton import fused

    return fused(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, width: int, packed: bool, state: bool, **_: Any) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if dtype == torch.float64:
        return "it has no float64"
    if packed and state:
        return "it takes packed or padded documents without a state only"
    return None if width <= MAX_WIDTH else f"the width {width} is over {MAX_WIDTH}"


def _triton_pays(length: int, width: int, **_: Any) -> bool:
    """A shift by one token, or a single token, goes better with what stands beside it."""
    return length > 1 and width > 2


def _never_pays(**_: Any) -> bool:
    """By name only, to measure against."""
    return False


declare(
    "short_conv",
    Backend("triton", _triton, _triton_why_not, _triton_pays),
    Backend("causal_conv1d", _causal_conv1d, _causal_conv1d_why_not, _never_pays),
    Backend("fla", _fla, _fla_why_not, _never_pays),
    Backend("taps", taps),
    Backend("conv1d", _conv1d, _conv1d_why_not),
    example={"dtype": torch.bfloat16, "length": 512, "width": 4, "channels": 1024, "packed": False, "state": False},
)
