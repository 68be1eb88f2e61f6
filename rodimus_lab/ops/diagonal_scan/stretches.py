"""Time split in stretches, where batch and channels alone do not fill a GPU: each is walked from zero, the states are
chained from stretch to stretch, and each is walked again from its true start.

Shapes: B batch, S stretches, X any further dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Programs that fill a GPU (an H200 has 132 multiprocessors, each with room for a dozen), and the fewest tokens that are
# worth a stretch of their own.
ENOUGH_PROGRAMS = 1024
MIN_STRETCH = 64


def split(length: int, programs: int, multiple: int, *, on_gpu: bool) -> tuple[int, int]:
    """How many stretches, and how many tokens each has, a multiple of `multiple`; `programs` is how many there are of
    each stretch. The interpreter fills nothing: it splits where it can, so that the tests see it."""
    wanted = min(-(-ENOUGH_PROGRAMS // programs) if on_gpu else ENOUGH_PROGRAMS, length // MIN_STRETCH)
    tokens = -(-length // max(1, wanted))
    tokens = -(-tokens // multiple) * multiple
    return -(-length // tokens), tokens


def chain(start_BX: Tensor, end_BSX: Tensor, decay_BSX: Tensor, *, reverse: bool = False) -> Tensor:
    """start_BSX, where stretches that started with zeros ended with `end_BSX`; `start_BX` is that of the first, or in
    reverse of the last."""
    order = list(range(end_BSX.shape[1]))[:: -1 if reverse else 1]
    starts = [start_BX]
    for s in order[:-1]:
        starts.append(decay_BSX[:, s] * starts[-1] + end_BSX[:, s])
    return torch.stack(starts[:: -1 if reverse else 1], dim=1)
