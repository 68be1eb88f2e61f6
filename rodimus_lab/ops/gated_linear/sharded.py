"""The gated linear recurrence over a sequence that is split over ranks.

The recurrence is linear in its state. So each rank runs its own part from a zero state, the ranks tell one another the
state that this leaves and the decay of the whole part, and what the state before adds is made up for:

    S_in  = sum over ranks j before of (product of the decays of the ranks between) * S_j
    o_t  += scale * (q_t * alpha_1 ... alpha_t) S_in * beta_1 ... beta_t

One pass over the tokens and one product with S_in; n x m numbers a head and layer travel, whatever the length.

Shapes: B batch, T time (of this rank), H heads, K key width, V value width, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rodimus_lab.ops.sequence import SequenceShard, gather


def across_ranks(
    run: Callable[[], tuple[Tensor, Tensor]],
    shard: SequenceShard,
    q_BTHK: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`run()` gives o_BTHV and the state of this rank's part by itself. Returns them as the whole sequence has them."""
    o_BTHV, state_BHKV = run()
    wide = state_BHKV.dtype
    alpha_BTHK = log_alpha_BTHK.to(wide).cumsum(1)
    beta_BTHV = None if log_beta_BTHV is None else log_beta_BTHV.to(wide).cumsum(1)
    decay_BHKV = alpha_BTHK[:, -1].unsqueeze(-1)
    if beta_BTHV is not None:
        decay_BHKV = decay_BHKV + beta_BTHV[:, -1].unsqueeze(-2)
    decay_BHKV = decay_BHKV.expand_as(state_BHKV)
    states_RBHKV, decays_RBHKV = gather(shard, torch.stack([state_BHKV, decay_BHKV])).unbind(1)

    # By the recurrence over all ranks, so that the graph is the same on each; then the one before this rank is taken.
    before = [torch.zeros_like(state_BHKV)]
    for rank in range(shard.size - 1):
        before.append(decays_RBHKV[rank].exp() * before[-1] + states_RBHKV[rank])
    incoming_BHKV = torch.stack([*before[1:], before[0]])[shard.rank - 1]

    read_BTHK = scale * q_BTHK.to(wide) * alpha_BTHK.exp()
    with torch.autocast(o_BTHV.device.type, enabled=False):
        added_BTHV = torch.einsum("bthk,bhkv->bthv", read_BTHK, incoming_BHKV)
    if beta_BTHV is not None:
        added_BTHV = added_BTHV * beta_BTHV.exp()
    o_BTHV = (o_BTHV.to(wide) + added_BTHV).to(o_BTHV.dtype)
    return o_BTHV, state_BHKV + decay_BHKV.exp() * incoming_BHKV
