"""Normalisation layers, computed in float32 whatever the input."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind!r}, eps={self.eps}"
