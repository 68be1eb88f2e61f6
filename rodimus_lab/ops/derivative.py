"""Backward passes that have no derivative themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, but that a second derivative is refused whichever way it goes: torch's is wrong without a word where
    it goes through what the forward pass saved."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        sources = [x for x in (*ctx.saved_tensors, *gradients) if isinstance(x, Tensor) and x.requires_grad]
        if not sources:
            return results
        if isinstance(results, Tensor):
            return _Refusal.apply(results, *sources)
        return tuple(x if x is None else _Refusal.apply(x, *sources) for x in results)

    return run


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("this backend cannot be differentiated twice; use backend='naive'")
