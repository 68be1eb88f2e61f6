"""One decoding step of a whole Rodimus sublayer, from the residual stream back to it; the state is overwritten.

The formulas are those of `rodimus_lab/nn/rodimus.py` with g, tau, a value gate, normalised keys, a short convolution
and the feedthrough all present: the paper's model. Other settings take the module's general path.

Shapes: B rows, D model width, M inner width, n state expansion, R rank of the value gate, W convolution width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.linear_step import linear_step
from rodimus_lab.ops.rodimus_step.weights import RodimusWeights
from rodimus_lab.ops.triton_facts import why_no_triton


def rodimus_step(
    x_BD: Tensor,
    base_BD: Tensor,
    conv_BWM: Tensor,
    memory_B1nM: Tensor,
    weights: RodimusWeights,
    *,
    backend: str = "auto",
) -> Tensor:
    """base + Rodimus(norm(x)) for one token a row; `conv_BWM` and `memory_B1nM` become the state after it.

    Forward only. Raises `UserError` for a backend that cannot run.
    """
    facts = {
        "device": x_BD.device.type,
        "dtype": weights.fc_2MD.dtype,
        "key_width": memory_B1nM.shape[-2],
        "grad": torch.is_grad_enabled(),
    }
    return choose("rodimus_step", backend, facts).run(x_BD, base_BD, conv_BWM, memory_B1nM, weights)


def naive(x_BD: Tensor, base_BD: Tensor, conv_BWM: Tensor, memory_B1nM: Tensor, weights: RodimusWeights) -> Tensor:
    """The definition; gates, the state's update and the last norm in at least float32."""
    n, dtype = memory_B1nM.shape[-2], weights.fc_2MD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x_BM, z_BM = linear_step(x_BD, weights.fc_2MD, norm=weights.norm, backend="naive").chunk(2, dim=-1)
    history = torch.cat([conv_BWM.to(dtype), x_BM.unsqueeze(1)], dim=1)
    conv_BM = F.silu((history * weights.conv_MW.T).sum(1) + weights.conv_bias_M)
    q_Bn, k_Bn, gates_B2n = F.linear(conv_BM, weights.state_proj_EM).to(wide).split([n, n, 2 * n], dim=-1)
    logit_g_Bn, logit_tau_Bn = (gates_B2n + weights.gate_bias_2n).chunk(2, dim=-1)
    g_Bn, tau_Bn = F.softplus(logit_g_Bn), logit_tau_Bn.sigmoid()
    log_g_Bn = torch.where(logit_g_Bn < -30, logit_g_Bn, F.softplus(logit_g_Bn.clamp(min=-30)).log())
    k_Bn = (tau_Bn * log_g_Bn).exp() * F.normalize(k_Bn, dim=-1, eps=1e-12)
    gate_BM = F.linear(F.linear(x_BM, weights.gate_down_RM), weights.gate_up_MR, weights.gate_up_bias_M).sigmoid()
    v_BM = (gate_BM * x_BM).to(wide)
    kept_BnM = (-g_Bn * tau_Bn).exp().unsqueeze(2) * memory_B1nM.squeeze(1).to(wide)
    state_BnM = kept_BnM + k_Bn.unsqueeze(2) * v_BM.unsqueeze(1)
    o_BM = (n**-0.5 * q_Bn.unsqueeze(2) * state_BnM).sum(1)
    y_BM = (o_BM + weights.feedthrough_M.to(wide) * conv_BM) * F.silu(z_BM)
    conv_BWM.copy_(history[:, 1:])
    memory_B1nM.copy_(state_BnM.unsqueeze(1))
    return linear_step(y_BM, weights.out_DM, norm=weights.out_norm, base_BE=base_BD, backend="naive")


def _triton(*arguments: Any) -> Tensor:
    from rodimus_lab.ops.rodimus_step.triton import fused

    return fused(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, key_width: int, grad: bool) -> str | None:
    if grad:
        return "it has no backward pass"
    if dtype == torch.float64:
        return "it has no float64"
    return why_no_triton(device) or (f"the key width {key_width} is over 256" if key_width > 256 else None)


declare(
    "rodimus_step",
    Backend("triton", _triton, _triton_why_not),
    Backend("naive", naive),
    example={"dtype": torch.bfloat16, "key_width": 64, "grad": False},
)
