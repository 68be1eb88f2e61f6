"""What a Rodimus block makes of x before the recurrence: the short convolution with SiLU, and the value gate (Eq. 10).

    x'_t = SiLU(conv_bias + sum_j conv_weight[:, W-1-j] * x_{t-j}),  j = 0 .. W-1
    v    = x * sigmoid(x W_1 W_2 + b)

Shapes: B batch, T time, M width, W convolution width, R rank of the gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import halo, sequence_shard, sharded_sequence
from rodimus_lab.ops.short_conv import short_conv
from rodimus_lab.ops.triton_facts import why_no_triton

MAX_RANK, MAX_WIDTH = 128, 8


class LowRankGate(NamedTuple):
    """sigmoid(x W_1 W_2 + b), the matrices as `nn.Linear` keeps them."""

    down_RM: Tensor
    up_MR: Tensor
    bias_M: Tensor


def conv_gate(
    x_BTM: Tensor,
    conv_weight_MW: Tensor | None,
    conv_bias_M: Tensor | None,
    gate: LowRankGate | None,
    *,
    state_BWM: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x'_BTM and v_BTM in x's dtype, whatever the parameters', and the state after the last token.

    Without a convolution x' = SiLU(x) and the state stays what it is; without a gate v = x. For `state_BWM`, the last
    W-1 inputs, and `segments` see `short_conv`. Raises `UserError` for a backend that cannot run.
    """
    split = sequence_shard() is not None
    if split and conv_weight_MW is not None:
        state_BWM = halo("the short convolution", x_BTM, conv_weight_MW.shape[1] - 1, state_BWM, segments)
    facts = {
        "device": x_BTM.device.type,
        "dtype": x_BTM.dtype,
        "whole": conv_weight_MW is not None and conv_bias_M is not None and gate is not None,
        "rank": 0 if gate is None else gate.down_RM.shape[0],
        "width": 0 if conv_weight_MW is None else conv_weight_MW.shape[1],
        "packed": segments is not None,
        "state": state_BWM is not None,
    }
    run = choose("conv_gate", backend, facts).run
    if not split:
        return run(x_BTM, conv_weight_MW, conv_bias_M, gate, state_BWM, segments)
    with sharded_sequence(None):  # The convolution inside has what it needs of other ranks.
        return run(x_BTM, conv_weight_MW, conv_bias_M, gate, state_BWM, segments)


def composed(
    x_BTM: Tensor,
    conv_weight_MW: Tensor | None,
    conv_bias_M: Tensor | None,
    gate: LowRankGate | None,
    state_BWM: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, of one operator after the other."""
    v_BTM = x_BTM
    if conv_weight_MW is None:
        conv_BTM = F.silu(x_BTM)
    else:
        conv_BTM, state_BWM = short_conv(
            x_BTM, conv_weight_MW, conv_bias_M, silu=True, state_BWD=state_BWM, segments=segments
        )
    if gate is not None:
        down_RM, up_MR, bias_M = (weight.to(x_BTM.dtype) for weight in gate)
        v_BTM = x_BTM * F.linear(F.linear(x_BTM, down_RM), up_MR, bias_M).sigmoid()
    return conv_BTM, v_BTM, state_BWM


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.conv_gate.triton import fused

    return fused(*arguments)


def _triton_why_not(
    device: str, dtype: torch.dtype, whole: bool, rank: int, width: int, packed: bool, state: bool
) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if dtype == torch.float64:
        return "it has no float64"
    if not whole:
        return "it takes a convolution with bias and a gate together"
    if packed and state:
        return "it takes packed or padded documents without a state only"
    if rank > MAX_RANK:
        return f"the rank {rank} is over {MAX_RANK}"
    return None if width <= MAX_WIDTH else f"the convolution's width {width} is over {MAX_WIDTH}"


declare(
    "conv_gate",
    Backend("triton", _triton, _triton_why_not),
    Backend("naive", composed),
    example={"dtype": torch.bfloat16, "whole": True, "rank": 16, "width": 4, "packed": False, "state": False},
)
