"""Drawing tokens from logits.

Shapes: B rows, V vocabulary, C the candidates that are left, likeliest first.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rodimus_lab.config import Config

LEAST_TEMPERATURE = 1e-30


class Sampling(Config):
    """`temperature` 0 takes the likeliest token; `top_k` and `top_p` cut the tail first."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """token_B drawn from softmax(logits / temperature), cut to the `top_k` likeliest, then to the smallest set whose
    probability reaches `top_p`.

    Nothing here waits for the device, so the call may be captured in a CUDA graph.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest is 0 and the divisor no less than float32 can hold, so nothing becomes a NaN.
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logits_BC = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(sampling.temperature, LEAST_TEMPERATURE)
    order_BC = None
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BC, order_BC = logits_BC.topk(sampling.top_k)
    elif sampling.top_p is not None and sampling.top_p < 1:
        logits_BC, order_BC = logits_BC.sort(descending=True)
    share_BC = logits_BC.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        before_BC = share_BC.cumsum(-1) - share_BC
        share_BC = share_BC.masked_fill(before_BC >= sampling.top_p, 0.0)
    # The first of events at these rates: each comes first with its share of their sum.
    drawn_B1 = (share_BC / torch.empty_like(share_BC).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return (drawn_B1 if order_BC is None else order_BC.gather(-1, drawn_B1)).squeeze(-1)
