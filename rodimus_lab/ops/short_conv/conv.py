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
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import halo
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
        "packed": segments is not None,
        "state": state_BWD is not None,
    }
    run = choose("short_conv", backend, facts).run
    return run(x_BTD, weight_DW, bias_D, state_BWD, segments, silu)


def _history(
    x_BTD: Tensor, kept: int, state_BWD: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last `kept` inputs before x and x, each one's document, and the state after the last."""
    length, continued = x_BTD.shape[1], state_BWD is not None
    if state_BWD is None:
        state_BWD = x_BTD.new_zeros(x_BTD.shape[0], kept, x_BTD.shape[2])
    history, documents = torch.cat([state_BWD.to(x_BTD.dtype), x_BTD], dim=1), None
    if segments is not None:
        history, documents = _close_gap(history, segments, kept)
    new_state = history[:, length:]
    if documents is not None:
        new_state = new_state * (documents[:, length:] == documents[:, -1:]).unsqueeze(-1)
    elif continued and length > kept:
        new_state = new_state.clone()  # A view would keep the whole history in memory as long as the state.
    return history, documents, new_state


def _close_gap(history: Tensor, segments: Segments, kept: int) -> tuple[Tensor, Tensor]:
    """Move the state next to the first token of each row, over the left padding; with it, each input's document."""
    padding_B1 = (~segments.valid_BT).sum(1, keepdim=True)
    index = torch.arange(history.shape[1], device=history.device).expand(history.shape[:2])
    source = torch.where(index < kept + padding_B1, index - padding_B1, index)
    moved = history.gather(1, source.clamp(min=0).unsqueeze(-1).expand_as(history))
    moved = moved * (source >= 0).unsqueeze(-1)
    return moved, F.pad(segments.documents_BT, (kept, 0))


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
    history, documents, new_state = _history(x_BTD, width - 1, state_BWD, segments)
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
    history, _, new_state = _history(x_BTD, weight_DW.shape[1] - 1, state_BWD, segments)
    weight_DW = weight_DW.to(x_BTD.dtype)
    bias_D = None if bias_D is None else bias_D.to(x_BTD.dtype)
    y_BTD = F.conv1d(history.mT, weight_DW.unsqueeze(1), bias_D, groups=weight_DW.shape[0]).mT
    return F.silu(y_BTD) if silu else y_BTD, new_state


def _conv1d_why_not(packed: bool, **_: Any) -> str | None:
    return "it would mix packed documents" if packed else None


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.short_conv.triton import sliding

    return sliding(*arguments)


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


declare(
    "short_conv",
    Backend("triton", _triton, _triton_why_not, _triton_pays),
    Backend("taps", taps),
    Backend("conv1d", _conv1d, _conv1d_why_not),
    example={"dtype": torch.bfloat16, "length": 512, "width": 4, "packed": False, "state": False},
)
