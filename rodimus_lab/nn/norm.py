"""Normalisation layers, computed in float32 whatever the input."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rodimus_lab.ops.linear_step import RMS, linear_step

NormKind = Literal["rms", "layer"]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself in float32 or float64, else its float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Norm(nn.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm with bias (`"layer"`) over the last dimension; keeps shape and dtype."""

    def __init__(self, width: int, kind: NormKind = "rms", eps: float = 1e-5):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @staticmethod
    def num_params(width: int, kind: NormKind) -> int:
        return width * (2 if kind == "layer" else 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        if self.bias is None:
            y = F.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps)
        else:
            y = F.layer_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps)
        return y.to(x.dtype)

    @property
    def rms(self) -> RMS | None:
        """What a kernel needs to know of it, where it is an RMSNorm."""
        return RMS(self.weight, self.eps) if self.bias is None else None

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind!r}, eps={self.eps}"


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear and nothing more, so that its weight is all there is to it."""
    return type(layer) is nn.Linear


def linear_of_step(
    x_BD: Tensor,
    linear: nn.Linear,
    norm: Norm | None = None,
    *,
    gated: bool = False,
    base_BE: Tensor | None = None,
) -> Tensor:
    """base + linear(act(norm(x))) of the few rows of a decoding step; see `linear_step`."""
    if norm is not None and norm.rms is None:
        x_BD, norm = norm(x_BD), None
    if not is_plain(linear):
        x_BD = x_BD if norm is None else norm(x_BD)
        if gated:
            up_BF, gate_BF = x_BD.chunk(2, dim=-1)
            x_BD = F.silu(gate_BF) * up_BF
        return linear(x_BD) if base_BE is None else base_BE + linear(x_BD)
    rms = None if norm is None else norm.rms
    return linear_step(x_BD, linear.weight, linear.bias, norm=rms, gated=gated, base_BE=base_BE)
