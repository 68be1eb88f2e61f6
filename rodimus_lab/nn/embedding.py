"""The embedding of tokens, with a gradient that is quick on CUDA where one token fills most of a batch.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rodimus_lab.ops.tracing import opaque_operator

FILLER = 0  # MQAR's, in four of five places; in text a token like any other
PARTS = 512


class Embedding(nn.Embedding):
    """`nn.Embedding`, to whose gradient the rows of one token are added in many parts at once."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_cuda and torch.is_grad_enabled() and self.weight.requires_grad:
            return look_up(ids, self.weight)
        return super().forward(ids)


def look_up(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """`F.embedding(ids, weight_VD)`. Its gradient is the same but for the order in which `FILLER`'s rows are added,
    which is fixed: torch adds the rows of a token one after another, however many there are."""
    return _LookUp.apply(ids, weight_VD)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.size = weight_VD.shape[0]
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, _gradient(dy.contiguous(), ids, ctx.size)


@opaque_operator("embedding_gradient")
def _gradient(dy: Tensor, ids: Tensor, size: int) -> Tensor:
    ids = ids.flatten().int()  # They are sorted, in half the time if they are half as long.
    part = size + torch.arange(ids.numel(), device=ids.device, dtype=torch.int32) % PARTS
    spread = torch.where(ids == FILLER, part, ids)
    grad = torch.ops.aten.embedding_dense_backward(dy.reshape(-1, dy.shape[-1]), spread, size + PARTS, -1, False)
    grad[FILLER] = grad[size:].sum(0)
    return grad[:size]


@_gradient.register_fake
def _(dy: Tensor, ids: Tensor, size: int) -> Tensor:
    return dy.new_empty(size, dy.shape[-1])
