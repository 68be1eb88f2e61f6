"""A linear layer on the few rows of a decoding step, with what stands around it in a block.

    y = act(norm(x)) W^T + bias + base

where norm is an RMSNorm and act SwiGLU's product, each optional. For few rows the time is that of reading W.

Shapes: B rows, D inputs, E outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.linear_step.rms import RMS
from rodimus_lab.ops.triton_facts import why_no_triton


def linear_step(
    x_BD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None = None,
    *,
    norm: RMS | None = None,
    gated: bool = False,
    base_BE: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_BE in `dtype`, which defaults to the weight's. With `gated`, x is (B, 2 D): u and g of u * SiLU(g).

    Backends other than "naive" run where gradients are off. Raises `UserError` for one that cannot run.
    """
    facts = {
        "device": x_BD.device.type,
        "dtype": weight_ED.dtype,
        "rows": x_BD.shape[0],
        "grad": torch.is_grad_enabled(),
    }
    run = choose("linear_step", backend, facts).run
    return run(x_BD, weight_ED, bias_E, norm, gated, base_BE, dtype or weight_ED.dtype)


def naive(
    x_BD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    norm: RMS | None,
    gated: bool,
    base_BE: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition: the norm in at least float32, all else in the weight's dtype."""
    if gated:
        u_BD, g_BD = x_BD.chunk(2, dim=-1)
        x_BD = u_BD * F.silu(g_BD)
    if norm is not None:
        wide = torch.promote_types(x_BD.dtype, torch.float32)
        x_BD = F.rms_norm(x_BD.to(wide), x_BD.shape[-1:], norm.weight_D.to(wide), norm.eps)
    y_BE = F.linear(x_BD.to(weight_ED.dtype), weight_ED, bias_E)
    return (y_BE if base_BE is None else base_BE + y_BE).to(dtype)


def _gemv(*arguments: Any) -> Tensor:
    from rodimus_lab.ops.linear_step.triton import gemv

    return gemv(*arguments)


def _skinny(*arguments: Any) -> Tensor:
    from rodimus_lab.ops.linear_step.triton import skinny

    return skinny(*arguments)


def _gemm(*arguments: Any) -> Tensor:
    from rodimus_lab.ops.linear_step.triton import gemm

    return gemm(*arguments)


def _gemm_why_not(device: str, dtype: torch.dtype, grad: bool, **_: Any) -> str | None:
    if grad:
        return "it has no backward pass"
    return why_no_triton(device) or ("it has no float64" if dtype == torch.float64 else None)


# More rows than the first are faster on tensor cores, more than the second in the vendor's library.
MAX_ROWS, SKINNY_ROWS = 3, 16


def _too_many(rows: int, most: int) -> str | None:
    return f"{rows} rows are more than {most}" if rows > most else None


def _gemv_why_not(rows: int, **facts: Any) -> str | None:
    return _gemm_why_not(**facts) or _too_many(rows, MAX_ROWS)


def _skinny_why_not(rows: int, **facts: Any) -> str | None:
    return _gemm_why_not(**facts) or _too_many(rows, SKINNY_ROWS)


declare(
    "linear_step",
    Backend("gemv", _gemv, _gemv_why_not),
    Backend("skinny", _skinny, _skinny_why_not),
    Backend("gemm", _gemm, _gemm_why_not),
    Backend("naive", naive),
    example={"dtype": torch.bfloat16, "rows": 1, "grad": False},
)
