"""A sequence split over ranks: each holds the same number of consecutive tokens, rank 0 the first.

Inside `with sharded_sequence(shard):` the operators that know how reach over to the ranks before them: the gated linear
recurrence takes their states, the short convolution their last inputs, attention their keys and values. What they
exchange has gradients. Every rank must make the same calls in the same order, backward passes included.

Shapes: B batch, T time (of this rank), R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rodimus_lab.errors import UserError


class SequenceShard(NamedTuple):
    """This rank's place among the `size` ranks of `group` that share a sequence."""

    group: Any
    rank: int
    size: int


# Not a context variable: backward passes, with what they make again, run in threads of their own.
_current: SequenceShard | None = None


def sequence_shard() -> SequenceShard | None:
    """The shard that the operators are to work on; None where a rank has whole sequences."""
    return _current


@contextmanager
def sharded_sequence(shard: SequenceShard | None) -> Iterator[None]:
    """Operators called inside see a part of each sequence. With None they see whole ones."""
    global _current
    before, _current = _current, shard
    try:
        yield
    finally:
        _current = before


def first_position(length: int) -> int:
    """Where this rank's first token stands in its sequence, `length` tokens being on every rank."""
    return 0 if _current is None else _current.rank * length


def refuse_state(what: str, *given: object) -> None:
    """Raise `UserError` where a call inside brings states or documents, which are not split."""
    if any(one is not None for one in given):
        raise UserError(f"{what} with states, padding or packed documents is not split over ranks; use one rank")


def gather(shard: SequenceShard, x: Tensor) -> Tensor:
    """x_R...: what every rank has as `x`, of one shape."""
    return _Gather.apply(x.contiguous(), shard)


def from_previous(shard: SequenceShard, x: Tensor) -> Tensor:
    """What the rank before has as `x`; zeros on rank 0."""
    # Joined and then chosen, so that every rank's graph holds the exchange and all take part in its backward pass.
    gathered = gather(shard, x)
    return torch.cat([torch.zeros_like(gathered[:1]), gathered[:-1]])[shard.rank]


def halo(what: str, x_BTD: Tensor, tokens: int, state: Tensor | None, segments: object) -> Tensor | None:
    """The `tokens` inputs before this rank's first as the state of a convolution; `state` itself where sequences are
    whole. Raises `UserError` where a rank has fewer tokens than that, and for states and documents."""
    if _current is None or not tokens:
        return state
    refuse_state(what, state, segments)
    if x_BTD.shape[1] < tokens:
        raise UserError(f"{what} reaches {tokens} tokens back, and a rank has only {x_BTD.shape[1]}; use fewer ranks")
    return from_previous(_current, x_BTD[:, x_BTD.shape[1] - tokens :])


def tail_before(shard: SequenceShard, x_BT: Tensor, tokens: int) -> Tensor:
    """The last `tokens` tokens (or as many as there are) of all ranks before this one, (B, 0 to tokens, ...)."""
    length = x_BT.shape[1]
    if tokens <= length:
        before = from_previous(shard, x_BT[:, length - tokens :])
        return before if shard.rank else before[:, :0]
    whole = gather(shard, x_BT).movedim(0, 1).flatten(1, 2)
    end = shard.rank * length
    return whole[:, max(0, end - tokens) : end]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        context.shard = shard
        parts = x.new_empty(shard.size * x.numel())
        dist.all_gather_into_tensor(parts, x.flatten(), group=shard.group)
        return parts.view(shard.size, *x.shape)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (whole,) = gradients
        own = whole.new_empty(whole[0].numel())
        dist.reduce_scatter_tensor(own, whole.flatten(), group=context.shard.group)
        return own.view_as(whole[0]), None
